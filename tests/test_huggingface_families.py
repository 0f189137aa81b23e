"""Each family, offloaded, equals its resident self: logits bit for bit, tokens one by one.

Resident means the same kernels on the model's own parameters. Each case runs a live model and the
same model from a checkpoint on disk, at the smallest budget (two slots), at 25 % and at 100 %.
"""

from __future__ import annotations

import functools
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import pytest
import torch
from tiny_models import FAMILIES, NUM_EXPERTS, experts_modules, prompt_ids, tiny_model
from torch import Tensor

import moe_offload
from moe_offload.huggingface.adapters import find_expert_layers

DTYPES = [torch.float32, torch.bfloat16]
BUDGETS = ["smallest", "25%", "100%"]
NEW_TOKENS = 6


@dataclass
class Resident:
    """What the resident model says, and where its checkpoint lies."""

    family: str
    dtype: torch.dtype
    folder: Path
    prompt: Tensor
    logits: Tensor
    tokens: Tensor


@pytest.fixture(scope="module")
def resident(tmp_path_factory: pytest.TempPathFactory) -> Iterator[object]:
    @functools.cache
    def make(name: str, dtype: torch.dtype) -> Resident:
        model = tiny_model(name, dtype)
        folder = tmp_path_factory.mktemp(name)
        model.save_pretrained(folder)
        prompt = prompt_ids(batch=2)
        return Resident(name, dtype, folder, prompt, logits(model, prompt), tokens(model, prompt))

    return make


def logits(model: object, prompt: Tensor) -> Tensor:
    with torch.no_grad():
        return model(prompt).logits


def tokens(model: object, prompt: Tensor) -> Tensor:
    return model.generate(prompt, max_new_tokens=NEW_TOKENS, do_sample=False)


def check_at_budgets(model: object, expected: Resident) -> None:
    offloader = moe_offload.get_offloader(model)
    for budget in BUDGETS:
        offloader.resize(offloader.smallest_budget_bytes if budget == "smallest" else budget)
        offloader.reset_stats()
        got = logits(model, expected.prompt)
        assert torch.equal(got, expected.logits), f"{budget}: logits differ"
        assert torch.equal(tokens(model, expected.prompt), expected.tokens), f"{budget}: tokens"
        stats = offloader.stats()
        assert stats["lookups"] > 0, "the experts were not paged at all"
        if budget == "smallest":
            assert stats["num_slots"] == 2
            assert stats["evictions"] > 0
        if budget == "100%":
            assert stats["demand_misses"] == 0, "a full fill leaves nothing to miss"


CASES = [
    pytest.param(entry.name, dtype, id=f"{entry.name}-{str(dtype)[6:]}")
    for entry in FAMILIES
    for dtype in DTYPES
]


@pytest.mark.parametrize(("name", "dtype"), CASES)
def test_live_model_equals_resident(name: str, dtype: torch.dtype, resident: object) -> None:
    expected = resident(name, dtype)
    model = tiny_model(name, dtype)
    offloader = moe_offload.offload(model, device_budget="25%")
    check_at_budgets(model, expected)
    offloader.restore()
    assert torch.equal(logits(model, expected.prompt), expected.logits)


@pytest.mark.parametrize("entry", FAMILIES, ids=lambda entry: entry.name)
def test_who_computes_the_experts_is_known_and_reported(entry: object) -> None:
    model = tiny_model(entry.name)
    with moe_offload.offload(model, device_budget="50%") as offloader:
        stats = offloader.stats()
    reasons = {row["passed_over"] for row in stats["per_layer"]}
    assert stats["expert_backend"] == "native"
    assert reasons == {None}


@pytest.mark.parametrize("entry", FAMILIES, ids=lambda entry: entry.name)
def test_with_grouped_mm_it_equals_transformers_own_experts(entry: object) -> None:
    model = tiny_model(entry.name, torch.bfloat16, implementation="grouped_mm")
    prompt = prompt_ids(batch=2)
    expected = logits(model, prompt)
    with moe_offload.offload(model, device_budget="30%", expert_backend="grouped_mm"):
        assert torch.equal(logits(model, prompt), expected)


@pytest.mark.parametrize(("name", "dtype"), CASES)
def test_checkpoint_model_equals_resident(name: str, dtype: torch.dtype, resident: object) -> None:
    expected = resident(name, dtype)
    model = moe_offload.from_pretrained(expected.folder, device_budget="25%")
    model.generation_config.eos_token_id = None
    assert not model.training
    assert type(model) is type(tiny_model(name, dtype))
    assert model.dtype == dtype
    check_at_budgets(model, expected)
    stats = moe_offload.get_offloader(model).stats()
    assert stats["io_mode"] in ("direct", "buffered", "mixed"), "expected verbatim file reads"


@pytest.mark.parametrize("entry", FAMILIES, ids=lambda entry: entry.name)
def test_experts_are_found_with_their_sizes(entry: object) -> None:
    model = tiny_model(entry.name)
    layers = find_expert_layers(model)
    assert [layer.name for layer in layers] == [name for name, _ in experts_modules(model)]
    assert len(layers) == entry.moe_layers
    for layer in layers:
        assert layer.num_experts == NUM_EXPERTS
        assert tuple(layer.tensors) == entry.sections
        for section, (shape, dtype) in layer.tensors.items():
            parameter = getattr(layer.module, section)
            assert (NUM_EXPERTS, *shape) == tuple(parameter.shape)
            assert dtype == parameter.dtype
