"""A model's RMSNorm layers as one native call each.

Written in PyTorch, as transformers' models do, the norm of one token is eight operations of a few
thousand numbers: some 50 to 100 us on two Zen 3 cores, up to four times a layer. Native it is one
call.

Which class computes what is read from its source: the `forward` of some sixty RMSNorm classes
among transformers 5.17's MoE models is one of the three texts below, and what is no such text keeps
its own. As with linear layers (dense.py) only the class of a module is swapped.
"""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any, ClassVar

import torch
from torch import Tensor, nn

from moe_offload.backends.native import DTYPES, dense_kernels
from moe_offload.class_swap import StandIn, stand_in, swap_classes
from moe_offload.source_text import statements


def rms_norm(
    x: Tensor,
    weight: Tensor,
    epsilon: float,
    *,
    weight_offset: float = 0.0,
    rounds_before_weight: bool = True,
) -> Tensor:
    """x / sqrt(mean(x^2) + epsilon) * (weight + weight_offset) over the last dimension.

    Args:
        x: [..., N]; float32, bfloat16 or float16, on the CPU.
        weight: [N], x's dtype, contiguous.
        epsilon: added to the mean of squares.
        weight_offset: added to the weight in float32.
        rounds_before_weight: round to the dtype before the product with the weight, as Llama and
            most others do, not only after it, as gpt-oss and Gemma do.

    Returns:
        [..., N] in x's dtype; computed in float32. Bits depend on the instruction set and the
        dtype.

    Raises:
        ValueError: another device, dtype or shape.

    Source: Zhang and Sennrich, "Root Mean Square Layer Normalization" (arXiv 1910.07467).
    """
    if not _fits(x, weight):
        raise ValueError(
            "rms_norm: expected x [..., N] and a contiguous weight [N] on the CPU, both float32, "
            f"bfloat16 or float16, got x {list(x.shape)} {x.dtype} on {x.device} and weight "
            f"{list(weight.shape)} {weight.dtype} on {weight.device}"
        )
    return _rms_norm(x, weight, epsilon, weight_offset, rounds_before_weight)


def _rms_norm(
    x: Tensor, weight: Tensor, epsilon: float, weight_offset: float, rounds_before_weight: bool
) -> Tensor:
    x = x.contiguous()
    y = torch.empty_like(x)
    size = x.shape[-1]
    dense_kernels(x.dtype).rms_norm(
        x.data_ptr(),
        x.numel() // size,
        size,
        weight.data_ptr(),
        epsilon,
        weight_offset,
        rounds_before_weight,
        y.data_ptr(),
        torch.get_num_threads(),
    )
    return y


def use_native_norms(model: nn.Module) -> Callable[[], None]:
    """Let RMSNorm layers that are recognised be computed here; returns what takes that back."""
    return swap_classes(model, _native_class)


class NativeNorm(StandIn):
    """In front of a model's own norm class, by `_native_class`."""

    epsilon_name: ClassVar[str]
    weight_offset: ClassVar[float]
    rounds_before_weight: ClassVar[bool]
    weight: Tensor

    def forward(self, *args: Tensor, **named: Tensor) -> Tensor:
        (x,) = (*args, *named.values())  # models name it differently
        module: Any = self
        weight = module.weight
        if (
            type(x) is not Tensor
            or not _fits(x, weight)
            or torch.compiler.is_compiling()
            or (torch.is_grad_enabled() and (x.requires_grad or weight.requires_grad))
        ):
            own: Tensor = module.own.forward(self, x)
            return own
        epsilon = getattr(module, self.epsilon_name)
        return _rms_norm(x, weight, epsilon, self.weight_offset, self.rounds_before_weight)


def _fits(x: Tensor, weight: Tensor) -> bool:
    return (
        x.dtype in DTYPES
        and weight.dtype == x.dtype
        and x.is_cpu
        and weight.is_cpu
        and x.shape[-1:] == weight.shape
        and weight.is_contiguous()
        and x.numel() > 0
    )


# --- which classes are such norms ----------------------------------------------------------------

_SCALED = """
input_dtype = hidden_states.dtype
hidden_states = hidden_states.to(torch.float32)
variance = hidden_states.pow(2).mean(-1, keepdim=True)
hidden_states = hidden_states * torch.rsqrt(variance + self.variance_epsilon)
"""
# Text of `forward` (and of `_norm`), the attribute with epsilon, rounds before weight, its offset.
_FORMS: list[tuple[dict[str, str], str, bool, float]] = [
    (  # Llama's, as 52 of the classes have it
        {"forward": f"{_SCALED}return self.weight * hidden_states.to(input_dtype)"},
        *("variance_epsilon", True, 0.0),
    ),
    (  # gpt-oss
        {"forward": f"{_SCALED}return (self.weight * hidden_states).to(input_dtype)"},
        *("variance_epsilon", False, 0.0),
    ),
    (  # Gemma's, in Qwen3-Next, Qwen3.5, MiniMax-M3
        {
            "forward": "output = self._norm(x.float())\n"
            "output = output * (1.0 + self.weight.float())\n"
            "return output.type_as(x)",
            "_norm": "return x * torch.rsqrt(x.pow(2).mean(-1, keepdim=True) + self.eps)",
        },
        *("eps", False, 1.0),
    ),
]


@functools.cache
def _native_class(norm: type) -> type | None:
    """The class that computes this one natively; None where its forward is not known."""
    if not issubclass(norm, nn.Module) or "Norm" not in norm.__name__:
        return None
    for texts, epsilon_name, rounds_before_weight, weight_offset in _FORMS:
        if all(
            statements(getattr(norm, name, None)) == text.strip() for name, text in texts.items()
        ):
            return stand_in(
                *(NativeNorm, norm, _native_class),
                epsilon_name=epsilon_name,
                rounds_before_weight=rounds_before_weight,
                weight_offset=weight_offset,
            )
    return None
