"""One MoE layer over paged experts: the order of events, and plain nn.Modules that use it.

    sort rows by expert -> acquire the working set -> compute what is here while the rest
    arrives -> combine in a fixed order

The arithmetic is transformers' `grouped_mm` experts forward, operation by operation, with one
matrix product per expert on the CPU (which is what torch's grouped_mm does there). An expert's rows
are always computed together and rows never meet before the combine, so the result does not depend
on which pages were resident, in which order the others came, or how many slots there are.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from moe_offload.config import OffloadConfig
from moe_offload.errors import StateError
from moe_offload.offloader import ExpertLayer, Offloader
from moe_offload.pager import PagedLayer
from moe_offload.sources import TensorPages


def run_experts(
    handle: PagedLayer,
    module: Any,
    hidden_states: Tensor,
    top_k_index: Tensor,
    top_k_weights: Tensor,
) -> Tensor:
    """Apply the routed experts of one layer, paging them in as needed.

    Args:
        handle: where the layer's experts live.
        module: supplies `has_gate`, `has_bias`, `is_transposed`, and `_apply_gate` or `act_fn`,
            as transformers' experts modules do.
        hidden_states: [T, H], floating point, CPU.
        top_k_index: [T, A], integer expert ids; ids outside [0, E) contribute nothing (that is
            how expert parallelism marks "not mine").
        top_k_weights: [T, A], floating point, may be wider than hidden_states.

    Returns:
        [T, H] in the dtype of hidden_states. Blocks the host until computed.

    Raises:
        PageReadError: an expert could not be read; the pager stays usable.
        StateError: module in training mode, pager closed, or a forked child.

    Cost: T * A * 6 * H * F FLOPs for gated experts; every distinct missing page moves once.
    """
    if module.training:
        raise StateError(
            f"{handle.name}: offloaded experts are for inference; call model.eval() first"
        )
    if torch.is_grad_enabled() and (hidden_states.requires_grad or top_k_weights.requires_grad):
        args = (hidden_states, top_k_weights, handle, module, top_k_index)
        out: Tensor = _InferenceOnly.apply(*args)
        return out
    with torch.no_grad():
        return _run(handle, module, hidden_states, top_k_index, top_k_weights)


class _InferenceOnly(torch.autograd.Function):
    """Lets a forward with gradients enabled through; a backward would be silently wrong."""

    @staticmethod
    def forward(
        ctx: Any, hidden: Tensor, weights: Tensor, handle: PagedLayer, module: Any, index: Tensor
    ) -> Tensor:
        ctx.layer_name = handle.name
        return _run(handle, module, hidden, index, weights)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> Any:
        raise StateError(
            f"{ctx.layer_name}: no gradient flows through offloaded experts. Wrap the call in "
            "torch.no_grad(), or restore() the model to train it."
        )


def _run(
    handle: PagedLayer, module: Any, hidden: Tensor, top_k_index: Tensor, top_k_weights: Tensor
) -> Tensor:
    num_tokens, top_k = top_k_index.shape
    sorted_ids, perm = torch.sort(top_k_index.reshape(-1))  # [R], R = T * A
    rows = hidden[perm // top_k]  # [R, H]
    ids, counts = torch.unique_consecutive(sorted_ids, return_counts=True)
    experts: list[int] = ids.tolist()
    ends: list[int] = torch.cumsum(counts, 0).tolist()
    starts = [0, *ends[:-1]]
    routed = [i for i, expert in enumerate(experts) if 0 <= expert < handle.num_experts]

    with handle.pool.pager.acquire(handle.layer, [experts[i] for i in routed]) as ticket:
        ffn = _ExpertFfn(module, handle.pool.views, rows)  # no resize while a ticket is open
        while ready := ticket.next():
            ffn.compute([(starts[routed[i]], ends[routed[i]], slot) for i, slot in ready])
            ticket.release([i for i, _ in ready])
    out = ffn.out
    if out is None:  # no token was routed to any of our experts
        return torch.zeros_like(hidden)

    out = out * top_k_weights.reshape(-1)[perm].unsqueeze(-1)
    inverse = torch.empty_like(perm)
    inverse[perm] = torch.arange(perm.shape[0], device=perm.device)
    out = out[inverse].view(num_tokens, top_k, -1).sum(dim=1)  # fixed order: rank of the choice
    return out.to(hidden.dtype)


Group = tuple[int, int, int]  # first row, end row, slot


# Up to this many elements the activation is applied to all rows at once, see _ExpertFfn. Each
# arrival then repeats it: 0.1 ms at most, against milliseconds for reading an expert's weights.
_WHOLE_ACTIVATION_ELEMENTS = 128 * 1024


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


_ACTIVATIONS: dict[str, Callable[[Tensor], Tensor]] = {
    "silu": nn.functional.silu,
    "gelu": nn.functional.gelu,
    "gelu_tanh": lambda x: nn.functional.gelu(x, approximate="tanh"),
    "relu": nn.functional.relu,
    "relu2": lambda x: nn.functional.relu(x).square(),
}


class OffloadedExperts(nn.Module):
    """The routed experts of one layer, paged; for models that are not from transformers.

    Args:
        weights: `{"gate_up_proj": [E, 2F, H], "down_proj": [E, H, F]}`, rows gate then up; or
            `{"up_proj": [E, F, H], "down_proj": [E, H, F]}` for experts without a gate; with
            `*_bias` entries [E, N] if there are any. Kept alive and read, never changed.
        activation: "silu", "gelu", "gelu_tanh", "relu", "relu2", or a function of a tensor.
        **options: see `OffloadConfig`; `device_budget` above all.

    Raises:
        ValueError: shapes that do not fit together, or an unknown activation.
        BudgetError: see `Offloader`.

    Example:
        >>> experts = OffloadedExperts({"gate_up_proj": gu, "down_proj": dn}, device_budget="25%")
        >>> out = experts(hidden, topk_ids, topk_weights)          # [T, H]
    """

    def __init__(
        self,
        weights: Mapping[str, Tensor],
        *,
        activation: str | Callable[[Tensor], Tensor] = "silu",
        **options: Any,
    ) -> None:
        super().__init__()
        self._configure(weights, activation)
        layer = _as_layer(weights, "experts")
        pages = TensorPages()
        pages.add_layer(0, weights)
        self.offloader = Offloader([layer], pages, OffloadConfig.from_options(**options))
        self._handle = self.offloader.handle(0)
        self.eval()

    @classmethod
    def for_layers(
        cls,
        layers: Sequence[Mapping[str, Tensor]],
        *,
        activation: str | Callable[[Tensor], Tensor] = "silu",
        **options: Any,
    ) -> list[OffloadedExperts]:
        """Several layers that share one pool of slots; one module per layer, one offloader."""
        pages = TensorPages()
        described = []
        for index, weights in enumerate(layers):
            described.append(_as_layer(weights, f"layers.{index}.experts"))
            pages.add_layer(index, weights)
        offloader = Offloader(described, pages, OffloadConfig.from_options(**options))
        modules = []
        for index, weights in enumerate(layers):
            module = cls.__new__(cls)
            nn.Module.__init__(module)
            module._configure(weights, activation)
            module.offloader = offloader
            module._handle = offloader.handle(index)
            modules.append(module.eval())
        return modules

    def _configure(
        self, weights: Mapping[str, Tensor], activation: str | Callable[[Tensor], Tensor]
    ) -> None:
        if isinstance(activation, str):
            if activation not in _ACTIVATIONS:
                known = ", ".join(_ACTIVATIONS)
                raise ValueError(f"activation: expected one of {known}, got {activation!r}")
            activation = _ACTIVATIONS[activation]
        self.act_fn = activation
        self.has_gate = "gate_up_proj" in weights
        self.has_bias = "down_proj_bias" in weights
        self.is_transposed = False

    def _apply_gate(self, gate_up: Tensor) -> Tensor:
        gate, up = gate_up.chunk(2, dim=-1)
        return self.act_fn(gate) * up

    def forward(self, hidden: Tensor, topk_ids: Tensor, topk_weights: Tensor) -> Tensor:
        """[T, H], [T, A] ids, [T, A] weights -> [T, H]; see `run_experts`."""
        return run_experts(self._handle, self, hidden, topk_ids, topk_weights)


class OffloadedMoE(nn.Module):
    """A router and paged experts as one block, [..., H] -> [..., H].

    Args:
        router: called with [T, H]; returns either logits [T, E], or a tuple that holds ids
            [T, A] (integer) and weights [T, A] last, as `(ids, weights)`.
        experts: an `OffloadedExperts`.
        top_k: A, needed when the router returns logits: softmax over all experts, then the A
            largest (Mixtral, arXiv 2401.04088), renormalised if `normalize`.
        normalize: make each token's weights sum to one.
    """

    def __init__(
        self,
        router: nn.Module,
        experts: OffloadedExperts,
        *,
        top_k: int | None = None,
        normalize: bool = True,
    ) -> None:
        super().__init__()
        self.router, self.experts = router, experts
        self.top_k, self.normalize = top_k, normalize
        self.eval()

    def forward(self, hidden: Tensor) -> Tensor:
        tokens = hidden.reshape(-1, hidden.shape[-1])  # [T, H]
        routed = self.router(tokens)
        if isinstance(routed, Tensor):
            if self.top_k is None:
                raise ValueError("OffloadedMoE: the router returned logits; give top_k")
            scores = routed.softmax(dim=-1, dtype=torch.float32)
            weights, ids = scores.topk(self.top_k, dim=-1)
            if self.normalize:
                weights = weights / weights.sum(dim=-1, keepdim=True)
        else:
            ids, weights = routed[-2:]
        return self.experts(tokens, ids, weights).view(hidden.shape)


def _as_layer(weights: Mapping[str, Tensor], name: str) -> ExpertLayer:
    up = "gate_up_proj" if "gate_up_proj" in weights else "up_proj"
    allowed = {up, "down_proj", f"{up}_bias", "down_proj_bias"}
    if up not in weights or "down_proj" not in weights or not set(weights) <= allowed:
        raise ValueError(
            "OffloadedExperts: expected gate_up_proj or up_proj, and down_proj (and their _bias), "
            f"got {sorted(weights)}"
        )
    num_experts, inner, hidden = weights[up].shape
    inner = inner // 2 if up == "gate_up_proj" else inner
    expected = {up: weights[up].shape, "down_proj": (num_experts, hidden, inner)}
    for suffix in (up, "down_proj"):
        if f"{suffix}_bias" in weights:
            expected[f"{suffix}_bias"] = tuple(expected[suffix][:2])
    if (f"{up}_bias" in weights) != ("down_proj_bias" in weights):
        raise ValueError("OffloadedExperts: give biases for both projections or for neither")
    for key, tensor in weights.items():
        if tuple(tensor.shape) != tuple(expected[key]):
            raise ValueError(
                f"OffloadedExperts: {key} must be {tuple(expected[key])} to fit "
                f"{up} {tuple(weights[up].shape)}, got {tuple(tensor.shape)}"
            )
    tensors = {key: (tuple(t.shape[1:]), t.dtype) for key, t in weights.items()}
    return ExpertLayer(name, None, num_experts, tensors)
