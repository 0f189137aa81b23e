"""Predictors: tokens never change, predictions mean what they say, what does not fit is refused."""

from __future__ import annotations

import contextlib
import warnings
from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
import torch

pytest.importorskip("transformers")

import tiny_models
from tiny_models import FAMILIES, NUM_EXPERTS, TOP_K, prompt_ids, tiny_model

import moe_offload
from moe_offload._core import Chances
from moe_offload.errors import PageReadError, PredictorError
from moe_offload.huggingface.observe import observe
from moe_offload.predictors import AUTO_PAGE_BYTES, make_predictor
from moe_offload.predictors.base import ModelFacts, Prediction, Predictions, Predictor
from moe_offload.predictors.oracle import CallRecorder, Oracle
from moe_offload.predictors.preattention import PreAttention
from moe_offload.predictors.pregate import PreGate, PreGates, PreGateShape
from moe_offload.predictors.previous import PreviousToken
from moe_offload.predictors.recall import Recall
from moe_offload.predictors.routers import _same_numbers
from moe_offload.predictors.rpp import RoutingPathPredictor
from moe_offload.predictors.rpp_model import RppConfig, RppModel
from moe_offload.predictors.rpp_session import RppDecoder, RppSession

NEW_TOKENS = 8


def generate(model, batch: int = 1) -> torch.Tensor:
    with torch.no_grad():
        ids = prompt_ids(batch=batch)
        return model.generate(ids, max_new_tokens=NEW_TOKENS, do_sample=False)


def random_rpp(num_layers: int, **changes: int) -> RoutingPathPredictor:
    torch.manual_seed(0)
    shape = {"vocab_size": tiny_models.VOCAB, "num_layers": num_layers}
    shape |= {"num_experts": NUM_EXPERTS, "top_k": TOP_K}
    model = RppModel(RppConfig(**{**shape, "d_model": 8, "d_ff": 16, "max_decoded": 6, **changes}))
    torch.nn.init.normal_(model.head.weight)
    return RoutingPathPredictor(model)


def random_preattention(num_layers: int, hidden: int = 32) -> PreAttention:
    generator = torch.Generator().manual_seed(0)
    weight = torch.randn(num_layers, 2, NUM_EXPERTS, hidden, generator=generator)
    return PreAttention(weight, torch.zeros(num_layers, 2, NUM_EXPERTS), TOP_K)


def random_pregate(num_layers: int) -> PreGate:
    torch.manual_seed(0)
    gates = PreGates(PreGateShape(num_layers, NUM_EXPERTS, TOP_K, 32, inner_size=4))
    torch.nn.init.normal_(gates.linear)
    return PreGate(gates)


class Everything(Predictor):
    """Names every expert of every layer at every moment: the worst there can be."""

    name = "everything"

    def bind(self, model, facts: ModelFacts) -> None:
        self.facts = facts

    def _all(self, rows: int) -> Predictions:
        return [
            Prediction(layer, np.full((rows, count), 0.99, np.float32))
            for layer, count in enumerate(self.facts.num_experts)
        ]

    def token_known(self, call):
        return self._all(call.batch * call.length)

    def layer_input_known(self, layer, hidden):
        return self._all(hidden.shape[0] * hidden.shape[1])[layer:]

    def layer_routed(self, layer, topk_ids, topk_weights):
        return self._all(len(topk_ids))[layer + 1 :]


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


def test_lookahead_recall_is_that_of_asking_the_next_router_by_hand() -> None:
    """Independent count: hooks here, plain torch, against what the driver scored live."""
    model = tiny_model("qwen3_moe", num_hidden_layers=3)
    layers = model.model.layers
    seen: dict[tuple[str, int], torch.Tensor] = {}
    for index, layer in enumerate(layers):
        layer.post_attention_layernorm.register_forward_pre_hook(
            lambda m, args, i=index: seen.__setitem__(("state", i), args[0])
        )
        layer.mlp.experts.register_forward_pre_hook(
            lambda m, args, i=index: seen.__setitem__(("ids", i), args[1])
        )
    found = tokens = 0

    def count(module, args, out):
        nonlocal found, tokens
        for index in (1, 2):
            state = seen["state", index - 1]
            if state.shape[1] != 1:
                continue  # the prompt is where the routers are found
            normed = layers[index].post_attention_layernorm.forward(state)
            ids = layers[index].mlp.gate.forward(normed)[2]
            found += len(set(ids[0].tolist()) & set(seen["ids", index][0].tolist()))
            tokens += TOP_K

    model.register_forward_hook(count)
    with moe_offload.offload(model, device_budget="50%", predictor="lookahead") as offloader:
        generate(model)
        recall = offloader.stats()["predictor"]["recall"]["routed+1"]
    assert recall["tokens"] == NEW_TOKENS - 1
    assert recall["recall_at_top_k"] == pytest.approx(found / tokens)
    assert offloader.closed


def test_previous_predicts_what_the_last_token_used() -> None:
    class Call:
        batch, length, position = 2, 1, 4

    predictor = PreviousToken()
    predictor.bind(torch.nn.Module(), ModelFacts((4,), 2, 10, ("experts",)))
    assert list(predictor.token_known(Call())) == []
    ids = torch.tensor([[0, 1], [2, 3], [1, 2], [3, 0]])  # two sequences of two tokens
    predictor.layer_routed(0, ids, ids.float())
    (prediction,) = predictor.token_known(Call())
    assert prediction.scores.tolist() == [[0, 0, 0.5, 0.5], [0.5, 0, 0, 0.5]]
    predictor.layer_routed(0, ids[:2], ids.float())
    (prediction,) = predictor.token_known(Call())
    assert prediction.scores.tolist() == [[0.5, 0.5, 0.25, 0.25], [0.25, 0, 0.5, 0.75]]


def test_recall_predicts_what_followed_when_the_routing_was_the_same() -> None:
    class Call:
        batch, length = 1, 1

    predictor = Recall()
    predictor.bind(torch.nn.Module(), ModelFacts((8, 8), 2, 10, ("a", "b")))
    assert list(predictor.token_known(Call())) == []
    text = [[[0, 1], [2, 3]], [[4, 5], [6, 7]], [[2, 6], [0, 4]]]  # three tokens, two layers
    for _ in range(20):
        for token in text:
            for layer, ids in enumerate(token):
                said = predictor.layer_routed(layer, torch.tensor([ids]), torch.ones(1, 2))
    for now, after in ((0, 1), (1, 2)):
        (prediction,) = predictor.layer_routed(0, torch.tensor([text[now][0]]), torch.ones(1, 2))
        assert prediction.layer == 1
        assert sorted(prediction.scores[0].argsort()[-2:].tolist()) == text[now][1]
        assert prediction.scores.max() > 0.5 > np.sort(prediction.scores[0])[-3]
        assert list(predictor.layer_routed(1, torch.tensor([text[now][1]]), torch.ones(1, 2))) == []
        (prediction,) = predictor.token_known(Call())
        assert prediction.layer == 0
        assert sorted(prediction.scores[0].argsort()[-2:].tolist()) == text[after][0]
    assert said == []


def test_recall_joins_the_tokens_of_a_batch() -> None:
    predictor = Recall()
    predictor.bind(torch.nn.Module(), ModelFacts((8, 8), 1, 10, ("a", "b")))
    for _ in range(20):
        for layer, ids in enumerate(([[0], [1], [0]], [[3], [4], [4]])):
            said = predictor.layer_routed(layer, torch.tensor(ids), torch.ones(3, 1))
    (prediction,) = predictor.layer_routed(0, torch.tensor([[0], [1], [0]]), torch.ones(3, 1))
    assert prediction.scores.shape == (3, 8)
    any_token = 1 - np.prod(1 - prediction.scores, axis=0)
    assert (any_token[[3, 4]] > 0.9).all()
    assert said == []
    with pytest.raises(ValueError, match=r"depth must be >= 1, got 0"):
        Recall(depth=0)


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
    started = {}
    for threshold in (0.5, 0.1):
        options = {"device_budget": "50%", "prefetch_threshold": threshold}
        with moe_offload.offload(model, predictor=Doubtful(), **options) as offloader:
            for _ in range(4):
                generate(model)
            stats = offloader.stats()["predictor"]
        assert stats["threshold"] == threshold
        started[threshold] = stats["prefetches_started"]
    assert started[0.1] > 2 * started[0.5]


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


def test_rpp_steps_equal_the_whole_sequence() -> None:
    torch.manual_seed(1)
    config = RppConfig(50, 3, 8, 2, d_model=16, d_ff=32, max_decoded=12)
    model = RppModel(config).eval()
    torch.nn.init.normal_(model.head.weight)
    for norm in (m for m in model.modules() if isinstance(m, torch.nn.RMSNorm)):
        torch.nn.init.uniform_(norm.weight, 0.5, 1.5)  # folded into the next matrix
    prompt = torch.randint(0, 50, (2, 5))
    keep = torch.tensor([[False, False, True, True, True], [True] * 5])
    decoded = torch.randint(0, 50, (2, 9))
    session = RppSession(RppDecoder(model), prompt, keep)
    steps = [session.step(decoded[:, i]) for i in range(9)]
    with torch.no_grad():
        whole = model(prompt, decoded, keep)
    for i, logits in enumerate(steps):  # fp32 sums in another order
        torch.testing.assert_close(torch.from_numpy(logits), whole[:, i], rtol=1e-4, atol=1e-4)
    # padding is not read
    with torch.no_grad():
        short = model(prompt[:1, 2:], decoded[:1])
    torch.testing.assert_close(short[0], whole[0], rtol=1e-4, atol=1e-4)
    for i in range(20):  # past its room: the older half leaves, steps go on
        assert np.isfinite(session.step(decoded[:, i % 9])).all()


def test_rpp_follows_a_sequence_and_gives_up_when_it_lost_it() -> None:
    model = tiny_model("qwen3_moe")
    with moe_offload.offload(model, device_budget="50%") as offloader:
        offloader.predict_with(model, random_rpp(2))
        generate(model, batch=2)
        stats = offloader.stats()["predictor"]
        assert stats["recall"]["token"]["tokens"] == 2 * (NEW_TOKENS - 1)
        assert stats["calls_without_history"] == 0
        out = model(prompt_ids(8), use_cache=True)
        cache = out.past_key_values
        offloader.predict_with(model, random_rpp(2))  # has not seen the prompt
        model(prompt_ids(1), past_key_values=cache)
        assert offloader.stats()["predictor"]["calls_without_history"] == 1


@pytest.mark.parametrize(
    ("spec", "message"),
    [
        ("lookback", "expected one of none, auto, previous, recall, lookahead"),
        (3, "got 3"),
        ("tests", "there is no file tests/predictor.safetensors"),
        ("setup.py", "setup.py is not a safetensors file"),
    ],
)
def test_a_predictor_that_is_none_is_refused(spec: object, message: str) -> None:
    model = tiny_model("mixtral")
    with pytest.raises(PredictorError, match=message):
        moe_offload.offload(model, predictor=spec)
    generate(model)  # untouched


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: random_rpp(3), r"num_layers 3 \(this model: 2\)"),
        (lambda: random_rpp(2, num_experts=16), r"num_experts 16 \(this model: 8\)"),
        (lambda: random_rpp(2, vocab_size=99), r"vocab_size 99 \(this model: 128\)"),
        (lambda: random_rpp(2, top_k=1), r"top_k 1 \(this model: 2\)"),
        (lambda: random_preattention(5), r"num_layers 5 \(this model: 2\)"),
        (lambda: Oracle([]), "the recording is empty"),
        (lambda: make_predictor("lookahead-4"), "expected one of none"),
        (lambda: random_rpp(2, d_ff=0), "d_ff must be a whole number >= 1, got 0"),
    ],
)
def test_a_predictor_of_another_model_is_refused(make, message: str) -> None:
    model = tiny_model("mixtral")
    with pytest.raises(PredictorError, match=message):
        moe_offload.offload(model, predictor=make())
    assert not model.model.layers[0]._forward_pre_hooks
    generate(model)


def test_a_head_of_another_hidden_size_is_refused_at_its_first_use() -> None:
    model = tiny_model("mixtral")
    with (
        moe_offload.offload(model, predictor=random_preattention(2, hidden=16)),
        pytest.raises(PredictorError, match="trained for hidden size 16, this model has 32"),
    ):
        generate(model)


def test_lookahead_without_a_router_is_refused() -> None:
    model = tiny_model("mixtral")
    model.model.layers[1].mlp.gate.weight = torch.nn.Parameter(torch.zeros(3, 32))
    with pytest.raises(PredictorError, match=r"one router beside model.layers.1.mlp.experts"):
        moe_offload.offload(model, predictor="lookahead")
    assert not model.model.layers[0].mlp.gate._forward_pre_hooks


def test_lookahead_reports_a_router_whose_answer_is_not_the_routing() -> None:
    """The block changes the router's choice: asking the router alone would predict nonsense."""
    model = tiny_model("mixtral")
    for layer in model.model.layers:
        layer.mlp.experts.register_forward_pre_hook(
            lambda m, args: (args[0], (args[1] + 1) % NUM_EXPERTS, args[2])
        )
    expected = generate(model)
    with moe_offload.offload(model, device_budget="50%", predictor="lookahead") as offloader:
        with pytest.warns(UserWarning, match="did not give the experts the model chose"):
            assert torch.equal(generate(model), expected)
        stats = offloader.stats()["predictor"]
    assert len(stats["refused"]) == 2
    assert stats["recall"] == {}


def test_lookahead_is_silent_and_complete_on_every_family() -> None:
    for family in FAMILIES:
        model = tiny_model(
            family.name,
            num_hidden_layers=3,
            **({"layer_types": ["full_attention"] * 3} if family.name == "gpt_oss" else {}),
        )
        with (
            warnings.catch_warnings(),
            moe_offload.offload(model, device_budget="50%", predictor="lookahead-2") as offloader,
        ):
            warnings.simplefilter("error")
            generate(model)
            stats = offloader.stats()["predictor"]
        assert stats["refused"] == [], family.name
        moments = {"routed+1"} if family.moe_layers == 1 else {"routed+1", "routed+2"}
        assert set(stats["recall"]) == moments, family.name


def test_the_off_switch_leaves_no_hook_behind() -> None:
    model = tiny_model("olmoe")
    with moe_offload.offload(model, predictor="lookahead") as offloader:
        assert model.model.layers[0].mlp.gate._forward_pre_hooks
        offloader.predict_with(model, None)
        hooked = [m for m in model.modules() if m._forward_pre_hooks or m._forward_hooks]
        assert hooked == [model]  # the prompt length guard
        assert all(pool.on_acquired is None for pool in offloader.pools)
        assert offloader.stats()["predictor"] is None


def test_own_lookahead_asks_the_layers_router_about_its_input() -> None:
    """Without attention's part the input is what the router sees, and every answer is right."""
    model = tiny_model("olmoe", num_hidden_layers=2)
    for layer in model.model.layers:
        torch.nn.init.zeros_(layer.self_attn.o_proj.weight)
    expected = generate(model)
    with moe_offload.offload(model, device_budget="50%", predictor="lookahead-0") as offloader:
        assert torch.equal(generate(model), expected)
        recall = offloader.stats()["predictor"]["recall"]
    assert set(recall) == {"input+0"}
    assert recall["input+0"]["layers"] == [0, 1]
    assert recall["input+0"]["tokens"] == NEW_TOKENS - 1
    assert recall["input+0"]["recall_at_top_k"] == 1.0


def test_auto_is_own_lookahead_for_large_pages_on_disk() -> None:
    assert make_predictor("auto") is None
    assert make_predictor("auto", disk_page_bytes=AUTO_PAGE_BYTES - 1) is None
    assert make_predictor("auto", disk_page_bytes=AUTO_PAGE_BYTES).name == "lookahead-0"


def test_auto_goes_without_a_router_and_says_so(monkeypatch, tmp_path) -> None:
    monkeypatch.setattr("moe_offload.predictors.AUTO_PAGE_BYTES", 1)
    model = tiny_model("mixtral")
    model.save_pretrained(tmp_path)
    paged = moe_offload.from_pretrained(tmp_path, device_budget="50%")
    assert moe_offload.get_offloader(paged).stats()["predictor"]["name"] == "lookahead-0"
    with moe_offload.offload(model, device_budget="50%") as offloader:  # in memory: nothing to gain
        assert offloader.stats()["predictor"] is None

    def none_found(*args):
        raise PredictorError("no router found.")

    monkeypatch.setattr("moe_offload.predictors.lookahead.RouterProbe", none_found)
    with pytest.warns(UserWarning, match="nothing is fetched ahead: no router found"):
        paged = moe_offload.from_pretrained(tmp_path, device_budget="50%")
    assert moe_offload.get_offloader(paged).stats()["predictor"] is None


@pytest.mark.filterwarnings("ignore:lookahead")
def test_a_router_that_raises_when_asked_ahead_does_not_break_the_model() -> None:
    model = tiny_model("qwen3_moe")
    steps = [prompt_ids(8), prompt_ids(1, seed=1), prompt_ids(1, seed=2)]

    def run() -> list[torch.Tensor]:
        cache, found = None, []
        for ids in steps:
            with torch.no_grad():
                out = model(ids, past_key_values=cache, use_cache=True)
            cache = out.past_key_values
            found.append(out.logits)
        return found

    expected = run()
    router = model.model.layers[0].mlp.gate
    own, in_turn = router.forward, []
    router.register_forward_pre_hook(lambda *_: in_turn.append(True))

    def forward(*args: Any) -> Any:
        if not in_turn and asked:
            raise ValueError("not now")
        asked.append(True)
        in_turn.clear()
        return own(*args)

    asked: list[bool] = []
    router.forward = forward
    with moe_offload.offload(model, "25%", predictor="lookahead-0") as offloader:
        got = run()
        refused = offloader.stats()["predictor"]["refused"]
    assert all(torch.equal(a, b) for a, b in zip(got, expected, strict=True))
    assert len(refused) == 1
    assert "raised ValueError (not now)" in refused[0]


def test_a_norm_is_recognised_behind_a_cast_of_what_is_not_contiguous() -> None:
    given = torch.randn(3, 4).bfloat16()
    assert _same_numbers(given, given.float().t().contiguous().t())
    assert not _same_numbers(given, given.float() + 1)
    assert not _same_numbers(given[:2], given.float())
