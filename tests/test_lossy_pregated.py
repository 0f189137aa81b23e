"""Pre-gates that decide: what is executed is what they named, it is told everywhere, and undone."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from tiny_models import NUM_EXPERTS, TOP_K, prompt_ids, tiny_model

import moe_offload
from moe_offload.cli import main
from moe_offload.doctor import examine, render
from moe_offload.errors import PredictorError, StateError
from moe_offload.huggingface.observe import routed_layers
from moe_offload.predictors.artefact import save_predictor
from moe_offload.predictors.lossy_pregated import LossyPregated
from moe_offload.predictors.pregate import PreGates, PreGateShape

LAYERS, HIDDEN = 3, 32


def some_gates() -> PreGates:
    torch.manual_seed(5)
    gates = PreGates(PreGateShape(LAYERS, NUM_EXPERTS, TOP_K, HIDDEN, inner_size=4))
    torch.nn.init.normal_(gates.linear, std=0.5)
    torch.nn.init.normal_(gates.down)
    return gates


def with_gates(model: Any, folder: Path, name: str = "pregate") -> Any:
    gates = some_gates()
    shape = vars(gates.shape)
    save_predictor(folder / "predictors" / name, "pregate", gates.state_dict(), shape, {}, "a test")
    model.config._name_or_path = str(folder)
    return model


def pregate_by_hand(model: Any, gates: PreGates) -> None:
    """The paper's routing on a resident model: float64, a loop per token, hooks of its own."""
    state: dict[int, torch.Tensor] = {}

    def block_hook(index: int):
        def hook(module, args):
            x = args[0].double().reshape(-1, HIDDEN)
            x = x / (x.square().mean(-1, keepdim=True) + 1e-6).sqrt()
            inner = x @ gates.up[index].double().T + gates.up_bias[index].double()
            logits = x @ gates.linear[index].double().T + gates.bias[index].double()
            state[index + 1] = logits + (inner * inner.sigmoid()) @ gates.down[index].double().T

        return hook

    def experts_hook(index: int):
        def hook(module, args, kwargs):
            hidden, ids, weights = [*args, *kwargs.values()]
            new_ids, new_weights = torch.empty_like(ids), torch.empty_like(weights)
            for row, logits in enumerate(state[index]):
                best = logits.argsort(descending=True)[: ids.shape[1]]
                share = logits[best].exp() / logits[best].exp().sum()
                new_ids[row], new_weights[row] = best, share * weights[row].sum()
            return (hidden, new_ids, new_weights), {}

        return hook

    for index, layer in enumerate(routed_layers(model)):
        if index + 1 < LAYERS:
            layer.block.register_forward_pre_hook(block_hook(index))
        if index > 0:
            layer.experts.register_forward_pre_hook(experts_hook(index), with_kwargs=True)


def generate(model: Any, seed: int = 0) -> list[list[int]]:
    ids = prompt_ids(9, 2, seed)
    return model.generate(ids, max_new_tokens=12, do_sample=False).tolist()


@pytest.mark.parametrize("name", ["qwen3_moe", "mixtral", "gpt_oss"])
def test_what_the_gates_named_is_what_is_executed(name: str, tmp_path: Path) -> None:
    resident = tiny_model(name, num_hidden_layers=LAYERS, **_layer_types(name))
    exact = generate(resident)
    exact_logits = resident(prompt_ids(80)).logits
    by_hand = tiny_model(name, num_hidden_layers=LAYERS, **_layer_types(name))
    pregate_by_hand(by_hand, stored_gates())
    expected, expected_logits = generate(by_hand), by_hand(prompt_ids(80)).logits
    model = with_gates(resident, tmp_path)
    outputs = []
    for budget in ("20%", "60%"):
        with moe_offload.offload(model, budget, preset="lossy_pregated") as offloader:
            offloader.chaos(1, max_delay_us=50, reorder=True, evict_probability=0.1)
            outputs.append(generate(model))
            logits = model(prompt_ids(80)).logits  # a prompt too long to be prefetched for
            recall = offloader.stats()["predictor"]["recall"]["routed+1"]
        assert recall["recall_at_top_k"] == 1.0, "nothing is mispredicted"
        torch.testing.assert_close(logits, expected_logits, rtol=1e-4, atol=1e-4)
        assert not torch.allclose(logits, exact_logits, rtol=1e-2, atol=1e-2)
    assert outputs[0] == outputs[1] == expected, "lossy, but not random"
    assert generate(model) == exact, "restored"


def _layer_types(name: str) -> dict[str, Any]:
    return {"layer_types": ["full_attention"] * LAYERS} if name == "gpt_oss" else {}


def stored_gates() -> PreGates:
    """The gates in the precision they are stored in."""
    gates = some_gates()
    with torch.no_grad():
        for tensor in gates.parameters():
            tensor.copy_(tensor.to(torch.bfloat16))
    return gates


def test_it_is_told_and_refused_where_exactness_is_promised(tmp_path: Path) -> None:
    model = with_gates(tiny_model("qwen3_moe", num_hidden_layers=LAYERS), tmp_path)
    with moe_offload.offload(model, "50%", preset="pregated-moe") as offloader:
        assert offloader.stats()["lossy"] is None
        assert "LOSSY" not in str(moe_offload.plan(model))
    with moe_offload.offload(model, "50%", preset="lossy_pregated") as offloader:
        model(prompt_ids(3))
        stats = offloader.stats()
        assert stats["lossy"] == "lossy_pregated"
        assert stats["predictor"]["changes_tokens"] is True
        assert stats["predictor"]["gates"].endswith("predictors/pregate")
        found = moe_offload.plan(model)
        assert found.lossy == "lossy_pregated"
        assert "LOSSY: lossy_pregated is on" in str(found)
        with pytest.raises(StateError, match="verify: this model runs lossy_pregated"):
            moe_offload.verify(model, [[5, 6]])
        with pytest.raises(StateError, match="batch_generate: this model runs lossy_pregated"):
            moe_offload.batch_generate(model, [[5, 6]], 1)
    report = examine()
    assert [name for name, entry in report["presets"].items() if entry["lossy"]] == [
        "lossy_pregated"
    ]
    assert "lossy_pregated (CHANGES TOKENS)" in render(report)


def test_ablate_refuses_it(capsys: pytest.CaptureFixture) -> None:
    assert main(["ablate", "tiny", "--predictor", "lossy_pregated"]) == 2
    assert "ablate: lossy_pregated changes tokens" in capsys.readouterr().err


def test_gates_tuned_for_it_go_first_and_a_path_is_never_lossy(tmp_path: Path) -> None:
    model = with_gates(tiny_model("qwen3_moe", num_hidden_layers=LAYERS), tmp_path)
    exact = generate(model)
    with_gates(model, tmp_path, "lossy_pregated")
    with moe_offload.offload(model, predictor="lossy_pregated") as offloader:
        model(prompt_ids(3))
        told = offloader.stats()["predictor"]["gates"]
    assert told.endswith("predictors/lossy_pregated")
    with moe_offload.offload(model, predictor=told) as offloader:
        assert offloader.lossy is None
        assert generate(model) == exact


def test_without_gates_the_error_says_how_to_get_some() -> None:
    model = tiny_model("qwen3_moe", num_hidden_layers=LAYERS)
    with pytest.raises(PredictorError, match="moe-offload train-predictor pregate"):
        moe_offload.offload(model, preset="lossy_pregated")
    model(prompt_ids(3))  # untouched


def test_a_predictor_in_its_place_is_exact_again(tmp_path: Path) -> None:
    model = with_gates(tiny_model("qwen3_moe", num_hidden_layers=LAYERS), tmp_path)
    exact = generate(model)
    with moe_offload.offload(model, "50%") as offloader:
        offloader.predict_with(model, LossyPregated(some_gates()))
        assert generate(model) != exact
        offloader.predict_with(model, None)
        assert offloader.lossy is None
        assert generate(model) == exact
