"""transformers' own arithmetic on the slots, operation by operation: the backend for every layout.

One matrix product per expert, which is what torch's grouped_mm does on the CPU, so the output
equals a resident model with `experts_implementation="grouped_mm"` bit for bit. On CUDA it is the
portable backend: one product per expert as well, not torch's grouped kernel, whose tiles are chosen
by the total number of rows, so that an expert's result could depend on who arrives with it.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from moe_offload.device import read_ids
from moe_offload.quantization import format_of

if TYPE_CHECKING:
    from moe_offload.pager import ExpertPool
    from moe_offload.pages import PageLayout

Group = tuple[int, int, int]  # first row, end row, slot

# Up to this many elements the activation is applied to all rows at once, see _ExpertFfn. Each
# arrival then repeats it: 0.1 ms at most, against milliseconds for reading an expert's weights.
_WHOLE_ACTIVATION_ELEMENTS = 128 * 1024


class GroupedMM:
    """See the head of this file."""

    name = "grouped_mm"
    devices: tuple[str, ...] = ("cpu", "cuda")

    def missing(self) -> str | None:
        return None

    def supports(self, module: Any, layout: PageLayout) -> str | None:
        formats = {format_of(section.dtype) for section in layout.sections} - {"plain"}
        return f"it has no kernels for {', '.join(formats)} weights" if formats else None

    def bind(self, module: Any, layout: PageLayout, num_experts: int) -> _Bound:
        return _Bound(module, num_experts)


class _Bound:
    def __init__(self, module: Any, num_experts: int) -> None:
        self._module, self._num_experts = module, num_experts

    def start(self, hidden: Tensor, topk_ids: Tensor, topk_weights: Tensor) -> _Run:
        return _Run(self._module, self._num_experts, hidden, topk_ids, topk_weights)


class _Run:
    """Rows sorted by expert; `compute` in any portions; combine by the rank of the choice."""

    def __init__(
        self, module: Any, num_experts: int, hidden: Tensor, topk_ids: Tensor, topk_weights: Tensor
    ) -> None:
        self._module, self._hidden, self._weights = module, hidden, topk_weights
        self._num_tokens, self._top_k = topk_ids.shape
        sorted_ids, self._perm = torch.sort(topk_ids.reshape(-1))  # [R], R = T * A
        self._rows = hidden[self._perm // self._top_k]  # [R, H]
        if topk_ids.device.type == "cpu":
            ids, counts = torch.unique_consecutive(sorted_ids, return_counts=True)
        else:  # only the ids come to the host; asking for the sorted ones too would wait again
            ids, counts = torch.unique(read_ids(topk_ids), return_counts=True)
        ends: list[int] = torch.cumsum(counts, 0).tolist()
        found = zip(ids.tolist(), [0, *ends], ends, strict=False)
        ours = [group for group in found if 0 <= group[0] < num_experts]
        self.experts: list[int] = [expert for expert, _, _ in ours]
        self._ranges = [(start, end) for _, start, end in ours]
        self._ffn: _ExpertFfn | None = None

    def compute(self, pool: ExpertPool, ready: Sequence[tuple[int, int]]) -> None:
        if self._ffn is None:
            self._ffn = _ExpertFfn(self._module, pool.views, self._rows)
        self._ffn.compute([(*self._ranges[index], slot) for index, slot in ready])

    def finish(self) -> Tensor:
        if self._ffn is None or self._ffn.out is None:  # no token was routed to our experts
            return torch.zeros_like(self._hidden)
        perm = self._perm
        out = self._ffn.out * self._weights.reshape(-1)[perm].unsqueeze(-1)
        inverse = torch.empty_like(perm)
        inverse[perm] = torch.arange(perm.shape[0], device=perm.device)
        out = out[inverse].view(self._num_tokens, self._top_k, -1).sum(dim=1)
        return out.to(self._hidden.dtype)


class _ExpertFfn:
    """Both projections and the activation for rows sorted by expert, a few experts at a time.

    Results must not depend on which experts come together. Two things in the libraries below
    would break that. BLAS chooses instructions by the alignment of its operands: so every
    expert's rows keep their place in full-size buffers, whenever they are computed. And torch's
    elementwise loops treat the ends of a tensor with scalar functions that differ from the vector
    ones in the last bit (seen with SiLU in fp32): so the activation is applied either always to
    the whole buffer, as the resident model does, or, when that is large, always expert by expert.

    Rows that belong to no group stay zero.

    Args:
        rows: [R, H], sorted by expert.
    """

    def __init__(self, module: Any, views: Mapping[str, Tensor], rows: Tensor) -> None:
        self._module, self._views = module, views
        self._up = "gate_up_proj" if module.has_gate else "up_proj"
        self._rows = rows.to(views[self._up].dtype)
        self._up_out: Tensor | None = None  # [R, 2F] or [R, F]
        self._inner: Tensor | None = None  # [R, F]
        self.out: Tensor | None = None  # [R, H]

    def compute(self, groups: list[Group]) -> None:
        """Fill `out` for the rows of these experts."""
        self._up_out = self._linear(self._up, self._rows, groups, self._up_out)
        if self._up_out.numel() <= _WHOLE_ACTIVATION_ELEMENTS:
            self._inner = self._activate(self._up_out)  # rows not here yet are repeated later
        else:
            for start, end, _ in groups:
                part = self._activate(self._up_out[start:end])
                if self._inner is None:
                    self._inner = part.new_empty(len(self._rows), part.shape[1])
                self._inner[start:end] = part
        assert self._inner is not None, "a ticket delivers at least one expert at a time"
        self.out = self._linear("down_proj", self._inner, groups, self.out)

    def _activate(self, up_out: Tensor) -> Tensor:
        module = self._module
        activated: Tensor = module._apply_gate(up_out) if module.has_gate else module.act_fn(up_out)
        return activated

    def _linear(self, name: str, rows: Tensor, groups: list[Group], out: Tensor | None) -> Tensor:
        weight = self._views[name]  # [S, N, K], or [S, K, N] when transposed
        transposed = self._module.is_transposed
        rows = rows.to(weight.dtype)
        if out is None:
            shape = (len(rows), weight.shape[2 if transposed else 1])
            out = rows.new_zeros(shape)
        bias = self._views[f"{name}_bias"] if self._module.has_bias else None
        for start, end, slot in groups:
            matrix = weight[slot] if transposed else weight[slot].t()
            torch.mm(rows[start:end], matrix, out=out[start:end])
            if bias is not None:
                out[start:end] += bias[slot]
        return out
