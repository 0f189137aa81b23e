"""The package's CUDA kernels (`moe_offload.cuda_kernels`) as an expert backend: for NVIDIA GPUs.

Few tokens run the decode kernels, many the prefill kernels; both read pages where they are, slots
of the pool or a resident model's weights, as they are stored: [N, K] or [K, N], plain or quantised
(`quantization.py`). The host waits once per call, for the routed ids (`routes.py`). Bits depend on
the call's sizes and the GPU, not on portions, slots or timing.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from moe_offload import cuda_kernels, cuda_pages
from moe_offload.activations import Activation, recognise, unsupported
from moe_offload.backends.routes import SortedRoutes
from moe_offload.cuda_kernels import CudaExperts
from moe_offload.cuda_pages import ExpertShape, SlabPages
from moe_offload.device import to_device
from moe_offload.quantization import MXFP4_GROUP, SCALES, format_of

if TYPE_CHECKING:
    from moe_offload.pager import ExpertPool
    from moe_offload.pages import PageLayout


class Cuda:
    """See the head of this file. `moe_offload._cuda` is loaded when a layer is bound."""

    name = "cuda"
    devices: tuple[str, ...] = ("cuda",)

    def missing(self) -> str | None:
        return cuda_kernels.missing()

    def supports(self, module: Any, layout: PageLayout) -> str | None:
        form = format_of(layout.section("down_proj").dtype)
        dtypes = [section.dtype for section in layout.sections]
        if form != "plain":  # which mean bfloat16, and biases are of it
            biases = [s.dtype for s in layout.sections if s.name.endswith("_bias")]
            dtypes = [torch.bfloat16, *biases]
        if (reason := unsupported(module, dtypes, cuda_pages.DTYPES)) is not None:
            return reason
        if (reason := bad_sizes(*_sizes(module, layout))) is not None:
            return reason
        try:
            _shape_of_pages(module, layout, Activation("silu", module.has_gate))
        except (KeyError, TypeError, ValueError) as error:
            return str(error)
        return None

    def bind(self, module: Any, layout: PageLayout, num_experts: int) -> BoundLayer:
        activation = recognise(module)
        assert isinstance(activation, Activation), "bind follows a supports() of None"
        return BoundLayer(CudaExperts(_shape_of_pages(module, layout, activation), num_experts))


def _sizes(module: Any, layout: PageLayout) -> tuple[int, int]:
    """H and F. Down is [H, F], plain ones may be transposed; codes are [H, F / codes of one]."""
    down = layout.section("down_proj")
    rows, columns = down.shape[:2]
    form = format_of(down.dtype)
    if form == "plain":
        return (columns, rows) if module.is_transposed else (rows, columns)
    return rows, columns * {"fp8_block": 1, "mxfp4": MXFP4_GROUP, "int4_group": 8}[form]


def _shape_of_pages(module: Any, layout: PageLayout, activation: Activation) -> ExpertShape:
    """The layer as the kernels see it, every section's dtype and shape checked."""
    first = "gate_up_proj" if activation.gated else "up_proj"
    down = layout.section("down_proj")
    form, (hidden, inner) = format_of(down.dtype), _sizes(module, layout)
    names: dict[str, Any] = {"up": first, "down": "down_proj"}
    options: dict[str, Any] = {"weight_format": form}
    if form == "plain":
        options["transposed"] = module.is_transposed
    else:
        names |= {"up_scales": first + SCALES, "down_scales": "down_proj" + SCALES}
    if form == "int4_group":
        options["group_size"] = inner // layout.section("down_proj" + SCALES).shape[-1]
    if module.has_bias:
        names |= {"up_bias": f"{first}_bias", "down_bias": "down_proj_bias"}
    return ExpertShape.of_layout(
        layout,
        hidden,
        inner,
        down.dtype if form == "plain" else torch.bfloat16,
        **names,
        **options,
        activation=activation.name,
        gated=activation.gated,
        interleaved=not getattr(module, "is_concatenated", True),
        alpha=activation.alpha,
        limit=activation.limit,
        offset=activation.offset,
    )


def bad_sizes(hidden: int, inner: int) -> str | None:
    """Why the kernels cannot compute experts of these sizes; None when they can."""
    if hidden % 8 or inner % 8:
        return f"its hidden and inner sizes must be multiples of 8, got {hidden} and {inner}"
    return None


def expert_shape(
    activation: Activation,
    hidden: int,
    inner: int,
    dtype: torch.dtype,
    offsets: Mapping[str, int],
) -> ExpertShape:
    """A layer of plain [N, K] matrices as the kernels see it; `offsets` in a page, in bytes."""
    first = "gate_up_proj" if activation.gated else "up_proj"
    return ExpertShape(
        *(hidden, inner, dtype),
        up_offset=offsets[first],
        down_offset=offsets["down_proj"],
        up_bias_offset=offsets.get(f"{first}_bias", -1),
        down_bias_offset=offsets.get("down_proj_bias", -1),
        activation=activation.name,
        gated=activation.gated,
        alpha=activation.alpha,
        limit=activation.limit,
        offset=activation.offset,
    )


class BoundLayer:
    """The kernels tied to one layer."""

    def __init__(self, experts: CudaExperts) -> None:
        self.kernels = experts
        # By stream, each for one call at a time. They are zero between calls: making them anew
        # would be a launch more in each.
        self.tickets: dict[int, Tensor] = {}

    def start(self, hidden: Tensor, topk_ids: Tensor, topk_weights: Tensor) -> CudaRun:
        return CudaRun(self, hidden, topk_ids, topk_weights)


class CudaRun:
    """One call of one layer: rows sorted by expert, experts computed in any portions."""

    def __init__(
        self, layer: BoundLayer, hidden: Tensor, topk_ids: Tensor, topk_weights: Tensor
    ) -> None:
        kernels = layer.kernels
        self._dtype, self._device = hidden.dtype, hidden.device
        self._routes = SortedRoutes(topk_ids, kernels.num_experts)
        self.experts = self._routes.experts
        self._layer, self._left = layer, len(self.experts)
        self._stream: int = torch.cuda.current_stream(self._device).cuda_stream
        # A call that does not come to its end keeps them: they may not be zero then.
        tickets = layer.tickets.pop(self._stream, None)
        self._call = kernels.begin(
            _readable(hidden.to(kernels.shape.dtype)),
            topk_weights.float().contiguous(),
            self._routes.route_of_row,
            self._routes.row_of_route,
            total_groups=self._routes.num_active,
            tickets=tickets,
        )

    def compute(self, pool: ExpertPool, ready: Sequence[tuple[int, int]]) -> None:
        assert pool.slab is not None, "no resize while a ticket is open"
        self.compute_pages(SlabPages(pool.slab, pool.layout.slot_stride), ready)

    def compute_pages(self, pages: SlabPages, ready: Sequence[tuple[int, int]]) -> None:
        """Launch the rows of these (index in experts, slot) on the current stream."""
        groups = [(*self._routes.ranges[index], slot) for index, slot in ready]
        self._call.compute(pages, to_device(groups, torch.int32, self._device))
        self._left -= len(groups)

    def finish(self) -> Tensor:
        out = self._call.finish()
        if self._left == 0:
            self._layer.tickets[self._stream] = self._call.tickets
        return out.to(self._dtype)


def _readable(x: Tensor) -> Tensor:
    """Contiguous, and from a multiple of 16 bytes on, as the kernels read it."""
    x = x.contiguous()
    return x.clone() if x.data_ptr() % 16 else x
