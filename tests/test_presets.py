"""Presets: the published systems, put together from this package's parts, and all exact."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch

import moe_offload
from moe_offload import _core
from moe_offload.config import OffloadConfig
from moe_offload.errors import PredictorError
from moe_offload.predictors.artefact import save_predictor
from moe_offload.predictors.pregate import PreGates, PreGateShape
from moe_offload.predictors.rpp_model import RppConfig, RppModel
from moe_offload.presets import PRESETS, with_preset
from moe_offload.scheduling import batch_generate
from tests.tiny_models import NUM_EXPERTS, TOP_K, VOCAB, prompt_ids, tiny_model

PROMPTS = [[5, 6, 7], [8, 9], [10], [11, 12, 13, 14], [15], [16, 17]]


def with_predictors(model: Any, folder: Path) -> Any:
    """Give a tiny model untrained predictors of its own, where presets look for them."""
    torch.manual_seed(0)
    gates = PreGates(PreGateShape(2, NUM_EXPERTS, TOP_K, model.config.hidden_size, 4))
    torch.nn.init.normal_(gates.linear)
    shape = vars(gates.shape)
    save_predictor(
        folder / "predictors" / "pregate", "pregate", gates.state_dict(), shape, {}, "a test"
    )
    config = RppConfig(
        vocab_size=VOCAB, num_layers=2, num_experts=NUM_EXPERTS, top_k=TOP_K, d_ff=16
    )
    network = RppModel(config)
    save_predictor(
        folder / "predictors" / "rpp", "rpp", network.state_dict(), vars(config), {}, "a test"
    )
    model.config._name_or_path = str(folder)
    return model


@pytest.mark.parametrize("preset", [name for name in PRESETS if not PRESETS[name].lossy])
@pytest.mark.parametrize("name", ["qwen3_moe", "mixtral", "gpt_oss"])
@pytest.mark.parametrize("budget", ["30%", "75%"])
def test_every_preset_gives_the_resident_models_tokens(
    preset: str, name: str, budget: str, tmp_path: Path
) -> None:
    model = with_predictors(tiny_model(name), tmp_path)
    expected = batch_generate(model, PROMPTS, 3, "fifo", max_new_tokens=8, num_running=2).tokens
    ids = prompt_ids(9)
    alone = model.generate(ids, max_new_tokens=8, do_sample=False).tolist()
    with moe_offload.offload(model, device_budget=budget, preset=preset) as offloader:
        offloader.chaos(seed=1, max_delay_us=200, reorder=True, evict_probability=0.05)
        report = batch_generate(model, PROMPTS, 3, max_new_tokens=8, num_running=2)
        assert report.tokens == expected
        assert report.schedule == PRESETS[preset].schedule
        assert model.generate(ids, max_new_tokens=8, do_sample=False).tolist() == alone


@pytest.mark.parametrize("engine", ["io_uring", "threads"])
def test_swapping_back_sends_what_every_copy_replaces_and_changes_nothing_else(
    engine: str, tmp_path: Path
) -> None:
    """All copies but the first into each slot find a page there; decisions are cache-moe's."""
    if engine == "io_uring" and (reason := _core.why_no_io_uring()):
        pytest.skip(f"no io_uring here: {reason}")
    tiny_model("qwen3_moe").save_pretrained(tmp_path)
    found = {}
    for preset in ("cache-moe", "cache-moe-swap-back"):
        model = moe_offload.from_pretrained(
            tmp_path, device_budget="30%", preset=preset, io_engine=engine
        )
        tokens = model.generate(prompt_ids(9), max_new_tokens=8, do_sample=False).tolist()
        stats = moe_offload.get_offloader(model).stats()
        assert stats["io_engine"] == engine
        counts = {n: stats[n] for n in ("hits", "demand_misses", "evictions", "demand_bytes")}
        found[preset] = stats, (tokens, counts)
    assert found["cache-moe"][1] == found["cache-moe-swap-back"][1]
    assert found["cache-moe"][0]["swap_back_bytes"] == 0
    stats = found["cache-moe-swap-back"][0]
    page = stats["demand_bytes"] // stats["demand_misses"]
    replaced = stats["demand_misses"] - stats["resident_pages"]
    assert stats["swap_back_bytes"] == replaced * page > 0
    assert sum(row["swap_back_bytes"] for row in stats["per_layer"]) == stats["swap_back_bytes"]


def test_pages_on_a_gpu_are_not_swapped_back() -> None:
    with pytest.raises(ValueError, match='swap_back: only slots in host memory, device="cpu"'):
        OffloadConfig.from_options(preset="cache-moe-swap-back", device="cuda")


def test_the_ring_moves_layers_whatever_is_routed() -> None:
    model = tiny_model("qwen3_moe", num_hidden_layers=4)
    with moe_offload.offload(model, device_budget="50%", preset="se-moe") as offloader:
        model.generate(prompt_ids(4), max_new_tokens=6, do_sample=False)
        stats = offloader.stats()
    page = stats["total_expert_bytes"] / stats["num_pages"]
    moved = stats["prefetch_bytes_used"] + stats["prefetch_bytes_wasted"] + stats["demand_bytes"]
    # Five passes after the prompt's; each moves nearly all of the layers that were let go.
    assert moved > 5 * 0.5 * 4 * NUM_EXPERTS * page
    assert stats["prefetch_bytes_wasted"] > stats["demand_bytes"]
    assert stats["hit_rate"] > 0.5, "what was needed had come with its layer"


def test_the_ring_keeps_turning_past_pages_nobody_used() -> None:
    """Pages that came in vain make room once their layer is done, or the ring would jam."""
    model = tiny_model("qwen3_moe", num_hidden_layers=4)
    with moe_offload.offload(model, device_budget="50%", preset="se-moe") as offloader:
        model.generate(prompt_ids(2), max_new_tokens=4, do_sample=False)
        before = offloader.stats()["predictor"]["prefetches_started"]
        model.generate(prompt_ids(2), max_new_tokens=12, do_sample=False)
        after = offloader.stats()["predictor"]["prefetches_started"]
    assert after - before > 11 * NUM_EXPERTS


def test_expertflow_tells_the_policy_and_prefetches_for_each_batch(tmp_path: Path) -> None:
    model = with_predictors(tiny_model("qwen3_moe"), tmp_path)
    with moe_offload.offload(model, device_budget="40%", preset="expertflow") as offloader:
        assert all(pool.pager.uses_predictions for pool in offloader.pools)
        batch_generate(model, PROMPTS, 3, max_new_tokens=6, num_running=2)
        told = offloader.stats()["predictor"]
        assert told["name"] == "rpp"
        assert told["recall"], "each decode step was predicted"
        driver = offloader.predicting
        assert driver is not None
        assert type(driver.predictor).__name__ == "RoutingPathPredictor", "back after the batches"


@pytest.mark.parametrize(("preset", "kind"), [("expertflow", "rpp"), ("pregated-moe", "pregate")])
def test_presets_without_their_trained_predictor_say_how_to_get_one(preset: str, kind: str) -> None:
    model = tiny_model("qwen3_moe")
    with pytest.raises(PredictorError, match=f"moe-offload train-predictor {kind}"):
        moe_offload.offload(model, preset=preset)
    model(input_ids=prompt_ids(3))  # untouched


def test_an_option_the_preset_sets_cannot_be_given_too() -> None:
    with pytest.raises(ValueError, match="preset='se-moe' sets policy already"):
        OffloadConfig.from_options(preset="se-moe", policy="lru")


def test_unknown_presets_are_refused() -> None:
    with pytest.raises(ValueError, match="preset: expected one of cache-moe"):
        with_preset({"preset": "nope"})
