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


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["rpp"], "nothing to learn from: give --trace F"),
        (["preattention", "--trace", "x.npz"], "preattention reads the layers of a model"),
        (["rpp", "--model", "tiny", "--prompts", "missing.txt"], "there is no file missing.txt"),
    ],
)
def test_mistakes_are_one_line(
    arguments: list[str], message: str, tmp_path: Path, capsys: pytest.CaptureFixture
) -> None:
    assert main(["train-predictor", *arguments, "--out", str(tmp_path / "out")]) == 2
    (line,) = capsys.readouterr().err.strip().splitlines()
    assert message in line
    assert not (tmp_path / "out").exists()
