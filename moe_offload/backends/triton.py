"""The Triton kernels as an expert backend: for GPUs on which the CUDA module was not built.

Weights are read from the slots as the checkpoint stores them, transposed, interleaved and biased
layouts included. An expert's rows are computed in tiles that depend on the call's shapes alone, so
portions, slots and timing cannot change a bit. On the CPU it runs through Triton's interpreter,
for tests; "auto" never chooses it there.
"""

from __future__ import annotations

import importlib.util
import os
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from moe_offload.activations import Activation, recognise, unsupported
from moe_offload.backends.routes import SortedRoutes
from moe_offload.device import to_device

if TYPE_CHECKING:
    from moe_offload.pager import ExpertPool
    from moe_offload.pages import PageLayout

_FLOATS = (torch.float32, torch.float16, torch.bfloat16)


class TritonExperts:
    """See the head of this file. Triton itself is imported when a layer is computed."""

    name = "triton"
    devices: tuple[str, ...] = ("cuda", "cpu")
    auto_devices: tuple[str, ...] = ("cuda",)  # on the CPU it is only interpreted, for tests

    def missing(self) -> str | None:
        if importlib.util.find_spec("triton") is None:
            return "the package triton is not installed (pip install triton)"
        if not torch.cuda.is_available() and os.environ.get("TRITON_INTERPRET", "0") in ("", "0"):
            return "no CUDA device (TRITON_INTERPRET=1 interprets the kernels, for tests)"
        return None

    def supports(self, module: Any, layout: PageLayout) -> str | None:
        return unsupported(module, [section.dtype for section in layout.sections], _FLOATS)

    def bind(self, module: Any, layout: PageLayout, num_experts: int) -> BoundTriton:
        activation = recognise(module)
        assert isinstance(activation, Activation), "bind follows a supports() of None"
        return BoundTriton(module, activation, num_experts)


class BoundTriton:
    """What the kernels need to know of a layer."""

    def __init__(self, module: Any, activation: Activation, num_experts: int) -> None:
        self.num_experts = num_experts
        self.transposed: bool = module.is_transposed
        self.first = "gate_up_proj" if activation.gated else "up_proj"
        self.has_bias: bool = module.has_bias
        concatenated = getattr(module, "is_concatenated", True)
        gate = "none" if not activation.gated else "halves" if concatenated else "interleaved"
        parameters = (activation.alpha, activation.limit, activation.offset)
        self.epilogue = (activation.name, gate, *parameters)

    def start(self, hidden: Tensor, topk_ids: Tensor, topk_weights: Tensor) -> _Run:
        return _Run(self, hidden, topk_ids, topk_weights)


class _Run:
    """One call of a layer: rows sorted once, then both projections of whoever has arrived."""

    def __init__(
        self, bound: BoundTriton, hidden: Tensor, topk_ids: Tensor, topk_weights: Tensor
    ) -> None:
        from moe_offload.triton_kernels.permute import Permutation

        self._bound, self._hidden, self._weights = bound, hidden, topk_weights
        routes = SortedRoutes(topk_ids, bound.num_experts)
        self.experts = routes.experts
        self._rows = Permutation(
            routes.route_of_row,
            routes.row_of_route.view(topk_ids.shape),
            routes.expert_offsets,
            routes.active_experts,
            routes.num_active,
        )
        self._inner: Tensor | None = None  # [R, F]
        self._out: Tensor | None = None  # [R, H]

    def compute(self, pool: ExpertPool, ready: Sequence[tuple[int, int]]) -> None:
        from moe_offload.triton_kernels.grouped_gemm import Epilogue, grouped_gemm

        bound, views = self._bound, pool.views
        slot_of = [-1] * bound.num_experts
        for index, slot in ready:
            slot_of[self.experts[index]] = slot
        slots = to_device(slot_of, torch.int32, self._hidden.device)
        first = views[bound.first]
        self._inner = grouped_gemm(
            self._hidden.to(first.dtype).contiguous(),
            first,
            self._rows,
            slots,
            gather=True,
            bias=views[f"{bound.first}_bias"] if bound.has_bias else None,
            epilogue=Epilogue(*bound.epilogue),
            transposed=bound.transposed,
            out=self._inner,
        )
        self._out = grouped_gemm(
            self._inner,
            views["down_proj"],
            self._rows,
            slots,
            bias=views["down_proj_bias"] if bound.has_bias else None,
            transposed=bound.transposed,
            out=self._out,
        )

    def finish(self) -> Tensor:
        from moe_offload.triton_kernels.combine import combine

        if self._out is None:  # no token was routed to our experts
            return torch.zeros_like(self._hidden)
        weights = self._weights if self._weights.dtype in _FLOATS else self._weights.float()
        dtype = self._hidden.dtype
        return combine(self._out, self._rows.route_row, weights.contiguous(), dtype=dtype)
