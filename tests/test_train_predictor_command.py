"""The command `train-predictor`: what it makes of traces, and its mistakes in one line."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest

pytest.importorskip("transformers")

from tiny_models import VOCAB, prompt_ids, tiny_model

import moe_offload
from moe_offload.cli import main
from moe_offload.predictors.artefact import read_predictor
from moe_offload.predictors.train_command import samples_from_trace

traces = pytest.importorskip("moe_offload.traces", reason="traces are not in this version")
LAYERS, EXPERTS, CHOICES = 3, 8, 2


def test_samples_come_from_decoded_tokens_or_from_text_after_its_first_quarter() -> None:
    rows = 30
    sequence = np.array([0, 1] * 10 + [2] * 8 + [-1, 3])
    phase = np.array([0] * 4 + [1] * 16 + [0] * 8 + [0, 1])
    ids = np.arange(rows)[:, None, None].repeat(LAYERS, 1).repeat(CHOICES, 2) % EXPERTS
    trace = traces.Trace(
        ids.astype(np.int16),
        None,
        sequence.astype(np.int32),
        np.arange(rows, dtype=np.int32),
        phase.astype(np.uint8),
        np.arange(rows, dtype=np.int64),
        [EXPERTS] * LAYERS,
    ).check()
    first, second, text = samples_from_trace(trace)
    assert first.prompt.tolist() == [0, 2]
    assert first.decoded.tolist() == list(range(4, 20, 2))
    assert (first.experts[:, 0, 0] == first.decoded % EXPERTS).all()
    assert second.prompt.tolist() == [1, 3]
    assert text.prompt.tolist() == [20, 21]
    assert len(text.decoded) == 6
    trace.token_id[:] = -1
    assert samples_from_trace(trace) == []


def saved_trace(path: Path, model=None) -> Path:
    model = model or tiny_model("mixtral")
    with moe_offload.record(model) as trace:
        for seed in range(4):
            model.generate(prompt_ids(4, seed=seed), max_new_tokens=8, do_sample=False)
    trace.save(path)
    return path


def test_the_command_trains_from_a_trace(tmp_path: Path, capsys: pytest.CaptureFixture) -> None:
    model = tiny_model("mixtral")
    trace = saved_trace(tmp_path / "run.npz", model)
    out = tmp_path / "rpp"
    arguments = ["train-predictor", "rpp", "--trace", str(trace), "--out", str(out)]
    assert main([*arguments, "--steps", "3", "--held-out", "0.5", "--json"]) == 0
    report = json.loads(capsys.readouterr().out)
    assert report["steps"] == 3
    assert report["all"]["tokens"] == 2 * 7
    about, _ = read_predictor(out)
    assert about["shape"]["num_layers"] == 2
    assert about["shape"]["vocab_size"] <= VOCAB


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["rpp"], "nothing to learn from: give --trace F"),
        (["preattention", "--trace", "x.npz"], "preattention reads the layers of a model"),
        (["rpp", "--trace", "missing.npz"], "missing.npz"),
        (["rpp", "--model", "tiny", "--prompts", "missing.txt"], "there is no file missing.txt"),
        (["rpp", "--trace", "setup.py"], "setup.py"),
    ],
)
def test_mistakes_of_the_command_are_one_line(
    arguments: list[str], message: str, tmp_path: Path, capsys: pytest.CaptureFixture
) -> None:
    assert main(["train-predictor", *arguments, "--out", str(tmp_path / "out")]) == 2
    (line,) = capsys.readouterr().err.strip().splitlines()
    assert message in line
    assert not (tmp_path / "out").exists()


def test_a_trace_of_another_model_is_refused(tmp_path: Path, capsys: pytest.CaptureFixture) -> None:
    trace = saved_trace(tmp_path / "run.npz")
    arguments = ["train-predictor", "rpp", "--trace", str(trace), "--model", "tiny"]
    assert main([*arguments, "--out", str(tmp_path / "out")]) == 2
    assert "the trace is of another model" in capsys.readouterr().err
