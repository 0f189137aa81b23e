"""Find each layer's router in a transformers model, and ask it about another state.

Families name routers differently and return their parts in any order, so nothing here goes by
name: a router is the one module of a MoE block, outside its experts, with a weight [E, H]. How it
is called is copied from the model's own first call. Whether reading its answer is right is *tested*
on that call: asked about the very input it had, it must give the ids the experts received. A layer
that fails is refused with the reason, it is never guessed at.

The state to ask about is the residual stream, through the norm that stands before the router. That
norm is recognised by its output being the router's input (same memory), not by its name.
"""

from __future__ import annotations

from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from moe_offload import _core
from moe_offload.errors import PredictorError
from moe_offload.huggingface.observe import RoutedLayer


def find_router(layer: RoutedLayer, num_experts: int) -> nn.Module:
    """The router of a MoE layer.

    Raises:
        PredictorError: none or several modules look like it.
    """
    inside = set(layer.experts.modules())
    found = []
    for module in layer.block.modules():
        weight = module._parameters.get("weight")
        if module in inside or weight is None or weight.dim() != 2:
            continue
        if weight.shape[0] == num_experts and weight.shape[1] != num_experts:
            found.append(module)
    if len(found) != 1:
        what = ", ".join(type(module).__name__ for module in found) or "none"
        raise PredictorError(
            f"lookahead: expected one router beside {layer.name} (a module of "
            f"{type(layer.block).__name__} with a weight [{num_experts}, H]), found {what}. Use "
            'predictor="previous" or a trained predictor for this model.'
        )
    return found[0]


def _weight(router: nn.Module) -> Tensor:
    weight = router._parameters["weight"]
    assert weight is not None
    return weight


class RouterProbe:
    """One layer's router: watches the model call it, then answers for other states.

    Args:
        layer: the layer's modules.
        num_experts: E.

    Attributes:
        width: H of its input.
        refused: why this router cannot be asked, or None.
        ready: the first call was seen and agreed.
    """

    def __init__(self, layer: RoutedLayer, num_experts: int) -> None:
        self.name = layer.name
        self.router = find_router(layer, num_experts)
        self.norm: nn.Module | None = None
        self.refused: str | None = None
        self.ready = False
        self._num_experts = num_experts
        self._args: tuple[Any, ...] = ()
        self._kwargs: dict[str, Any] = {}
        self._folded: _FoldedRouter | None = None
        self._ndim = 2  # of the router's input
        self._input_dtype: torch.dtype | None = None
        self._input: Tensor | None = None  # the router's
        self._residual: Tensor | None = None  # the norm's
        self._seen: list[tuple[nn.Module, Tensor, Tensor]] = []  # norm, its input, its output
        self._handles = [
            self.router.register_forward_pre_hook(self._before_router, with_kwargs=True)
        ]
        self._norm_handles = []
        width = self.width = int(_weight(self.router).shape[1])
        inside = {*layer.experts.modules(), self.router}
        for module in layer.decoder_layer.modules():
            own = [p for p in module._parameters.values() if p is not None]
            if module not in inside and own and all(p.shape == (width,) for p in own):
                handle = module.register_forward_hook(self._after_norm, with_kwargs=True)
                self._norm_handles.append(handle)

    def _before_router(self, module: nn.Module, args: tuple, kwargs: dict[str, Any]) -> None:
        if args:
            self._input, self._args, self._kwargs = args[0], args[1:], kwargs
        else:
            name = next(iter(kwargs))
            self._input = kwargs[name]
            self._args, self._kwargs = (), {k: v for k, v in kwargs.items() if k != name}

    def _after_norm(self, module: nn.Module, args: tuple, kwargs: dict, out: Any) -> None:
        given = args[0] if args else next(iter(kwargs.values()), None)
        if isinstance(given, Tensor) and isinstance(out, Tensor):
            self._seen.append((module, given, out))

    def routed(self, topk_ids: Tensor) -> None:
        """The model routed this layer; at the first time, test and settle everything."""
        if self.ready or self.refused is not None:
            return
        if self._input is None:
            self.refused = f"{self.name}: its router was not called through the module"
        elif _takes_tokens([*self._args, *self._kwargs.values()]):
            self.refused = (
                f"{self.name}: {type(self.router).__name__} is given the tokens as well, which are "
                "not known ahead"
            )
        else:
            self._find_norm()
            self._ndim, self._input_dtype = self._input.dim(), self._input.dtype
            answer = self._ask(self._input, topk_ids.shape[1])
            theirs = topk_ids.numpy()
            chosen = np.any(theirs < self._num_experts, axis=-1)  # rows that are not muted
            if not chosen.any():
                self._seen.clear()
                return  # nothing to compare: the next call will tell
            if self.refused is not None:
                pass  # asking raised
            elif answer is None or not _same_choice(answer[1], theirs, chosen):
                self.refused = (
                    f"{self.name}: asked about its own input, {type(self.router).__name__} did not "
                    "give the experts the model chose"
                )
            else:
                self.ready = True
                if self._residual is not None:
                    self._folded = _fold(self.router, self.norm, self._residual, answer[1])
        for handle in self._norm_handles:
            handle.remove()
        self._seen.clear()
        self._norm_handles.clear()

    def _find_norm(self) -> None:
        assert self._input is not None
        for module, given, out in self._seen:
            if _same_numbers(out, self._input):
                self.norm, self._residual = module, given
                self._handles.append(module.register_forward_pre_hook(self._before_norm))

    def _before_norm(self, module: nn.Module, args: tuple) -> None:
        self._residual = args[0] if args else None

    @property
    def state(self) -> tuple[Tensor | None, bool]:
        """What this layer's router last saw: (before its norm, True) or (its input, False)."""
        if self.norm is not None and self._residual is not None:
            return self._residual, True
        return self._input, False

    def ask(self, state: Tensor, before_norm: bool, top_k: int) -> np.ndarray | None:
        """Scores [R, E] of another layer's state, or None where it gives no usable answer.

        The state is passed through this layer's norm when it was taken before one and this layer
        has one. Cost: the norm and one router, 2 x R x H x E FLOPs.
        """
        if before_norm and self._folded is not None:
            return margins(self._folded.logits(state), top_k)
        answer = self._ask(state, top_k, self.norm if before_norm else None)
        return None if answer is None else _scores(*answer)

    def _ask(
        self, state: Tensor, top_k: int, norm: nn.Module | None = None
    ) -> tuple[np.ndarray, np.ndarray] | None:
        """What the router says about a state; None, and `refused`, where it cannot."""
        assert self._input_dtype is not None
        try:  # no hooks: not recorded
            if norm is not None:
                state = norm.forward(state)
            if self._ndim == 2:
                state = state.reshape(-1, state.shape[-1])
            state = state.to(self._input_dtype)
            return self._read(self.router.forward(state, *self._args, **self._kwargs), top_k)
        except Exception as error:  # foreign code, asked out of turn: the model must go on
            self.refused = (
                f"{self.name}: asking {type(self.router).__name__} ahead raised "
                f"{type(error).__name__} ({error})"
            )
            self.ready = False
            return None

    def _read(self, outputs: Any, top_k: int) -> tuple[np.ndarray, np.ndarray] | None:
        """Logits [R, E] and chosen ids [R, A] from what a router returns, in whatever order."""
        parts = [outputs] if isinstance(outputs, Tensor) else list(outputs)
        tensors = [part for part in parts if isinstance(part, Tensor)]
        logits = ids = None
        for tensor in tensors:
            if tensor.is_floating_point() and tensor.shape[-1] == self._num_experts:
                logits = tensor if logits is None else logits
            elif not tensor.is_floating_point() and tensor.shape[-1] == top_k:
                ids = tensor
        if logits is None:
            return None
        flat = logits.reshape(-1, self._num_experts).float()
        if ids is None:
            ids = flat.topk(top_k, dim=-1).indices
        return flat.numpy(), ids.reshape(-1, top_k).numpy()

    def forget(self) -> None:
        """Let go of the activations; for a long prompt they are large."""
        self._input = self._residual = None

    def stop_watching(self) -> None:
        """From now on `state` is (None, False): for who asks about other states than the model's.

        Once the first call has settled everything, and unless the router is given more than its
        input, which is known from the latest call.
        """
        settled = self.ready or self.refused is not None
        if settled and not self._args and not self._kwargs:
            self.close()
            self._handles.clear()
            self.forget()

    def close(self) -> None:
        for handle in [*self._handles, *self._norm_handles]:
            handle.remove()


class _FoldedRouter:
    """An RMS norm and a linear router as one fp32 matrix in numpy.

    The modules themselves take nine torch calls for one token, 135 us here, which is a tenth of a
    small model's layer; this takes 15.
    """

    def __init__(self, scale: np.ndarray, weight: np.ndarray, bias: Any, eps: float) -> None:
        self._matrix = np.ascontiguousarray((weight * scale).T)  # [H, E]
        self._bias, self._eps = bias, eps

    def logits(self, state: Tensor) -> np.ndarray:
        """[..., H] before the norm -> [R, E]."""
        width = state.shape[-1]
        x = state.float().numpy().reshape(-1, width)
        power = np.einsum("rh,rh->r", x, x) / width + self._eps
        logits: np.ndarray = _core.dense(x, self._matrix) * (power**-0.5)[:, None]
        return logits if self._bias is None else logits + self._bias


_FOLD_ELEMENTS = 1 << 18  # at most 1 MiB of fp32 a layer; larger layers take longer than asking


def _fold(
    router: nn.Module, norm: nn.Module | None, state: Tensor, ids: np.ndarray
) -> _FoldedRouter | None:
    """The folded form, if it chooses the same experts for 95 % of these tokens; else None."""
    eps = getattr(norm, "variance_epsilon", getattr(norm, "eps", None))
    weight = _weight(router)
    if norm is None or not isinstance(eps, float) or weight.numel() > _FOLD_ELEMENTS:
        return None
    if set(norm._parameters) != {"weight"} or not set(router._parameters) <= {"weight", "bias"}:
        return None
    bias = router._parameters.get("bias")
    scale = norm._parameters["weight"].float().numpy()  # type: ignore[union-attr]
    sample = state.reshape(-1, state.shape[-1])[:64]
    chosen = np.sort(ids[: len(sample)], -1)
    for factor in (scale, 1 + scale):  # Gemma and Qwen3-Next store the scale minus one
        folded = _FoldedRouter(
            factor, weight.float().numpy(), None if bias is None else bias.float().numpy(), eps
        )
        top = np.argpartition(folded.logits(sample), -ids.shape[1], axis=1)[:, -ids.shape[1] :]
        if (np.sort(top, -1) == chosen).all(-1).mean() >= 0.95:
            return folded
    return None


def _takes_tokens(values: list[Any]) -> bool:
    return any(isinstance(v, Tensor) and not v.is_floating_point() for v in values)


def _same_numbers(out: Tensor, given: Tensor) -> bool:
    """Is this the same tensor, or a copy of it in another dtype?"""
    if out.numel() != given.numel():
        return False
    if out.data_ptr() == given.data_ptr():
        return True
    return out.dtype != given.dtype and torch.equal(
        out.to(given.dtype).reshape(-1), given.reshape(-1)
    )


def _same_choice(mine: np.ndarray, theirs: np.ndarray, rows: Any) -> bool:
    """Did these rows [R] bool choose the same experts [R, A], in whatever order?"""
    return mine.shape == theirs.shape and np.array_equal(
        np.sort(mine[rows], -1), np.sort(theirs[rows], -1)
    )


def _scores(logits: np.ndarray, ids: np.ndarray) -> np.ndarray:
    """[R, E] in [0, 1]: above 1/2 exactly the chosen ids, further by how clearly, see `margins`."""
    top_k = ids.shape[1]
    num_experts = logits.shape[1]
    if top_k >= num_experts:
        return np.ones_like(logits)
    score = margins(logits, top_k)
    chosen = np.zeros_like(score)
    np.put_along_axis(chosen, ids, 0.5, axis=1)
    return 0.5 * score + chosen


def margins(logits: np.ndarray, top_k: int) -> np.ndarray:
    """[R, E] in (0, 1): logistic function of the distance from the border of the A largest."""
    ranked = np.sort(logits, axis=1)
    border = 0.5 * (ranked[:, -top_k] + ranked[:, -top_k - 1])
    score: np.ndarray = 1 / (1 + np.exp(np.minimum(border[:, None] - logits, 80)))
    return score
