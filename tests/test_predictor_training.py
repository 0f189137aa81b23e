"""Training predictors: they learn what can be learned, are saved whole, and mistakes are told."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest
import torch

pytest.importorskip("transformers")

from tiny_models import NUM_EXPERTS, TOP_K, prompt_ids, tiny_model

import moe_offload
from moe_offload.errors import PredictorError
from moe_offload.predictors.artefact import load_predictor, read_predictor
from moe_offload.predictors.metrics import RecallMeter
from moe_offload.predictors.preattention_training import judge_preattention, train_preattention
from moe_offload.predictors.rpp_model import RppConfig
from moe_offload.predictors.rpp_training import Sample, split_samples, train_rpp
from moe_offload.predictors.training import train_preattention_to, train_rpp_to

LAYERS, EXPERTS, CHOICES, WORDS = 3, 8, 2, 20


def routed_by_token(count: int = 40, length: int = 12, seed: int = 0) -> list[Sample]:
    """Sequences whose routing is a table of the token: an RPP can learn it completely."""
    rng = np.random.default_rng(seed)
    table = np.stack(
        [[rng.choice(EXPERTS, CHOICES, replace=False) for _ in range(LAYERS)] for _ in range(WORDS)]
    )  # [V, L, A]
    samples = []
    for _ in range(count):
        tokens = rng.integers(0, WORDS, length + 3)
        samples.append(Sample(tokens[:3], tokens[3:], table[tokens[3:]], "table"))
    return samples


def small_config() -> RppConfig:
    return RppConfig(WORDS, LAYERS, EXPERTS, CHOICES, d_ff=32, num_blocks=1, token_width=16)


def test_an_rpp_learns_a_table_and_is_saved_whole(tmp_path: Path) -> None:
    report = train_rpp_to(
        tmp_path, routed_by_token(), small_config(), data="a table", steps=150, batch=8
    )
    assert report.steps == 150
    assert report.held_out["all"]["recall@2"] > 0.95
    about, tensors = read_predictor(tmp_path)
    assert about["kind"] == "rpp"
    assert about["training"]["data"] == "a table"
    assert about["training"]["held_out"]["all"] == report.held_out["all"]
    card = (tmp_path / "README.md").read_text()
    assert "4 held out" in card
    assert "recall@2 per token" in card
    assert "candidate set" in card
    predictor = load_predictor(tmp_path)
    assert predictor.model.config == small_config()
    assert sum(t.numel() for t in tensors.values()) == predictor.report()["parameters"]


def test_training_is_repeatable() -> None:
    samples = routed_by_token(8)
    one, _ = train_rpp(samples, small_config(), steps=5, seed=3)
    two, _ = train_rpp(samples, small_config(), steps=5, seed=3)
    other, _ = train_rpp(samples, small_config(), steps=5, seed=4)
    assert torch.equal(one.head.weight, two.head.weight)
    assert not torch.equal(one.embed.weight, other.embed.weight)


def model_samples(model, count: int = 24, length: int = 24) -> list[Sample]:
    samples = []
    for seed in range(count):
        tokens = prompt_ids(length, seed=seed)[0].numpy()
        samples.append(Sample(tokens[:4], tokens[4:], np.zeros((length - 4, 2, TOP_K), np.int64)))
    return samples


def test_heads_learn_from_layer_inputs_and_predict_what_they_learned(tmp_path: Path) -> None:
    model = tiny_model("qwen3_moe")
    samples = model_samples(model)
    report = train_preattention_to(
        tmp_path, model, samples, num_experts=NUM_EXPERTS, top_k=TOP_K, data="random", steps=60
    )
    own = report.held_out["input+0"]
    assert own["recall@2"] > 2 * TOP_K / NUM_EXPERTS, own  # twice chance
    assert report.held_out["input+1"]["recall@2"] > TOP_K / NUM_EXPERTS
    # live, through the file: the same order of recall as when judged
    with moe_offload.offload(model, device_budget="50%", predictor=str(tmp_path)) as offloader:
        for seed in (100, 101):
            model.generate(prompt_ids(4, seed=seed), max_new_tokens=20, do_sample=False)
        live = offloader.stats()["predictor"]["recall"]
    assert set(live) == {"input+0", "input+1"}
    assert live["input+0"]["layers"] == [0, 1]
    assert live["input+1"]["layers"] == [1]
    assert live["input+0"]["recall_at_top_k"] > TOP_K / NUM_EXPERTS


def test_heads_are_judged_on_the_layer_they_name() -> None:
    """Perfect heads for layer 1 from layer 0's input, by construction: bias names the choice."""
    model = tiny_model("qwen3_moe")
    samples = model_samples(model, 2)
    weight = torch.zeros(2, 2, NUM_EXPERTS, 32)
    bias = torch.zeros(2, 2, NUM_EXPERTS)
    found = judge_preattention(model, weight, bias, samples, TOP_K)
    assert found["input+0"]["tokens"] == 2 * 20
    assert len(found["input+1"]["recall@2_per_layer"]) == 1
    assert found["input+0"]["batch"] == []
    with pytest.raises(PredictorError, match="no sequence"):
        train_preattention(model, [], NUM_EXPERTS)


def test_recall_by_hand() -> None:
    meter = RecallMeter(1, 4, 2, extra=1)
    scores = np.array([[[0.9, 0.8, 0.1, 0.0]], [[0.1, 0.2, 0.3, 0.4]]] * 2)  # [4, 1, 4]
    truth = np.zeros((4, 1, 4), bool)
    truth[[0, 2], 0, :2] = True  # right
    truth[[1, 3], 0, 0] = truth[[1, 3], 0, 3] = True  # half right
    meter.add_step(scores, truth)
    found = meter.summary()
    assert found["recall@2"] == pytest.approx(0.75)
    assert found["recall@3"] == pytest.approx(0.75)
    (four,) = [r for r in found["batch"] if r["batch"] == 4 and r["candidates_per_token"] == 2]
    assert four["recall"] == 1.0  # united: 0, 1, 3 used, 0, 1, 2, 3 named
    assert four["candidate_set"] == 4
    assert four["precision"] == 0.75
    assert {r["batch"] for r in found["batch"]} == {1, 4}


def test_too_few_sequences_are_refused() -> None:
    with pytest.raises(PredictorError, match="at least 2 sequences with routing, got 1"):
        split_samples(routed_by_token(1), 0.1, 0)
    with pytest.raises(PredictorError, match="no sequence with routing"):
        train_rpp([], small_config(), steps=1)


def test_a_time_that_no_step_fits_into_is_refused() -> None:
    with pytest.raises(PredictorError, match="--minutes is too short for a single step"):
        train_rpp(routed_by_token(4), small_config(), steps=1000, minutes=1e-9)
    model = tiny_model("mixtral")
    with pytest.raises(PredictorError, match="--minutes is too short for a single step"):
        train_preattention(model, model_samples(model, 4, 8), NUM_EXPERTS, minutes=1e-9)


def test_a_run_that_its_time_ends_counts_the_steps_it_took() -> None:
    lines: list[str] = []
    _, report = train_rpp(
        routed_by_token(4), small_config(), steps=100_000, minutes=0.005, log=lines.append
    )
    assert 0 < report.steps < 100_000
    assert report.tokens_seen == 4 * 12 * report.steps
    assert int(lines[-1].split()[1]) <= report.steps


def test_damaged_files_are_refused(tmp_path: Path) -> None:
    train_rpp_to(tmp_path, routed_by_token(4), small_config(), data="", steps=1, held_out=0.5)
    file = tmp_path / "predictor.safetensors"
    from safetensors.torch import load_file, save_file

    about = {"kind": "rpp", "shape": vars(small_config()), "training": {}}
    tensors = load_file(file)
    cases = {
        "head.weight must be": {
            k: (v if k != "head.weight" else v[:1]) for k, v in tensors.items()
        },
        "got nothing": {k: v for k, v in tensors.items() if k != "head.bias"},
    }
    for message, changed in cases.items():
        save_file(changed, file, metadata={"moe_offload.predictor": json.dumps(about)})
        with pytest.raises(PredictorError, match=message):
            load_predictor(tmp_path)
    save_file(tensors, file, metadata={"moe_offload.predictor": '{"kind": "crystal ball"}'})
    with pytest.raises(PredictorError, match="is not a trained predictor"):
        load_predictor(tmp_path)
    about["shape"] = {"depth": 3}
    save_file(tensors, file, metadata={"moe_offload.predictor": json.dumps(about)})
    with pytest.raises(PredictorError, match="its shape is not one of an rpp"):
        load_predictor(tmp_path)
    about = {"kind": "preattention", "shape": {}, "training": {}}
    save_file(tensors, file, metadata={"moe_offload.predictor": json.dumps(about)})
    with pytest.raises(PredictorError, match="expected tensors weight and bias"):
        load_predictor(tmp_path)
    file.write_bytes(file.read_bytes()[:100])
    with pytest.raises(PredictorError, match="is not a safetensors file"):
        load_predictor(tmp_path)
