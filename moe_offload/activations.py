"""Activations by name, and the form of experts that are not a transformers module.

`ExpertForm` has the attributes of transformers' experts modules that a backend looks at, so every
backend reads both kinds alike.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

from torch import Tensor, nn

ACTIVATIONS: dict[str, Callable[[Tensor], Tensor]] = {
    "silu": nn.functional.silu,
    "gelu": nn.functional.gelu,
    "gelu_tanh": lambda x: nn.functional.gelu(x, approximate="tanh"),
    "relu": nn.functional.relu,
    "relu2": lambda x: nn.functional.relu(x).square(),
}


@dataclass(frozen=True)
class ExpertForm:
    """What an expert computes: down(act(gate) * up), or down(act(up)) without a gate.

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
