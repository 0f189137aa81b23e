"""plan: what it predicts from headers and config is what a loaded model then has, byte for byte."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from safetensors import safe_open
from tiny_models import FAMILIES, tiny_model
from transformers import DynamicCache, PreTrainedModel

import moe_offload
from moe_offload import planning
from moe_offload.errors import BudgetError, CheckpointError, UnsupportedModelError
from moe_offload.planning import Plan
from moe_offload.safetensors_file import Checkpoint


@pytest.fixture
def model() -> PreTrainedModel:
    return tiny_model("qwen3_moe")


@pytest.fixture
def checkpoint(model: PreTrainedModel, tmp_path: Path) -> Path:
    model.save_pretrained(tmp_path / "qwen")
    return tmp_path / "qwen"


def bytes_in_files(folder: Path, expert_names: tuple[str, ...]) -> int:
    total = 0
    for file in folder.glob("*.safetensors"):
        with safe_open(file, "pt") as tensors:
            names = [n for n in tensors.keys() if any(e in n for e in expert_names)]  # noqa: SIM118
            total += sum(tensors.get_tensor(name).nbytes for name in names)
    return total


EXPERTS = (".experts.", ".input_linear.", ".output_linear.")  # the latter two: granitemoe


def cache_bytes(model: PreTrainedModel) -> int:
    cache = DynamicCache(config=model.config)
    model(torch.tensor([[5]]), past_key_values=cache, use_cache=True)
    return sum(layer.keys.nbytes + layer.values.nbytes for layer in cache.layers)


@pytest.mark.parametrize("family", FAMILIES, ids=lambda family: family.name)
@torch.no_grad()
def test_prediction_is_what_loading_gives(family, tmp_path: Path) -> None:
    resident = tiny_model(family.name, dtype=torch.bfloat16)
    resident.save_pretrained(tmp_path)
    plan = planning.plan(tmp_path, "60%")

    loaded = moe_offload.from_pretrained(tmp_path, device_budget="60%")
    with moe_offload.get_offloader(loaded) as offloader:
        stats = offloader.stats()
        dense = [*loaded.parameters(), *loaded.buffers()]
        assert plan.dense_bytes == sum(t.nbytes for t in dense)
        assert plan.num_slots == stats["num_slots"]
        assert plan.num_pages == stats["num_pages"]
        assert plan.num_layers == len(stats["per_layer"])
        assert plan.slots_bytes == stats["device_budget_bytes"]
        assert plan.expert_bytes == stats["total_expert_bytes"]
        assert plan.smallest_budget_bytes == offloader.smallest_budget_bytes
    assert plan.kv_cache_bytes_per_token == cache_bytes(resident)
    assert plan.expert_disk_bytes == bytes_in_files(tmp_path, EXPERTS)
    assert plan.architecture == family.name
    assert plan.experts_per_token == 2
    assert plan.context_length == 128


def test_disk_bytes_count_experts_only(checkpoint: Path) -> None:
    plan = planning.plan(checkpoint)
    assert plan.source == "files"
    assert 0 < plan.expert_disk_bytes == bytes_in_files(checkpoint, EXPERTS)
    assert plan.expert_disk_bytes < bytes_in_files(checkpoint, ("",))


def test_no_weight_is_read(checkpoint: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def read(*_: object, **__: object) -> None:
        raise AssertionError("plan read a tensor")

    monkeypatch.setattr(Checkpoint, "_read_into", read)
    assert planning.plan(checkpoint).num_pages == 16


def test_smallest_budget_works_and_one_byte_less_does_not(checkpoint: Path) -> None:
    smallest = planning.plan(checkpoint).smallest_budget_bytes
    assert planning.plan(checkpoint, smallest).num_slots == 2
    with pytest.raises(BudgetError, match=f"at least {smallest} bytes"):
        planning.plan(checkpoint, smallest - 1)


@pytest.mark.parametrize("budget", ["banana", "0%", "101%", -1, 0])
def test_malformed_budget(checkpoint: Path, budget: int | str) -> None:
    with pytest.raises(BudgetError):
        planning.plan(checkpoint, budget)


def test_live_model_and_offloaded_model(model: PreTrainedModel, checkpoint: Path) -> None:
    from_files = planning.plan(checkpoint, "50%")
    live = planning.plan(model, "50%")
    assert live.source == "host memory"
    assert live.expert_disk_bytes is None
    offloader = moe_offload.offload(model, device_budget="25%")
    for plan in (live, planning.plan(model, "50%")):
        assert plan.num_slots == from_files.num_slots == 8
        assert plan.dense_bytes == from_files.dense_bytes
        assert plan.kv_cache_bytes_per_token == from_files.kv_cache_bytes_per_token
        assert "in host memory too" in str(plan)
    assert offloader.stats()["num_slots"] == 4, "planning changed the model's own budget"
    offloader.restore()


def test_a_live_model_that_was_cast(model: PreTrainedModel) -> None:
    """Its config still says float32: sizes follow the model, and the config stays as it was."""
    fp32 = planning.plan(model)
    model.bfloat16()
    model.config.dtype = torch.float32
    bf16 = planning.plan(model)
    assert bf16.kv_cache_bytes_per_token * 2 == fp32.kv_cache_bytes_per_token
    assert bf16.pools[0].page_bytes * 2 == fp32.pools[0].page_bytes
    assert model.config.dtype == torch.float32


def test_files_that_are_not_here(checkpoint: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A hub id whose weights were never downloaded: only the config is known."""
    monkeypatch.setattr(planning, "_open_checkpoint", lambda path: None)
    plan = planning.plan(checkpoint)
    assert (plan.source, plan.expert_disk_bytes, plan.num_pages) == ("unknown", None, 16)
    assert "size on disk unknown" in str(plan)


def test_two_layouts_are_two_pools() -> None:
    """No tested family has two; this is what the table says if one comes."""
    pools = (
        planning.PoolPlan(1, 8, 4, 1000, 4096),
        planning.PoolPlan(2, 16, 6, 5000, 8192),
    )
    plan = Plan(
        *("m", "odd", "50%", 1, pools, 2, 10, 100, "files", 90, 8, None, None),
    )
    assert (plan.num_layers, plan.num_pages, plan.num_slots) == (3, 24, 10)
    assert plan.slots_bytes == 4 * 4096 + 6 * 8192
    assert plan.bytes_per_token == 2 * 1000 + 2 * 2 * 5000
    assert "8 experts of 1000 B in 1 layers and 16 experts of 4.9 KiB in 2 layers" in str(plan)


def test_table_and_json(checkpoint: Path) -> None:
    plan = planning.plan(checkpoint, "50%")
    text = str(plan)
    assert "8 slots, 50.0% of the experts, 4.0 per layer" in text
    assert f"--device-budget {plan.smallest_budget_bytes}" in text
    plain = json.loads(json.dumps(plan.as_dict()))
    assert plain["num_slots"] == 8
    assert plain["pools"][0]["page_bytes"] == 3 * 32 * 16 * 4  # gate, up, down; H 32, F 16, fp32


def test_a_dense_model_is_refused(tmp_path: Path) -> None:
    from transformers import LlamaConfig, LlamaForCausalLM

    config = LlamaConfig(
        vocab_size=64,
        hidden_size=16,
        intermediate_size=16,
        num_hidden_layers=1,
        num_attention_heads=2,
    )
    LlamaForCausalLM(config).save_pretrained(tmp_path)
    with pytest.raises(UnsupportedModelError, match="no routed experts"):
        planning.plan(tmp_path)


def test_missing_folder(tmp_path: Path) -> None:
    with pytest.raises(CheckpointError, match="no such folder"):
        planning.plan(tmp_path / "nothing")


def test_the_package_function_stays_a_function(checkpoint: Path) -> None:
    """A submodule named plan would replace the function at the first import."""
    for _ in range(2):
        assert isinstance(moe_offload.plan(checkpoint), Plan)
