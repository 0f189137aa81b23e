"""Predictors: tokens never change whatever one says, and what it says decides what is fetched."""

from __future__ import annotations

import contextlib
from collections.abc import Callable

import numpy as np
import pytest
import torch

pytest.importorskip("transformers")

import tiny_models
from predictor_cases import (
    NEW_TOKENS,
    Everything,
    generate,
    random_preattention,
    random_pregate,
    random_rpp,
)
from tiny_models import FAMILIES, NUM_EXPERTS, tiny_model

import moe_offload
from moe_offload._core import Chances
from moe_offload.errors import PageReadError
from moe_offload.huggingface.observe import observe
from moe_offload.predictors import make_predictor
from moe_offload.predictors.base import Prediction, Predictions, Predictor
from moe_offload.predictors.driver import PrefetchDriver
from moe_offload.predictors.metrics import LiveRecall
from moe_offload.predictors.oracle import CallRecorder, Oracle
from moe_offload.predictors.previous import PreviousToken
from moe_offload.predictors.recall import Recall


def all_predictors(num_layers: int, calls) -> dict[str, Callable[[], Predictor]]:
    return {
        "previous": PreviousToken,
        "recall": lambda: Recall(depth=2),
        "lookahead-0": lambda: make_predictor("lookahead-0"),
        "lookahead": lambda: make_predictor("lookahead"),
        "lookahead-3": lambda: make_predictor("lookahead-3"),
        "preattention": lambda: random_preattention(num_layers),
        "pregate": lambda: random_pregate(num_layers),
        "rpp": lambda: random_rpp(num_layers),
        "oracle": lambda: Oracle(calls, depth=2),
        "everything": Everything,
    }


class SpeaksOnce(Oracle):
    """Knows every layer when the token is known, and says nothing more, as an RPP."""

    def layer_routed(self, layer, topk_ids, topk_weights):
        return ()


@pytest.mark.parametrize("policy", ["lru", "predictive"])
def test_what_found_no_slot_is_fetched_when_one_is_free(policy: str) -> None:
    """Slots for two layers of five: a layer's pages can come when the one two before is done."""
    model = tiny_model("qwen3_moe", num_hidden_layers=5)
    recorder = CallRecorder()
    with observe(model, recorder):
        generate(model, batch=16)
    used = [len(np.unique(ids)) for ids in recorder.calls[-1].experts.values()]
    assert min(used) > NUM_EXPERTS // 2, "layers must need most of what they have"
    with moe_offload.offload(model, device_budget="40%", policy=policy) as offloader:
        offloader.predict_with(model, SpeaksOnce(recorder.calls, depth=5))
        assert offloader.predicting is not None
        offloader.predicting._budget = lambda moment: NUM_EXPERTS  # slots decide, not time
        generate(model, batch=16)
        assert offloader.stats()["predictor"]["calls_off_the_recorded_path"] == 0
        missed = [row["demand_misses"] for row in offloader.stats()["per_layer"]]
    # 8 in each layer by the prompt; without a second try 60 in the third and 10 to 37 beyond.
    assert max(missed) <= NUM_EXPERTS + 2, missed


@pytest.mark.parametrize("name", [family.name for family in FAMILIES])
@pytest.mark.parametrize("batch", [1, 3])
def test_no_predictor_changes_a_token_whatever_the_timing(name: str, batch: int) -> None:
    model = tiny_model(
        name, **({} if "deepseek" in name or "glm" in name else {"num_hidden_layers": 2})
    )
    recorder = CallRecorder()
    with observe(model, recorder):
        expected = generate(model, batch)
    num_layers = tiny_models.family(name).moe_layers
    with moe_offload.offload(model, device_budget="50%") as offloader:
        for which, make in all_predictors(num_layers, recorder.calls).items():
            offloader.predict_with(model, make())
            offloader.chaos(7, max_delay_us=50, reorder=True, evict_probability=0.2)
            out = generate(model, batch)
            offloader.chaos()
            assert torch.equal(out, expected), f"{which} changed tokens"
            stats = offloader.stats()["predictor"]
            assert stats["steps"] == NEW_TOKENS - 1 + (12 * batch <= 64)
            assert not stats.get("refused"), stats["refused"]
    assert not model.model.layers[0]._forward_pre_hooks


def test_failing_copies_of_prefetches_do_not_reach_the_caller() -> None:
    model = tiny_model("mixtral")
    expected = generate(model)
    with moe_offload.offload(model, device_budget="50%", predictor=Everything()) as offloader:
        offloader.chaos(3, fail_probability=0.3)
        for _ in range(5):
            with contextlib.suppress(PageReadError):  # a demand that failed must be told
                assert torch.equal(generate(model), expected)
        offloader.chaos()
        assert torch.equal(generate(model), expected)


def test_an_oracle_is_right_and_saves_demand_bytes() -> None:
    model = tiny_model("qwen3_moe", num_hidden_layers=4)
    recorder = CallRecorder()
    with observe(model, recorder):
        expected = generate(model)
    with moe_offload.offload(model, device_budget="40%") as offloader:
        generate(model)
        without = offloader.stats()["demand_bytes"]
        assert offloader.stats()["predictor"] is None
        offloader.predict_with(model, Oracle(recorder.calls))
        offloader.reset_stats()
        assert torch.equal(generate(model), expected)
        stats = offloader.stats()
    predictor = stats["predictor"]
    recall = predictor["recall"]["routed+1"]
    assert recall["recall_at_top_k"] == 1.0
    assert recall["layers"] == [1, 2, 3]
    assert predictor["recall"]["token"]["layers"] == [0]
    assert predictor["calls_off_the_recorded_path"] == 0
    assert stats["prefetch_bytes_used"] > 0
    assert stats["demand_bytes"] < without
    assert predictor["net_bytes_saved"] == (
        stats["prefetch_bytes_used"] - stats["prefetch_bytes_wasted"]
    )


def test_chances_follow_what_happens_and_fade() -> None:
    chances = Chances()
    assert chances.chance(0.9) > 0.8
    for _ in range(100):
        chances.learn(0.9, used=False)
    assert chances.chance(0.9) < 0.05
    assert chances.chance(0.5) == pytest.approx(0.525)
    for _ in range(3000):
        chances.fade()
    assert chances.chance(0.9) > 0.5
    chances.learn(1.0, used=True)


def test_a_lower_threshold_fetches_what_is_less_likely() -> None:
    """A quarter of the experts is used, and a quarter is the chance that each is given."""

    class Doubtful(Everything):
        def _all(self, rows: int) -> Predictions:
            return [Prediction(layer, 0.25 * scores) for layer, scores in super()._all(rows)]

    model = tiny_model("mixtral", num_hidden_layers=2)
    started = {0.5: 0, 0.1: 0}
    for threshold in (0.5, 0.1, 0.1, 0.1):
        options = {"device_budget": "50%", "prefetch_threshold": threshold}
        with moe_offload.offload(model, predictor=Doubtful(), **options) as offloader:
            for _ in range(4):
                generate(model)
            stats = offloader.stats()["predictor"]
        assert stats["threshold"] == threshold
        # 52 at 0.5; 144 at 0.1, fewer where a busy machine's forward comes first: the best counts
        started[threshold] = max(started[threshold], stats["prefetches_started"])
    assert started[0.1] > 2 * started[0.5] > 0


@pytest.mark.parametrize(
    ("threshold", "top_k", "expected"),
    [(0.5, 1, 2), (0.9, 4, 6), (0.1, 1, 10), (0.03, 1, 34), (0.4, 2, 5), (0.45, 4, 9)],
)
def test_a_token_may_fetch_every_expert_whose_rank_allows_the_chance(
    threshold: float, top_k: int, expected: int
) -> None:
    """Chances of a token's experts sum to A, so the one of rank r has at most A / r."""
    driver = PrefetchDriver.__new__(PrefetchDriver)
    driver.threshold, driver.recall = threshold, LiveRecall(1, top_k)
    assert driver._candidates() == expected


def test_everything_is_cancelled_or_stopped_by_the_learned_chance() -> None:
    """A predictor that is mostly wrong is given up: waste per token falls."""
    model = tiny_model("mixtral", num_hidden_layers=2)
    wasted = []
    with moe_offload.offload(model, device_budget="50%", predictor=Everything()) as offloader:
        for _ in range(6):
            offloader.reset_stats()
            generate(model)
            wasted.append(offloader.stats()["predictor"]["prefetches_started"])
    assert wasted[-1] < wasted[0] / 2, wasted


def test_the_off_switch_leaves_no_hook_behind() -> None:
    model = tiny_model("olmoe")
    with moe_offload.offload(model, predictor="lookahead") as offloader:
        assert model.model.layers[0].mlp.gate._forward_pre_hooks
        offloader.predict_with(model, None)
        hooked = [m for m in model.modules() if m._forward_pre_hooks or m._forward_hooks]
        assert hooked == [model]  # the prompt length guard
        assert all(pool.on_acquired is None for pool in offloader.pools)
        assert offloader.stats()["predictor"] is None
