"""`train-predictor --model M --prompts F`: recording and training in one command."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

pytest.importorskip("transformers")

from moe_offload.cli import main
from moe_offload.predictors.artefact import read_predictor


@pytest.mark.parametrize("kind", ["rpp", "preattention"])
def test_a_model_and_prompts_are_enough(
    kind: str, tmp_path: Path, capsys: pytest.CaptureFixture
) -> None:
    prompts = tmp_path / "prompts.txt"
    prompts.write_text("Once upon a time\n\nEnglish: This is\nAbstract: We\n")
    arguments = ["train-predictor", kind, "--model", "tiny", "--prompts", str(prompts)]
    arguments += ["--out", str(tmp_path / kind), "--max-new-tokens", "6", "--steps", "2"]
    assert main([*arguments, "--held-out", "0.4", "--json"]) == 0
    report = json.loads(capsys.readouterr().out)
    assert report["steps"] == 2
    about, _ = read_predictor(tmp_path / kind)
    assert about["kind"] == kind
    assert about["shape"]["num_experts"] == 32
    assert "continued by tiny" in about["training"]["data"]
