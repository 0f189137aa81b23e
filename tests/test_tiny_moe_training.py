"""The training twin of the packaged model, in its own shape and in the Switch Transformer's."""

from __future__ import annotations

import importlib
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from types import ModuleType

import pytest
import torch

transformers = pytest.importorskip("transformers")

FOLDER = Path(__file__).resolve().parent.parent / "bench" / "tiny_moe"
ROUTER = "model.layers.{}.mlp.gate.weight"


@pytest.fixture
def tiny_moe(monkeypatch: pytest.MonkeyPatch) -> Iterator[Callable[[str], ModuleType]]:
    """Imports from the folder, whose names (routing, data) other benchmarks' folders have too."""
    names = [path.stem for path in FOLDER.glob("*.py")]
    for name in names:
        monkeypatch.delitem(sys.modules, name, raising=False)
    monkeypatch.syspath_prepend(str(FOLDER))
    yield importlib.import_module
    for name in names:
        sys.modules.pop(name, None)


@pytest.mark.parametrize("top_k", [1, 4])
def test_the_twin_computes_what_transformers_does_and_every_router_learns(
    top_k: int, tiny_moe: Callable[[str], ModuleType]
) -> None:
    twin = tiny_moe("fast_forward")
    config = tiny_moe("train").model_config(64, top_k, inner=16)
    assert config.num_experts_per_tok == top_k
    assert config.moe_intermediate_size == 16
    torch.manual_seed(0)
    model = transformers.Qwen3MoeForCausalLM(config).eval()
    for name, parameter in model.named_parameters():
        if ".mlp." in name:  # experts and routers that count
            torch.nn.init.normal_(parameter, std=0.1)
    ids = torch.randint(0, 64, (2, 24))
    with torch.no_grad():
        expected = model(ids).logits
    weights = {n: p.detach().clone().requires_grad_() for n, p in model.named_parameters()}
    hidden, _ = twin.forward(weights, config, ids, twin.rope_table(config, 24))
    logits = hidden @ weights["model.embed_tokens.weight"].T
    # Angles and routing weights are bfloat16: now and then another expert wins, so the median over
    # tokens counts. It is 0.004 of the largest logit, and 0.8 with a weight of 1 in place of
    # the single expert's probability.
    error = (logits - expected).abs().amax(-1).median() / expected.abs().max()
    assert error < 0.01
    logits.square().mean().backward()
    for layer in range(config.num_hidden_layers):
        assert weights[ROUTER.format(layer)].grad.abs().max() > 0
