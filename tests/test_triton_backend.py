"""The Triton backend behind the same layers: equal to itself bit for bit, close to transformers."""

from __future__ import annotations

import importlib.util
from typing import Any

import pytest
import torch
from experts import random_routing, random_weights, reference
from triton_support import interpreting

from moe_offload import OffloadedExperts, backends, get_offloader, offload
from moe_offload.activations import ExpertForm
from moe_offload.backends.triton import TritonExperts
from moe_offload.errors import UnsupportedModelError

pytestmark = pytest.mark.skipif(
    not interpreting(), reason="slots are in RAM; TRITON_INTERPRET=1 runs the kernels there"
)


@pytest.mark.parametrize("name", ["qwen3_moe", "gpt_oss"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_offloaded_model_equals_resident_model(name: str, dtype: torch.dtype) -> None:
    """All experts in slots, against two slots per layer and copies that come late and reordered."""
    pytest.importorskip("transformers")
    from tiny_models import prompt_ids, tiny_model

    model, ids = tiny_model(name, dtype), prompt_ids(5)
    with torch.no_grad():
        transformers_own = model(ids).logits
        results = []
        for budget in ("100%", "25%"):
            offload(model, device_budget=budget, expert_backend="triton")
            offloader = get_offloader(model)
            assert offloader.stats()["expert_backend"] == "triton"
            if budget != "100%":
                offloader.chaos(seed=1)
            results.append(model(ids).logits)
            offloader.restore()
    assert torch.equal(results[0], results[1])
    # Our kernels round once per projection where transformers rounds after each operation.
    scale = transformers_own.abs().max().item()
    error = (results[0] - transformers_own).abs().max().item()
    assert error <= (1e-5 if dtype == torch.float32 else 0.05) * scale


@pytest.mark.parametrize("activation", ["silu", "relu2", "gelu_tanh"])
@pytest.mark.parametrize("gate", [True, False])
def test_layer_against_fp64(activation: str, gate: bool) -> None:
    weights = random_weights(6, 32, 20, gate=gate, bias=True)
    layer = OffloadedExperts(
        weights, activation=activation, device_budget="50%", expert_backend="triton"
    )
    generator = torch.Generator().manual_seed(0)
    ids, topk = random_routing(9, 6, 3, generator)
    ids[0, 0], ids[3] = 6, 7  # not ours
    hidden = torch.randn(9, 32, generator=generator)
    out = layer(hidden, ids, topk)
    if activation == "silu":
        torch.testing.assert_close(
            out, reference(weights, hidden, ids, topk).float(), rtol=1e-5, atol=1e-5
        )
    own = OffloadedExperts(
        weights, activation=activation, device_budget="50%", expert_backend="grouped_mm"
    )
    torch.testing.assert_close(out, own(hidden, ids, topk), rtol=1e-5, atol=1e-5)
    assert not out[3].any()
    nobody = torch.full_like(ids, 6)
    assert not layer(hidden, nobody, topk).any()
    assert layer(hidden[:0], ids[:0], topk[:0]).shape == (0, 32)


def test_who_may_ask_for_it(monkeypatch: pytest.MonkeyPatch) -> None:
    weights = random_weights(4, 32, 16)
    auto = OffloadedExperts(weights, device_budget="50%")
    assert auto.offloader.stats()["expert_backend"] != "triton"  # an interpreter is no backend
    assert TritonExperts().missing() is None

    class Odd(ExpertForm):
        def _apply_gate(self, gate_up: Any) -> Any:
            return gate_up[..., ::2].sin()

    layout = auto.offloader.handle(0).pool.layout
    odd = Odd(torch.nn.functional.silu, True, False)
    with pytest.raises(UnsupportedModelError, match="its activation is none of silu"):
        backends.choose("triton", odd, layout, "layer 0")

    monkeypatch.setenv("TRITON_INTERPRET", "0")
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    assert "no CUDA device" in str(TritonExperts().missing())
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
    assert "pip install triton" in str(backends.describe()["triton"])
