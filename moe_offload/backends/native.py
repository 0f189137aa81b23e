"""The package's own CPU kernels: the routed FFN of a layer in a few native calls.

Weights are read where they are, pages in slots or a resident model's parameters, so both give the
same bits. `csrc/expert_gemm/cpu/kernels.h` says how; `MOE_OFFLOAD_CPU_ISA` forces an instruction
set, for tests. Bits depend on the instruction set and the dtype, not on threads, slots or arrival.
Quantised pages are computed in bfloat16, with the bits of the same pages dequantised.
"""

from __future__ import annotations

import functools
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from contextvars import ContextVar
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from moe_offload import _core
from moe_offload.activations import Activation, recognise, unsupported
from moe_offload.quantization import FP8_BLOCK, INT4_PER_WORD, MXFP4_GROUP, SCALES, format_of

if TYPE_CHECKING:
    from moe_offload.pager import ExpertPool
    from moe_offload.pages import PageLayout

DTYPES = {torch.float32: "float32", torch.bfloat16: "bfloat16", torch.float16: "float16"}
FORMATS = ("plain", "mxfp4", "fp8_block", "int4_group")
_FORMATS_BY_SCALES = {
    ("fp8_block", torch.bfloat16): "fp8_block_bf16",
    ("int4_group", torch.float16): "int4_group_f16",
}
_FLOATS = tuple(DTYPES)
PLAIN_TENSORS = (Tensor, torch.nn.Parameter)  # by type: subclasses may compute otherwise


@functools.cache
def dense_kernels(dtype: torch.dtype) -> _core.DenseKernels:
    """This machine's kernels for a model's other layers; for a dtype of `DTYPES`."""
    return _core.DenseKernels(DTYPES[dtype])


_rows_apart = ContextVar("rows_apart", default=False)


@contextmanager
def rows_apart() -> Iterator[None]:
    """Within, a row's bits do not depend on how many other rows chose its expert.

    Calls of this thread only. Few and many rows of an expert are summed in different orders, so
    sequences that change places between batches (`batch_generate`) would differ in the last bits.
    Here all rows are computed as few, eight at a time, each eight reading the weights again: for
    calls of about as many tokens as there are experts that is hardly ever more than once.
    """
    token = _rows_apart.set(True)
    try:
        yield
    finally:
        _rows_apart.reset(token)


class Native:
    """See the head of this file."""

    name = "native"
    reads_shifted = True

    def missing(self) -> str | None:
        return None  # _core is always built, and its plain path runs everywhere

    def supports(self, module: Any, layout: PageLayout) -> str | None:
        form = weight_format(layout)
        if form == "plain":
            return unsupported(module, [section.dtype for section in layout.sections], DTYPES)
        if form not in FORMATS:
            return f"it has no kernels for {form} weights"
        if form == "int4_group" and (reason := _bad_groups(layout)) is not None:
            return reason
        biases = [s.dtype for s in layout.sections if s.name.endswith("_bias")]
        return unsupported(module, [torch.bfloat16, *biases], DTYPES)

    def bind(self, module: Any, layout: PageLayout, num_experts: int) -> BoundLayer:
        activation = recognise(module)
        assert isinstance(activation, Activation), "bind follows a supports() of None"
        form, down = weight_format(layout), layout.section("down_proj")
        transposed = module.is_transposed and form == "plain"  # codes are always [N, K]
        hidden, inner = down.shape[::-1] if transposed else (down.shape[0], down.shape[1])
        inner *= {"mxfp4": MXFP4_GROUP, "int4_group": INT4_PER_WORD}.get(form, 1)
        return BoundLayer(
            activation,
            hidden=hidden,
            inner=inner,
            num_experts=num_experts,
            dtype=down.dtype if form == "plain" else torch.bfloat16,
            concatenated=getattr(module, "is_concatenated", True),
            transposed=transposed,
            weight_format=form,
        )


def weight_format(layout: PageLayout) -> str:
    """How the pages hold weights: of `quantization.FORMATS`."""
    return format_of(layout.section("down_proj").dtype)


def _bad_groups(layout: PageLayout) -> str | None:
    """Why the kernels cannot read int4 pages with these scales; None when they can."""
    dtypes = set()
    for section in layout.sections:
        if section.dtype != torch.int32:
            continue
        scales = layout.section(section.name + SCALES)
        columns, groups = section.shape[-1] * INT4_PER_WORD, scales.shape[-1]
        if columns % groups or columns // groups % 32:
            return f"its int4 groups must be multiples of 32, got {columns} / {groups} columns"
        dtypes.add(scales.dtype)
    if dtypes not in ({torch.bfloat16}, {torch.float16}):
        got = " and ".join(sorted(map(str, dtypes)))
        return f"its int4 scales must be bfloat16, or all float16, got {got}"
    return None


class BoundLayer:
    """The native kernels tied to one layer's arithmetic and sizes.

    Args:
        activation: what `recognise` found.
        hidden, inner, num_experts: H, F, E.
        dtype: of the weights; hidden states are converted to it, as grouped_mm does.
        concatenated: gate and up are two halves of the first projection; else its rows alternate.
        transposed: matrices are [K, N], as gpt-oss has them.
        weight_format: of FORMATS; dtype is bfloat16 and `transposed` False unless it is plain.
        isa: instruction set, "auto" for the best one.
    """

    def __init__(
        self,
        activation: Activation,
        hidden: int,
        inner: int,
        num_experts: int,
        dtype: torch.dtype,
        concatenated: bool = True,
        transposed: bool = False,
        isa: str = "auto",
        weight_format: str = "plain",
    ) -> None:
        self.activation, self.dtype = activation, dtype
        self.hidden, self.inner, self.num_experts = hidden, inner, num_experts
        self._concatenated, self._transposed = concatenated, transposed
        self._format = weight_format
        self.ffn = _core.ExpertFfn(
            hidden=hidden,
            inner=inner,
            num_experts=num_experts,
            dtype=DTYPES[dtype],
            activation=activation.name,
            gated=activation.gated,
            alpha=activation.alpha,
            limit=activation.limit,
            offset=activation.offset,
            isa=isa,
        )
        self._slab: Tensor | None = None
        self._slots: _core.FfnWeights | None = None

    def start(self, hidden: Tensor, topk_ids: Tensor, topk_weights: Tensor) -> NativeRun:
        return NativeRun(self, hidden, topk_ids, topk_weights)

    def slots(self, pool: ExpertPool) -> _core.FfnWeights:
        """The pool's slots as the kernels address them; worked out again after a resize."""
        if self._slots is None or self._slab is not pool.slab:
            self._slots = self.weights(pool.slot_starts, pool.pager.slot_shifts)
            self._slab = pool.slab
        return self._slots

    def weights(self, tensors: Mapping[str, Tensor], shifts: int = 0) -> _core.FfnWeights:
        """Parameters [E or S, ...] by name as the kernels address them; matrices contiguous.

        Quantised matrices come with their scales under the name + "_scales". `shifts`: address of
        how many bytes further on each slot's page lies, see `ExpertPool`.
        """
        first = "gate_up_proj" if self.activation.gated else "up_proj"
        gate, up = self._halves(self._rows(tensors[first]))
        bias, down_bias = tensors.get(f"{first}_bias"), tensors.get("down_proj_bias")
        gate_bias, up_bias = self._halves(bias) if bias is not None else (None, None)
        return _core.FfnWeights(
            up=_view(up),
            down=_view(self._rows(tensors["down_proj"])),
            gate=_view(gate) if gate is not None else None,
            up_bias=_view(up_bias) if up_bias is not None else None,
            down_bias=_view(down_bias) if down_bias is not None else None,
            gate_bias=_view(gate_bias) if gate_bias is not None else None,
            shifts=shifts,
            **self._scales(tensors, first),
        )

    def _scales(self, tensors: Mapping[str, Tensor], first: str) -> dict[str, Any]:
        """Format, scales and groups of quantised matrices as `FfnWeights` takes them."""
        if self._format == "plain":
            return {}
        scales, down = tensors[first + SCALES], tensors["down_proj" + SCALES]
        gate: Tensor | None = None
        if self.activation.gated and self._format == "fp8_block":
            # gate and up were quantised each by itself: the grids lie one behind the other
            blocks = -(-self.inner // FP8_BLOCK)
            gate, up = scales[:, :blocks], scales[:, blocks:]
        else:
            gate, up = self._halves(scales)
        groups = {}
        if self._format == "int4_group":
            groups = {
                "up_group": self.hidden // scales.shape[-1],
                "down_group": self.inner // down.shape[-1],
            }
        return {
            **groups,
            "format": _FORMATS_BY_SCALES.get((self._format, down.dtype), self._format),
            "up_scales": _view(up)[:2],
            "down_scales": _view(down)[:2],
            "gate_scales": _view(gate)[:2] if gate is not None else None,
        }

    def _rows(self, matrices: Tensor) -> Tensor:
        """[E, N, K], however they are stored."""
        return matrices.transpose(1, 2) if self._transposed else matrices

    def _halves(self, both: Tensor) -> tuple[Tensor | None, Tensor]:
        """Gate and up of a first projection or its bias, [E, 2F, ...] -> [E, F, ...] each."""
        if not self.activation.gated:
            return None, both
        if self._concatenated:
            return both[:, : self.inner], both[:, self.inner :]
        return both[:, ::2], both[:, 1::2]


def _view(tensor: Tensor) -> tuple[int, int, int, int]:
    item = tensor.element_size()
    k_stride = tensor.stride(2) if tensor.dim() >= 3 else 1
    return tensor.data_ptr(), tensor.stride(0) * item, tensor.stride(1) * item, k_stride * item


class NativeRun:
    """One call of one layer; keeps what the kernels point at alive."""

    def __init__(
        self, layer: BoundLayer, hidden: Tensor, topk_ids: Tensor, topk_weights: Tensor
    ) -> None:
        if topk_ids.dtype not in (torch.int64, torch.int32):
            topk_ids = topk_ids.long()
        if topk_weights.dtype not in _FLOATS:
            topk_weights = topk_weights.float()
        self._layer, self._dtype = layer, hidden.dtype
        self._hidden = hidden.to(layer.dtype).contiguous()
        self._ids, self._weights = topk_ids.contiguous(), topk_weights.contiguous()
        num_tokens, top_k = topk_ids.shape
        self.run = layer.ffn.start(
            self._hidden.data_ptr(),
            self._ids.data_ptr(),
            self._ids.dtype == torch.int64,
            self._weights.data_ptr(),
            DTYPES[self._weights.dtype],
            num_tokens,
            top_k,
            torch.get_num_threads(),
            _rows_apart.get(),
        )
        self.experts = self.run.experts

    def compute(self, pool: ExpertPool, ready: Sequence[tuple[int, int]]) -> None:
        self.run.compute(self._layer.slots(pool), ready)

    def finish(self) -> Tensor:
        out = torch.empty_like(self._hidden)
        self.run.finish(out.data_ptr())
        return out if out.dtype == self._dtype else out.to(self._dtype)
