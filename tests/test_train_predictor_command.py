"""The command `train-predictor`: what it makes of traces, and its mistakes in one line."""

from __future__ import annotations

import json
import os
from pathlib import Path
from typing import Any

import numpy as np
import pytest

pytest.importorskip("transformers")

from tiny_models import VOCAB, prompt_ids, tiny_model

import moe_offload
from moe_offload.cli import main
from moe_offload.predictors.artefact import read_predictor
from moe_offload.predictors.train_command import samples_from_trace
from moe_offload.traces import FORMAT, Trace

LAYERS, EXPERTS, CHOICES = 3, 8, 2
DATA = Path(os.environ.get("MOE_OFFLOAD_DATA", "../shared/data")).resolve()
GPT_OSS = DATA / "traces_gptoss20b/gptoss20b_decode_ids.npz"


def test_samples_come_from_decoded_tokens_or_from_text_after_its_first_quarter() -> None:
    rows = 30
    sequence = np.array([0, 1] * 10 + [2] * 8 + [-1, 3])
    phase = np.array([0] * 4 + [1] * 16 + [0] * 8 + [0, 1])
    ids = np.arange(rows)[:, None, None].repeat(LAYERS, 1).repeat(CHOICES, 2) % EXPERTS
    trace = Trace(
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
    trace.ids[4, 0, 0] = -1  # a row that was muted
    assert [sample.prompt.tolist() for sample in samples_from_trace(trace)] == [[1, 3], [20, 21]]
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
        (["rpp", "--prompts", "setup.py", "--trace", "x.npz"], "give --model MODEL too"),
    ],
)
def test_mistakes_of_the_command_are_one_line(
    arguments: list[str], message: str, tmp_path: Path, capsys: pytest.CaptureFixture
) -> None:
    assert main(["train-predictor", *arguments, "--out", str(tmp_path / "out")]) == 2
    (line,) = capsys.readouterr().err.strip().splitlines()
    assert message in line
    assert not (tmp_path / "out").exists()


def a_trace(experts: int = 8, choices: int = 2, vocab: int = 50, tokens: bool = True) -> Trace:
    """Two sequences of 16 tokens through two layers."""
    rng = np.random.default_rng(0)
    rows = np.arange(32)
    return Trace(
        rng.permuted(np.tile(np.arange(experts), (32, 2, 1)), axis=2)[..., :choices].astype(
            np.int16
        ),
        None,
        (rows // 16).astype(np.int32),
        (rows % vocab if tokens else np.full(32, -1)).astype(np.int32),
        np.ones(32, np.uint8),
        rows,
        [experts] * 2,
    )


def write_arrays(path: Path, **change: Any) -> None:
    """A trace file with some arrays replaced."""
    trace = a_trace()
    header = {"format": FORMAT, "num_experts": [8, 8], "model": "", "layer_names": [], "parts": 1}
    names = ("ids", "sequence", "token_id", "phase", "call")
    arrays = {f"{name}.00000": getattr(trace, name) for name in names}
    arrays |= {f"{name}.00000": value for name, value in change.items() if name != "parts"}
    header["parts"] = change.get("parts", 1)
    np.savez(path, header=np.array(json.dumps(header)), **arrays)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"parts": 0}, "the trace is empty"),
        (
            {"ids": np.zeros((0, 2, 2)), "sequence": [], "token_id": [], "phase": [], "call": []},
            "the trace is empty",
        ),
        ({"ids": np.zeros((32, 3, 2))}, "ids must be [rows, layers, choices] with 2 layers"),
        ({"token_id": np.zeros(31)}, "token_id must be [32], got shape (31,)"),
        ({"ids": np.full((32, 2, 2), 8)}, "layer 0 has experts [0, 8), got expert 8"),
    ],
)
def test_malformed_traces_are_one_line(
    change: dict[str, Any], message: str, tmp_path: Path, capsys: pytest.CaptureFixture
) -> None:
    write_arrays(tmp_path / "bad.npz", **change)
    arguments = ["train-predictor", "rpp", "--trace", str(tmp_path / "bad.npz")]
    assert main([*arguments, "--out", str(tmp_path / "out")]) == 2
    (line,) = capsys.readouterr().err.strip().splitlines()
    assert "bad.npz" in line
    assert message in line


@pytest.mark.parametrize(
    ("traces", "message"),
    [
        ([a_trace(tokens=False)], "no sequence with token ids"),
        ([a_trace(), a_trace(experts=16)], "but the first trace has 2 MoE layers of 8 experts"),
        ([a_trace(), a_trace(choices=3)], "the same number of experts per token, got [2, 3]"),
        ([a_trace().rows(slice(0, 16))], "expected at least 2 sequences with routing, got 1"),
    ],
)
def test_traces_that_teach_nothing_or_differ_are_refused(
    traces: list[Trace], message: str, tmp_path: Path, capsys: pytest.CaptureFixture
) -> None:
    arguments = ["train-predictor", "rpp", "--out", str(tmp_path / "out")]
    for number, trace in enumerate(traces):
        trace.save(tmp_path / f"{number}.npz")
        arguments += ["--trace", str(tmp_path / f"{number}.npz")]
    assert main(arguments) == 2
    (line,) = capsys.readouterr().err.strip().splitlines()
    assert message in line


def test_a_trace_of_another_model_is_refused(tmp_path: Path, capsys: pytest.CaptureFixture) -> None:
    trace = saved_trace(tmp_path / "run.npz")
    arguments = ["train-predictor", "rpp", "--trace", str(trace), "--model", "tiny"]
    assert main([*arguments, "--out", str(tmp_path / "out")]) == 2
    assert "the trace is of another model" in capsys.readouterr().err


def test_a_predictor_for_other_experts_is_refused_where_it_is_used(
    tmp_path: Path, capsys: pytest.CaptureFixture
) -> None:
    a_trace().save(tmp_path / "run.npz")
    out = str(tmp_path / "out")
    arguments = ["train-predictor", "rpp", "--trace", str(tmp_path / "run.npz"), "--out", out]
    assert main([*arguments, "--steps", "1", "--held-out", "0.5", "--json"]) == 0
    capsys.readouterr()
    for command in (["generate", "tiny", "--prompt", "Hi"], ["ablate", "tiny", "--prompt", "Hi"]):
        assert main([*command, "--predictor", out, "--max-new-tokens", "2"]) == 2
        (line,) = capsys.readouterr().err.strip().splitlines()
        assert "was trained for another model: num_layers 2 (this model: 6)" in line
        assert "num_experts 8 (this model: 32)" in line


@pytest.mark.skipif(not GPT_OSS.is_file(), reason="the gpt-oss trace is not on this machine")
def test_a_published_trace_trains_a_predictor(
    tmp_path: Path, capsys: pytest.CaptureFixture
) -> None:
    arguments = ["train-predictor", "rpp", "--trace", f"{GPT_OSS}#0-2000"]
    arguments += ["--out", str(tmp_path / "out"), "--steps", "2", "--held-out", "0.2", "--json"]
    assert main(arguments) == 0
    assert json.loads(capsys.readouterr().out)["all"]["num_experts"] == 32
    assert read_predictor(tmp_path / "out")[0]["shape"]["num_layers"] == 24
