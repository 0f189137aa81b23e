"""Activations: by name, as formulas, and recognised in a module by what it computes.

A native kernel has its own activations, so it must know which one a module uses. Classes and
attribute names differ between families and say little; a module is asked instead: its activation
is evaluated on a grid of values and compared with each formula below. What agrees with none stays
with a backend that calls the module itself.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Container, Iterable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

ACTIVATIONS: dict[str, Callable[[Tensor], Tensor]] = {
    "silu": nn.functional.silu,
    "gelu": nn.functional.gelu,
    "gelu_tanh": lambda x: nn.functional.gelu(x, approximate="tanh"),
    "relu": nn.functional.relu,
    "relu2": lambda x: nn.functional.relu(x).square(),
}


@dataclass(frozen=True)
class Activation:
    """act(gate) * up with an act of `ACTIVATIONS`, act(up) without a gate, or "clamped_swiglu".

    clamped_swiglu, which needs a gate, is (u + offset) * g * sigmoid(alpha * g) with
    g = min(gate, limit) and u = clamp(up, -limit, limit): gpt-oss (alpha 1.702, offset 1,
    limit 7), DeepSeek-V4 (alpha 1, offset 0).
    """

    name: str
    gated: bool = True
    alpha: float = 1.0
    limit: float = 0.0
    offset: float = 0.0

    def __call__(self, gate: Tensor | None, up: Tensor) -> Tensor:
        """The formula in the dtype of its arguments; `gate` is None without one."""
        if self.name == "clamped_swiglu":
            assert gate is not None, "clamped_swiglu has a gate"
            gate = gate.clamp(max=self.limit)
            up = up.clamp(-self.limit, self.limit)
            return (up + self.offset) * gate * torch.sigmoid(self.alpha * gate)
        act = ACTIVATIONS[self.name]
        return act(up) if gate is None else act(gate) * up


def recognise(module: Any) -> Activation | str:
    """Which activation an experts module applies, or why that cannot be told.

    Args:
        module: with `has_gate`, and `_apply_gate` (taking gate and up as one tensor [..., 2F], in
            halves, or alternating where `is_concatenated` is False) or `act_fn`.
    """
    try:
        with torch.no_grad():
            return _recognise(module)
    except Exception as error:  # a module may do anything; whatever it is, it is the reason
        return f"its activation could not be evaluated ({type(error).__name__}: {error})"


def unsupported(
    module: Any, dtypes: Iterable[torch.dtype], known: Container[torch.dtype]
) -> str | None:
    """Why kernels with activations of their own cannot compute a layer; None when they can.

    Args:
        module: as for `recognise`.
        dtypes: of the layer's parameters.
        known: dtypes the kernels have.
    """
    found = set(dtypes)
    if len(found) > 1:
        return f"its parameters have several dtypes: {sorted(map(str, found))}"
    dtype = found.pop()
    if dtype not in known:
        return f"it has no kernels for {dtype}"
    activation = recognise(module)
    return activation if isinstance(activation, str) else None


def _recognise(module: Any) -> Activation | str:
    if not module.has_gate:
        x = _grid()
        got = module.act_fn(x)
        for name, act in ACTIVATIONS.items():
            if _agree(got, act(x)):
                return Activation(name, gated=False)
        return "its activation is none of " + ", ".join(ACTIVATIONS)
    gate, up = (part.reshape(-1) for part in torch.meshgrid(_grid(), _grid(), indexing="ij"))
    got = _gated(module, gate, up)
    for name in ACTIVATIONS:
        if _agree(got, Activation(name)(gate, up)):
            return Activation(name)
    clamped = _clamped(module)
    if clamped is not None and _agree(got, clamped(gate, up)):
        return clamped
    return "its activation is none of " + ", ".join([*ACTIVATIONS, "clamped_swiglu"])


def _grid() -> Tensor:
    rough = torch.tensor([-100, -20, -9, 9, 20, 100.0])
    return torch.cat([torch.linspace(-3, 3, 25), rough]).double()


def _gated(module: Any, gate: Tensor, up: Tensor) -> Tensor:
    if getattr(module, "is_concatenated", True):
        both = torch.cat([gate, up])
    else:
        both = torch.stack([gate, up], dim=1).reshape(-1)
    return module._apply_gate(both[None])[0]


def _clamped(module: Any) -> Activation | None:
    """The parameters that a clamped_swiglu with this module's values at three points would have."""
    gate, up = torch.tensor([1.0, 1, 1]).double(), torch.tensor([0.0, 1, 1e4]).double()
    zero, one, large = _gated(module, gate, up).tolist()
    slope = one - zero  # sigmoid(alpha)
    if not 0 < slope < 1:
        return None
    offset, alpha = zero / slope, math.log(slope / (1 - slope))
    limit = large / slope - offset
    rounded = [round(value, 6) for value in (alpha, limit, offset)]  # as a config would write it
    return Activation("clamped_swiglu", True, *rounded)


def _agree(got: Tensor, expected: Tensor) -> bool:
    # Some modules compute in fp32 whatever they are given: 1e-7 relative, of values up to 100.
    return got.shape == expected.shape and torch.allclose(
        got.double(), expected, rtol=2e-5, atol=2e-5
    )


@dataclass(frozen=True)
class ExpertForm:
    """What an expert computes, for experts that are not a transformers module.

    It has the attributes of transformers' experts modules that a backend looks at, so every
    backend reads both kinds alike: down(act(gate) * up), or down(act(up)) without a gate.

    Attributes:
        act_fn: elementwise activation.
        has_gate: the first projection has 2F rows, gate then up.
        has_bias: both projections have biases.
    """

    act_fn: Callable[[Tensor], Tensor]
    has_gate: bool
    has_bias: bool
    is_transposed: bool = False
    is_concatenated: bool = True

    @classmethod
    def build(
        cls, activation: str | Callable[[Tensor], Tensor], has_gate: bool, has_bias: bool
    ) -> ExpertForm:
        """Resolve an activation by name; ValueError when it has none of the known names."""
        if isinstance(activation, str):
            if activation not in ACTIVATIONS:
                known = ", ".join(ACTIVATIONS)
                raise ValueError(f"activation: expected one of {known}, got {activation!r}")
            activation = ACTIVATIONS[activation]
        return cls(activation, has_gate, has_bias)

    def _apply_gate(self, gate_up: Tensor) -> Tensor:
        gate, up = gate_up.chunk(2, dim=-1)
        return self.act_fn(gate) * up
