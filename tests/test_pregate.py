"""Pre-gates: learned from a model's routers, prefetch what they name, and change no token."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest
import torch
from tiny_models import NUM_EXPERTS, TOP_K, prompt_ids, tiny_model

import moe_offload
from moe_offload.cli import main
from moe_offload.errors import PredictorError
from moe_offload.huggingface.observe import Observer, observe
from moe_offload.predictors.artefact import read_predictor
from moe_offload.predictors.pregate import PreGate, PreGates, PreGateShape
from moe_offload.predictors.pregate_training import judge_pregates, train_pregates
from moe_offload.predictors.rpp_training import Sample
from moe_offload.predictors.training import train_pregate_to

HIDDEN = 32


def naming(experts: list[int], num_layers: int = 4, hidden: int = HIDDEN) -> PreGate:
    """Gates that name the same experts whatever they see."""
    gates = PreGates(PreGateShape(num_layers, NUM_EXPERTS, TOP_K, hidden, inner_size=4))
    with torch.no_grad():
        gates.bias.fill_(-5.0)
        gates.bias[:, experts] = 5.0
    return PreGate(gates)


def model_samples(count: int = 24, length: int = 24) -> list[Sample]:
    samples = []
    for seed in range(count):
        tokens = prompt_ids(length, seed=seed)[0].numpy()
        samples.append(Sample(tokens[:4], tokens[4:], np.zeros((length - 4, 2, TOP_K), np.int64)))
    return samples


def test_gates_read_what_the_router_reads_and_name_the_next_layer() -> None:
    """Gate 0 against a plain computation on the inputs that the model's blocks really had."""
    model = tiny_model("qwen3_moe", num_hidden_layers=3)
    torch.manual_seed(1)
    gates = PreGates(PreGateShape(3, NUM_EXPERTS, TOP_K, HIDDEN, inner_size=4))
    torch.nn.init.normal_(gates.linear)
    torch.nn.init.normal_(gates.down)
    seen: dict[int, torch.Tensor] = {}

    class Inputs(Observer):
        def block_begins(self, layer: int, hidden: torch.Tensor) -> None:
            seen[layer] = hidden.double()

    told = []

    class Listening(PreGate):
        def layer_routed(self, layer, topk_ids, topk_weights):
            told.append(super().layer_routed(layer, topk_ids, topk_weights))
            return told[-1]

    with moe_offload.offload(model, "50%", predictor=Listening(gates)), observe(model, Inputs()):
        model(prompt_ids(5))
    assert [[p.layer for p in predictions] for predictions in told] == [[1], [2], []]
    for layer in (0, 1):
        x = seen[layer].reshape(-1, HIDDEN)
        x = x / (x.square().mean(-1, keepdim=True) + 1e-6).sqrt()
        up, down = gates.up[layer].double(), gates.down[layer].double()
        inner = x @ up.T + gates.up_bias[layer].double()
        logits = x @ gates.linear[layer].double().T + (inner * inner.sigmoid()) @ down.T
        best = logits.topk(TOP_K).indices.sort().values
        named = told[layer][0].scores >= 0.5
        assert (named.sum(1) == TOP_K).all()
        assert np.array_equal(np.nonzero(named)[1].reshape(-1, TOP_K), best.numpy())


def test_everything_named_is_fetched_and_nothing_else() -> None:
    model = tiny_model("qwen3_moe", num_hidden_layers=4)
    ids = prompt_ids(1)
    expected = model(ids).logits
    with moe_offload.offload(model, "60%", predictor=naming([2, 6])) as offloader:
        assert torch.equal(model(ids).logits, expected)
        stats = offloader.stats()
    page = stats["total_expert_bytes"] // stats["num_pages"]
    moved = stats["prefetch_bytes_used"] + stats["prefetch_bytes_wasted"]
    assert stats["predictor"]["prefetches_started"] == 3 * 2, "layers 1 to 3, two experts each"
    assert moved <= 3 * 2 * page
    assert stats["lookups"] == stats["hits"] + stats["joined_prefetches"] + stats["demand_misses"]
    (moment,) = stats["predictor"]["recall"]
    assert moment == "routed+1"


@pytest.mark.parametrize("name", ["mixtral", "gpt_oss", "olmoe"])
def test_wrong_gates_change_no_token(name: str) -> None:
    model = tiny_model(name)
    expected = model.generate(prompt_ids(6, 2), max_new_tokens=8, do_sample=False)
    options = {"preset": None, "predictor": naming([0, 1], num_layers=2)}
    with moe_offload.offload(model, "40%", **options) as offloader:
        offloader.chaos(3, max_delay_us=50, reorder=True, evict_probability=0.2)
        out = model.generate(prompt_ids(6, 2), max_new_tokens=8, do_sample=False)
    assert torch.equal(out, expected)


def test_long_prompts_are_left_alone() -> None:
    model = tiny_model("qwen3_moe")
    with moe_offload.offload(model, "50%", predictor=naming([0, 1], 2)) as offloader:
        model(prompt_ids(70))
        assert offloader.stats()["predictor"]["prefetches_started"] == 0


def test_gates_learn_and_predict_live_what_they_learned(tmp_path: Path) -> None:
    model = tiny_model("qwen3_moe")
    report = train_pregate_to(
        tmp_path,
        model,
        model_samples(),
        num_experts=NUM_EXPERTS,
        top_k=TOP_K,
        data="random",
        steps=60,
    )
    held_out = report.held_out["routed+1"]
    assert held_out["recall@2"] > 1.6 * TOP_K / NUM_EXPERTS, held_out
    assert len(held_out["recall@2_per_layer"]) == 1
    about, tensors = read_predictor(tmp_path)
    assert about["shape"]["inner_size"] == tensors["up"].shape[1]
    with moe_offload.offload(model, "50%", predictor=str(tmp_path)) as offloader:
        for seed in (100, 101):
            model.generate(prompt_ids(4, seed=seed), max_new_tokens=20, do_sample=False)
        live = offloader.stats()["predictor"]["recall"]["routed+1"]
    assert live["layers"] == [1]
    assert live["recall_at_top_k"] > TOP_K / NUM_EXPERTS


def test_gates_are_judged_on_the_layer_they_name() -> None:
    """Gates that always name the two experts layer 1 uses most find that share of its choices."""
    model = tiny_model("qwen3_moe")
    samples = model_samples(3)
    chosen: list[torch.Tensor] = []

    class Choices(Observer):
        def layer_routed(self, layer, topk_ids, topk_weights):
            if layer == 1:
                chosen.append(topk_ids[4:])

    with observe(model, Choices()):
        for sample in samples:
            tokens = np.concatenate([sample.prompt, sample.decoded])
            model(torch.from_numpy(tokens)[None])
    uses = torch.cat(chosen).flatten().bincount(minlength=NUM_EXPERTS)
    best = uses.topk(2)
    found = judge_pregates(model, naming(best.indices.tolist(), 2).gates, samples)["routed+1"]
    assert found["recall@2"] == pytest.approx(best.values.sum().item() / uses.sum().item())


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: naming([0], num_layers=5), r"num_layers 5 \(this model: 2\)"),
        (lambda: "pregate", "moe-offload train-predictor pregate"),
    ],
)
def test_gates_of_another_model_are_refused(make, message: str) -> None:
    model = tiny_model("mixtral")
    with pytest.raises(PredictorError, match=message):
        moe_offload.offload(model, predictor=make())
    model(prompt_ids(3))  # untouched


def test_another_hidden_size_is_refused_at_the_first_call() -> None:
    model = tiny_model("mixtral")
    with (
        moe_offload.offload(model, predictor=naming([0], 2, hidden=16)),
        pytest.raises(PredictorError, match="hidden size 16, this model has 32"),
    ):
        model(prompt_ids(3))


def test_one_layer_has_no_next_one() -> None:
    with pytest.raises(PredictorError, match="this model has only one"):
        train_pregates(tiny_model("deepseek_v3"), model_samples(2), NUM_EXPERTS, TOP_K, steps=1)


def test_the_command_trains_gates(tmp_path: Path, capsys: pytest.CaptureFixture) -> None:
    prompts = tmp_path / "prompts.txt"
    prompts.write_text("Once upon a time\nAbstract: We\n")
    arguments = ["train-predictor", "pregate", "--prompts", str(prompts), "--out", str(tmp_path)]
    assert (
        main([*arguments, "--model", "tiny", "--max-new-tokens", "6", "--steps", "2", "--json"])
        == 0
    )
    report = json.loads(capsys.readouterr().out)
    assert len(report["routed+1"]["recall@4_per_layer"]) == 5
    assert main(arguments) == 2
    assert "pregate reads the layers of a model: give --model" in capsys.readouterr().err
