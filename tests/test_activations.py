"""Which activation an experts module of transformers applies is found by asking it."""

from __future__ import annotations

import types
from typing import Any

import pytest
import torch
from torch import Tensor

from moe_offload.activations import Activation, recognise


def module(act: Any = None, gate: Any = None, **attributes: Any) -> types.SimpleNamespace:
    found = types.SimpleNamespace(has_gate=gate is not None, act_fn=act, **attributes)
    found._apply_gate = gate
    return found


def halves(act: Any) -> Any:
    return lambda x: act(x.chunk(2, -1)[0]) * x.chunk(2, -1)[1]


@pytest.mark.parametrize("name", ["silu", "gelu", "gelu_pytorch_tanh", "gelu_new", "relu", "relu2"])
def test_transformers_activations_are_recognised(name: str) -> None:
    act = pytest.importorskip("transformers.activations").ACT2FN[name]
    known = {"gelu_pytorch_tanh": "gelu_tanh", "gelu_new": "gelu_tanh"}.get(name, name)
    assert recognise(module(act)) == Activation(known, gated=False)
    assert recognise(module(gate=halves(act))) == Activation(known)


def test_clamped_gates_are_recognised_with_their_numbers() -> None:
    def clamped(alpha: float, limit: float, offset: float, alternate: bool) -> Any:
        def gate(x: Tensor) -> Tensor:
            g, u = (x[..., ::2], x[..., 1::2]) if alternate else x.chunk(2, -1)
            g, u = g.clamp(max=limit), u.clamp(-limit, limit)
            return (u + offset) * (g * torch.sigmoid(g * alpha))

        return module(gate=gate, is_concatenated=not alternate)

    for alternate in (False, True):
        found = recognise(clamped(1.702, 7.0, 1.0, alternate))
        assert found == Activation("clamped_swiglu", True, 1.702, 7.0, 1.0)
    found = recognise(clamped(1.0, 10.0, 0.0, False))
    assert found == Activation("clamped_swiglu", True, 1.0, 10.0, 0.0)


def test_what_is_not_known_is_said() -> None:
    assert "is none of silu" in str(recognise(module(torch.tanh)))
    assert "is none of silu" in str(recognise(module(gate=halves(torch.tanh))))
    clamped_after = lambda x: halves(lambda g: torch.nn.functional.silu(g).clamp(max=7))(x)  # noqa: E731
    assert "is none of" in str(recognise(module(gate=clamped_after)))

    def broken(x: Tensor) -> Tensor:
        raise RuntimeError("needs a GPU")

    assert "could not be evaluated (RuntimeError: needs a GPU)" in str(recognise(module(broken)))
