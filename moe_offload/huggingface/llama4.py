"""Llama 4, taught the common experts interface.

transformers' Llama4TextMoe runs every expert on every token: it repeats the tokens once per expert
and scales them by the router's score, which is 0 where an expert was not chosen. Taught, the block
hands its experts the rows of the chosen ones only, scaled by the same numbers, and the experts take
(rows, ids, weights) like those of other families, so everything else here treats them alike. What
is left out are products with rows of zeros. Both are class swaps, undone by `unteach`.
"""

from __future__ import annotations

import functools
from typing import Any

import torch
from torch import Tensor, nn
from transformers.integrations.moe import ALL_EXPERTS_FUNCTIONS, _default_apply_gate

_ORIGINAL = "_moe_offload_untaught"


def teach(model: nn.Module) -> bool:
    """Swap the classes of Llama 4's MoE blocks and experts; True when there were any to swap."""
    blocks: list[Any] = [module for module in model.modules() if _is_block(type(module))]
    for block in blocks:
        block.experts.__class__ = _taught_experts(block.experts.__class__)
        block.__class__ = _taught_block(block.__class__)
    return bool(blocks)


def unteach(model: nn.Module) -> None:
    """Give every module its own class back."""
    for module in model.modules():
        original = vars(type(module)).get(_ORIGINAL)
        if original is not None:
            module.__class__ = original
            vars(module).pop("implementation", None)


def set_implementation(model: nn.Module, name: str) -> None:
    """Who computes taught experts that are resident: a name in transformers' table.

    `set_experts_implementation` does not reach them: it goes by the model's source code.
    """
    for module in model.modules():
        if hasattr(type(module), "implementation") and _ORIGINAL in vars(type(module)):
            object.__setattr__(module, "implementation", name)


def _is_block(cls: Any) -> bool:
    return cls.__name__ == "Llama4TextMoe" and _ORIGINAL not in vars(cls)


@functools.cache
def _taught_block(cls: Any) -> Any:
    return _subclass(cls, forward=_block_forward)


@functools.cache
def _taught_experts(cls: Any) -> Any:
    return _subclass(
        cls,
        forward=_experts_forward,
        _apply_gate=_default_apply_gate,
        has_gate=True,
        has_bias=False,
        is_transposed=True,
        is_concatenated=True,
        implementation="moe_offload",
    )


def _subclass(cls: Any, **body: Any) -> Any:
    names = {"__module__": cls.__module__, "__qualname__": cls.__qualname__, "__doc__": cls.__doc__}
    return type(cls.__name__, (cls,), {**names, _ORIGINAL: cls, **body})


def _experts_forward(
    self: Any, hidden_states: Tensor, top_k_index: Tensor, top_k_weights: Tensor
) -> Tensor:
    compute = ALL_EXPERTS_FUNCTIONS[self.implementation]
    return compute(self, hidden_states, top_k_index, top_k_weights)


def _block_forward(self: Any, hidden_states: Tensor) -> tuple[Tensor, Tensor]:
    hidden = hidden_states.reshape(-1, self.hidden_dim)  # [T, H]
    scores, logits = self.router(hidden)  # both [T, E]
    weights, ids = scores.topk(self.top_k, dim=1)  # both [T, A]
    rows = (hidden.unsqueeze(1) * weights.unsqueeze(2)).reshape(-1, self.hidden_dim)  # [T * A, H]
    routed = self.experts(rows, ids.reshape(-1, 1), torch.ones_like(rows[:, :1]))
    out = self.shared_expert(hidden)
    out.add_(routed.view(*ids.shape, -1).sum(dim=1))
    return out, logits
