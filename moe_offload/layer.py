"""One MoE layer over paged experts: the order of events, and plain nn.Modules that use it.

    sort rows by expert -> acquire the working set -> compute what is here while the rest
    arrives -> combine in a fixed order

The arithmetic is a backend's (`moe_offload.backends`). An expert's rows are always computed
together and rows never meet before the combine, so the result does not depend on which pages were
resident, in which order the others came, or how many slots there are.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from moe_offload import paged_op as paged_op  # declares the op that torch.compile sees
from moe_offload.activations import ExpertForm
from moe_offload.config import OffloadConfig
from moe_offload.errors import StateError
from moe_offload.expert_layer import ExpertLayer
from moe_offload.offloader import Offloader
from moe_offload.pager import MAX_ROUTED_TOKENS, PagedLayer
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
        handle: where the layer's experts live, and who computes them.
        module: the experts module, asked whether it is in training mode.
        hidden_states: [T, H], floating point, on the device the experts are computed on; so are
            the others.
        top_k_index: [T, A], integer expert ids; ids outside [0, E) contribute nothing (that is
            how expert parallelism marks "not mine").
        top_k_weights: [T, A], floating point, may be wider than hidden_states.

    Returns:
        [T, H] in the dtype of hidden_states. On the CPU it blocks until computed. On CUDA it blocks
        once, until the routed ids have reached the host (and for pages still on disk); the rest
        is enqueued on the current stream.

    Raises:
        PageReadError: an expert could not be read; the pager stays usable.
        StateError: module in training mode, pager closed, a forked child, or CUDA graph capture.
        ValueError: a tensor on another device.

    Cost: T * A * 6 * H * F FLOPs for gated experts; every distinct missing page moves once.
    """
    if module.training:
        raise StateError(
            f"{handle.name}: offloaded experts are for inference; call model.eval() first"
        )
    if torch.compiler.is_compiling():
        return torch.ops.moe_offload.run_experts(
            hidden_states, top_k_index, top_k_weights, handle.key
        )
    return inference_only(
        lambda: run_paged(handle, hidden_states, top_k_index, top_k_weights),
        handle.name,
        hidden_states,
        top_k_weights,
    )


def inference_only(
    compute: Callable[[], Tensor], name: str, hidden: Tensor, weights: Tensor
) -> Tensor:
    """Let a forward with gradients enabled through; a backward, which would be wrong, raises."""
    if torch.is_grad_enabled() and (hidden.requires_grad or weights.requires_grad):
        out: Tensor = _InferenceOnly.apply(hidden, weights, name, compute)
        return out
    with torch.no_grad():
        return compute()


class _InferenceOnly(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any, hidden: Tensor, weights: Tensor, name: str, compute: Callable[[], Tensor]
    ) -> Tensor:
        ctx.layer_name = name
        return compute()

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> Any:
        raise StateError(
            f"{ctx.layer_name}: no gradient flows through these experts. Wrap the call in "
            "torch.no_grad(); to train, restore() the model or use another implementation."
        )


def run_paged(
    handle: PagedLayer, hidden: Tensor, top_k_index: Tensor, top_k_weights: Tensor
) -> Tensor:
    """`run_experts` without its checks of training mode and gradients."""
    assert handle.experts is not None, f"{handle.name} was described without a module"
    device = handle.pool.device
    device.check_call(
        handle.name, hidden_states=hidden, top_k_index=top_k_index, top_k_weights=top_k_weights
    )
    pager = handle.pool.pager
    with device.guard():
        run = handle.experts.start(hidden, top_k_index, top_k_weights)
        weights: list[float] = []
        if pager.uses_weights:
            weights = _router_weights(run.experts, handle.num_experts, top_k_index, top_k_weights)
        routes: list[int] = []
        if pager.uses_routes and 1 < len(hidden) <= MAX_ROUTED_TOKENS:
            routes = top_k_index.reshape(-1).tolist()
        # With a stream, next() delivers pages whose copies that stream was made to wait for, and
        # release() is about what was enqueued: the host does not wait for copies or kernels.
        with pager.acquire(
            handle.layer, run.experts, weights, len(hidden), device.stream(), routes
        ) as ticket:
            if handle.pool.on_acquired is not None:  # prefetches queue up behind these misses
                handle.pool.on_acquired()
            reads_ahead = _next_layer_will_scan(handle, run.experts, len(hidden))
            while ready := ticket.next():
                run.compute(handle.pool, ready)  # no resize while a ticket is open
                ticket.release([index for index, _ in ready])
                if reads_ahead:  # else the disk is idle until the next layer was routed
                    pager.read_ahead(handle.layer + 1)
        return run.finish()


def _next_layer_will_scan(handle: PagedLayer, experts: Sequence[int], num_tokens: int) -> bool:
    """Whether the call wants nearly all experts of the pool's next layer: it does of this one."""
    return (
        handle.pool.reads_ahead
        and num_tokens > 1
        and 8 * len(experts) >= 7 * handle.num_experts
        and handle.layer + 1 < len(handle.pool.num_experts)
    )


def _router_weights(
    experts: Sequence[int], num_experts: int, top_k_index: Tensor, top_k_weights: Tensor
) -> list[float]:
    """Each expert's weight summed over the call's tokens, for the policies that read it."""
    ids = top_k_index.reshape(-1).to(torch.int64)
    ids = torch.where((ids >= 0) & (ids < num_experts), ids, num_experts)
    sums = torch.zeros(num_experts + 1, device=ids.device)
    values: list[float] = sums.index_add_(0, ids, top_k_weights.reshape(-1).float()).tolist()
    return [values[expert] for expert in experts]


class OffloadedExperts(nn.Module):
    """The routed experts of one layer, paged; for models that are not from transformers.

    Args:
        weights: `{"gate_up_proj": [E, 2F, H], "down_proj": [E, H, F]}`, rows gate then up; or
            `{"up_proj": [E, F, H], "down_proj": [E, H, F]}` for experts without a gate; with
            `*_bias` entries [E, N] if there are any. Floating point, contiguous, on the CPU (with
            device="cuda" too). Kept alive and read, never changed.
        activation: "silu", "gelu", "gelu_tanh", "relu", "relu2", or a function of a tensor.
        **options: see `OffloadConfig`; `device_budget` above all.

    Raises:
        ValueError: shapes that do not fit together, a tensor that is not contiguous or elsewhere,
            an unknown activation, or an option's value.
        TypeError: an unknown option.
        BudgetError, DeviceError: see `Offloader`.

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
        layer = _as_layer(weights, "experts", activation)
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
        """Several layers that share one pool of slots; one module per layer, one offloader.

        `layers` holds each one's `weights`; the rest and the errors are as for one layer.
        """
        pages = TensorPages()
        described = []
        for index, weights in enumerate(layers):
            described.append(_as_layer(weights, f"layers.{index}.experts", activation))
            pages.add_layer(index, weights)
        offloader = Offloader(described, pages, OffloadConfig.from_options(**options))
        modules = []
        for index in range(len(layers)):
            module = cls.__new__(cls)
            nn.Module.__init__(module)
            module.offloader = offloader
            module._handle = offloader.handle(index)
            modules.append(module.eval())
        return modules

    def forward(self, hidden: Tensor, topk_ids: Tensor, topk_weights: Tensor) -> Tensor:
        """[T, H] floating point, [T, A] integer ids, [T, A] weights -> [T, H] in hidden's dtype.

        Blocks on the CPU; raises PageReadError, StateError, ValueError: see `run_experts`.
        """
        return run_experts(self._handle, self, hidden, topk_ids, topk_weights)


class OffloadedMoE(nn.Module):
    """A router and paged experts as one block, [..., H] -> [..., H].

    Args:
        router: called with [T, H]; returns either logits [T, E], or a tuple that holds ids
            [T, A] (integer) and weights [T, A] last, as `(ids, weights)`.
        experts: an `OffloadedExperts`.
        top_k: A, needed when the router returns logits: softmax over all experts, then the A
            largest (Mixtral, arXiv 2401.04088), renormalised if `normalize`.
        normalize: make each token's weights sum to one; only of weights computed from logits.

    Raises:
        ValueError: in a forward, when the router returned logits and top_k was not given.
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


def _as_layer(
    weights: Mapping[str, Tensor],
    name: str,
    activation: str | Callable[[Tensor], Tensor] = "silu",
) -> ExpertLayer:
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
    form = ExpertForm.build(activation, up == "gate_up_proj", "down_proj_bias" in weights)
    return ExpertLayer(name, form, num_experts, tensors)
