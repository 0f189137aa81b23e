"""Asking a router ahead of its layer: its answers, its recall, and routers that cannot be asked."""

from __future__ import annotations

import warnings
from typing import Any

import pytest
import torch

pytest.importorskip("transformers")

from predictor_cases import NEW_TOKENS, generate
from tiny_models import FAMILIES, NUM_EXPERTS, TOP_K, prompt_ids, tiny_model

import moe_offload
from moe_offload.errors import PredictorError
from moe_offload.predictors import AUTO_PAGE_BYTES, make_predictor
from moe_offload.predictors.routers import _same_numbers


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


def test_own_lookahead_asks_the_layers_router_about_its_input() -> None:
    """Without attention's part the input is what the router sees, and every answer is right."""
    model = tiny_model("olmoe", num_hidden_layers=2)
    for layer in model.model.layers:
        torch.nn.init.zeros_(layer.self_attn.o_proj.weight)
    expected = generate(model)
    with moe_offload.offload(model, device_budget="50%", predictor="lookahead-0") as offloader:
        assert torch.equal(generate(model), expected)
        recall = offloader.stats()["predictor"]["recall"]
        # its routers are known: nobody watches them, or the norms before them, any more
        layer = model.model.layers[0]
        for module in (layer.mlp.gate, layer.post_attention_layernorm):
            assert not module._forward_pre_hooks
            assert not module._forward_hooks
    assert set(recall) == {"input+0"}
    assert recall["input+0"]["layers"] == [0, 1]
    assert recall["input+0"]["tokens"] == NEW_TOKENS - 1
    assert recall["input+0"]["recall_at_top_k"] == 1.0


def test_auto_is_own_lookahead_for_large_pages_on_disk() -> None:
    assert make_predictor("auto") is None
    assert make_predictor("auto", disk_page_bytes=AUTO_PAGE_BYTES - 1) is None
    assert make_predictor("auto", disk_page_bytes=AUTO_PAGE_BYTES).name == "lookahead-0"


def test_auto_rests_while_every_expert_is_resident(monkeypatch, tmp_path) -> None:
    monkeypatch.setattr("moe_offload.predictors.AUTO_PAGE_BYTES", 1)
    model = tiny_model("mixtral")
    model.save_pretrained(tmp_path)

    def steps(**options: Any) -> tuple[int, Any, Any]:
        paged = moe_offload.from_pretrained(tmp_path, device_budget="100%", **options)
        offloader = moe_offload.get_offloader(paged)
        generate(paged)
        return offloader.stats()["predictor"]["steps"], paged, offloader

    assert steps(predictor="lookahead-0")[0] > 0  # asked for by name: it is scored
    rested, paged, offloader = steps()
    assert rested == 0
    offloader.resize("50%")
    generate(paged)
    assert offloader.stats()["predictor"]["steps"] > 0


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
