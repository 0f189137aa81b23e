"""`moe-offload ablate`: rows that add up, the same tokens, and a predictor that lies is caught."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch

pytest.importorskip("transformers")

from tiny_models import prompt_ids, tiny_model

import moe_offload
from moe_offload.ablation import AblationError, ablate, bound, labelled, table
from moe_offload.cli import main
from moe_offload.predictors import make_predictor
from moe_offload.predictors.base import Predictor


def test_rows_of_a_small_model() -> None:
    model = tiny_model("qwen3_moe", num_hidden_layers=3)
    prompts = [{"input_ids": prompt_ids(8, seed=seed)} for seed in range(2)]
    prompts = [p | {"attention_mask": torch.ones_like(p["input_ids"])} for p in prompts]
    with moe_offload.offload(model, device_budget="40%") as offloader:
        rows = ablate(
            model,
            prompts,
            {"lookahead": lambda: make_predictor("lookahead")},
            max_new_tokens=6,
            repeats=1,
        )
        assert offloader.predicting is None
        page = offloader.pools[0].layout.payload_bytes
    none, lookahead, oracle = rows
    assert [row["predictor"] for row in rows] == ["none", "lookahead", "oracle"]
    assert none["recall_at_top_k"] is None
    assert none["demand_bytes_saved"] == none["prefetch_bytes_used"] == 0
    assert oracle["recall_at_top_k"] == 1.0
    assert oracle["demand_bytes_saved"] > 0
    for row in rows:
        assert row["generated_tokens"] == 12
        assert row["net_bytes_saved"] == row["demand_bytes_saved"] - row["prefetch_bytes_wasted"]
        assert row["demand_bytes"] + row["demand_bytes_saved"] == none["demand_bytes"]
    assert lookahead["predictor_ms_per_token"] > 0
    limits = bound(rows, 3, page)
    assert limits["misses_per_layer"] == pytest.approx(none["demand_bytes"] / page / 12 / 3)
    assert limits["largest_gain"] >= 1
    assert "lookahead" in table(rows)
    json.dumps(rows)


def test_a_predictor_that_changes_the_model_is_caught() -> None:
    class Meddler(Predictor):
        name = "meddler"

        def layer_input_known(self, layer, hidden):
            hidden.add_(1.0)
            return ()

    model = tiny_model("mixtral")
    with (
        moe_offload.offload(model, device_budget="50%"),
        pytest.raises(AblationError, match="meddler changed the tokens"),
    ):
        ablate(model, [{"input_ids": prompt_ids(8)}], {"meddler": Meddler}, repeats=1)


def test_the_command_prints_one_table_or_one_object(capsys: pytest.CaptureFixture) -> None:
    arguments = ["ablate", "tiny", "--predictor", "lookahead", "--max-new-tokens", "4"]
    arguments += ["--repeats", "1", "--prompt", "Once upon a time"]
    assert main([*arguments, "--json"]) == 0
    found = json.loads(capsys.readouterr().out)
    assert [row["predictor"] for row in found["rows"]] == ["none", "lookahead", "oracle"]
    assert found["bound"]["layer_ms_without_stall"] > 0
    assert main(arguments) == 0
    out = capsys.readouterr().out
    assert "recall@A" in out
    assert "Every run wrote the same tokens." in out


def test_mistakes_are_one_line(capsys: pytest.CaptureFixture) -> None:
    assert main(["ablate", "tiny", "--predictor", "crystal-ball"]) == 2
    assert "expected one of none, auto" in capsys.readouterr().err
    assert main(["ablate", "tiny", "--device-budget", "0%"]) == 2
    assert "device_budget" in capsys.readouterr().err


def test_folders_of_one_name_keep_rows_of_their_own(tmp_path: Path) -> None:
    one, two = tmp_path / "a" / "rpp", tmp_path / "b" / "rpp"
    one.mkdir(parents=True)
    two.mkdir(parents=True)
    names = ["rpp", str(one), str(two), "previous"]
    assert list(labelled(names).values()) == names
    assert labelled([str(one)]) == {"rpp": str(one)}
