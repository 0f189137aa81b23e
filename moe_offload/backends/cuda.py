"""The package's CUDA kernels (`moe_offload.cuda_kernels`) as an expert backend: for NVIDIA GPUs.

Few tokens run the decode kernels, many the prefill kernels; both read pages where they are, slots
of the pool or a resident model's weights. The host waits once per call, for the routed ids
(`routes.py`). Bits depend on the call's sizes and the GPU, not on portions, slots or timing.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from moe_offload import cuda_kernels
from moe_offload.activations import Activation, recognise, unsupported
from moe_offload.backends.routes import SortedRoutes
from moe_offload.cuda_kernels import CudaExperts, ExpertShape, SlabPages
from moe_offload.device import to_device

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
        dtypes = [section.dtype for section in layout.sections]
        if (reason := unsupported(module, dtypes, cuda_kernels.DTYPES)) is not None:
            return reason
        return bad_sizes(*_sizes(module, layout))

    def bind(self, module: Any, layout: PageLayout, num_experts: int) -> BoundLayer:
        activation = recognise(module)
        assert isinstance(activation, Activation), "bind follows a supports() of None"
        offsets = {section.name: section.offset for section in layout.sections}
        shape = expert_shape(
            activation,
            *(*_sizes(module, layout), layout.sections[0].dtype, offsets),
            interleaved=not getattr(module, "is_concatenated", True),
            transposed=module.is_transposed,
        )
        return BoundLayer(CudaExperts(shape, num_experts))


def _sizes(module: Any, layout: PageLayout) -> tuple[int, int]:
    """H and F; down is [H, F], or transposed [F, H]."""
    rows, columns = layout.section("down_proj").shape
    return (columns, rows) if module.is_transposed else (rows, columns)


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
    interleaved: bool = False,
    transposed: bool = False,
) -> ExpertShape:
    """A layer as the kernels see it; `offsets` of its sections from a page's start, in bytes."""
    first = "gate_up_proj" if activation.gated else "up_proj"
    return ExpertShape(
        *(hidden, inner, dtype),
        up_offset=offsets[first],
        down_offset=offsets["down_proj"],
        up_bias_offset=offsets.get(f"{first}_bias", -1),
        down_bias_offset=offsets.get("down_proj_bias", -1),
        activation=activation.name,
        gated=activation.gated,
        interleaved=interleaved,
        transposed=transposed,
        alpha=activation.alpha,
        limit=activation.limit,
        offset=activation.offset,
    )


class BoundLayer:
    """The kernels tied to one layer."""

    def __init__(self, experts: CudaExperts) -> None:
        self.kernels = experts

    def start(self, hidden: Tensor, topk_ids: Tensor, topk_weights: Tensor) -> CudaRun:
        return CudaRun(self.kernels, hidden, topk_ids, topk_weights)


class CudaRun:
    """One call of one layer: rows sorted by expert, experts computed in any portions."""

    def __init__(
        self, kernels: CudaExperts, hidden: Tensor, topk_ids: Tensor, topk_weights: Tensor
    ) -> None:
        self._dtype, self._device = hidden.dtype, hidden.device
        self._routes = SortedRoutes(topk_ids, kernels.num_experts)
        self.experts = self._routes.experts
        self._call = kernels.begin(
            _readable(hidden.to(kernels.shape.dtype)),
            topk_weights.float().contiguous(),
            self._routes.route_of_row,
            self._routes.row_of_route,
            total_groups=self._routes.num_active,
        )

    def compute(self, pool: ExpertPool, ready: Sequence[tuple[int, int]]) -> None:
        assert pool.slab is not None, "no resize while a ticket is open"
        self.compute_pages(SlabPages(pool.slab, pool.layout.slot_stride), ready)

    def compute_pages(self, pages: SlabPages, ready: Sequence[tuple[int, int]]) -> None:
        """Launch the rows of these (index in experts, slot) on the current stream."""
        groups = [(*self._routes.ranges[index], slot) for index, slot in ready]
        self._call.compute(pages, to_device(groups, torch.int32, self._device))

    def finish(self) -> Tensor:
        return self._call.finish().to(self._dtype)


def _readable(x: Tensor) -> Tensor:
    """Contiguous, and from a multiple of 16 bytes on, as the kernels read it."""
    x = x.contiguous()
    return x.clone() if x.data_ptr() % 16 else x
