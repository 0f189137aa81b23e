"""A mistake on the command line is one line on stderr and exit code 2."""

from __future__ import annotations

import shutil
from pathlib import Path

import pytest
import transformers
from cli_cases import PROMPT, ascii_tokenizer, keep_verbosity, run, write_checkpoint

from moe_offload import cli


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_checkpoint(tmp_path_factory.mktemp("cli") / "model")


_verbosity = pytest.fixture(autouse=True)(keep_verbosity)


def mistake(capsys: pytest.CaptureFixture[str], *args: object) -> str:
    """The one line that a wrong command prints; exit code 2, nothing on stdout."""
    capsys.readouterr()
    try:
        code = run(*args)
    except SystemExit as exit:  # argparse
        code = exit.code
    captured = capsys.readouterr()
    assert code == cli.USAGE == 2
    assert captured.out == ""
    (line,) = captured.err.splitlines()
    assert line.startswith("moe-offload")
    return line


@pytest.mark.parametrize("command", ["generate", "plan", "verify"])
@pytest.mark.parametrize(
    ("budget", "expected"),
    [
        ("banana", "got 'banana'"),
        ("0", "got '0'"),
        ("-3", "got '-3'"),
        ("120%", "share must lie in"),
        ("5QB", "got '5QB'"),
        ("1000", "need at least 8192 bytes"),
        ("1%", "need at least 8192 bytes"),
    ],
)
def test_budgets(
    checkpoint: Path,
    command: str,
    budget: str,
    expected: str,
    capsys: pytest.CaptureFixture[str],
) -> None:
    prompt = [] if command == "plan" else ["--prompt", PROMPT]
    line = mistake(capsys, command, checkpoint, *prompt, f"--device-budget={budget}")
    assert expected in line
    assert line.startswith(f"moe-offload {command}: ")


@pytest.mark.parametrize("command", ["generate", "plan", "verify"])
def test_paths(command: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    prompt = [] if command == "plan" else ["--prompt", PROMPT]
    missing = tmp_path / "nothing"
    line = mistake(capsys, command, missing, *prompt)
    assert f"{missing}: no such folder" in line
    assert "has no config.json" in mistake(capsys, command, tmp_path, *prompt)
    line = mistake(capsys, command, "some/model", *prompt)  # offline, see conftest
    assert "some/model" in line
    assert "hub id that exists and can be reached" in line


def test_damaged_files(
    checkpoint: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    args = ["--prompt", PROMPT]
    folder = Path(shutil.copytree(checkpoint, tmp_path / "copy"))
    weights = folder / "model.safetensors"
    with open(weights, "r+b") as file:
        file.truncate(weights.stat().st_size - 1)
    assert "truncated" in mistake(capsys, "generate", folder, *args)
    weights.unlink()
    assert "expected model.safetensors" in mistake(capsys, "generate", folder, *args)
    shutil.copy(checkpoint / "model.safetensors", folder)
    (folder / "tokenizer.json").unlink()
    (folder / "tokenizer_config.json").unlink()
    assert "cannot load a tokenizer" in mistake(capsys, "generate", folder, *args)


def test_unsupported_models(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    config = transformers.LlamaConfig(
        vocab_size=128,
        hidden_size=16,
        intermediate_size=16,
        num_hidden_layers=1,
        num_attention_heads=2,
    )
    transformers.LlamaForCausalLM(config).save_pretrained(tmp_path / "dense")
    ascii_tokenizer().save_pretrained(tmp_path / "dense")
    line = mistake(capsys, "generate", tmp_path / "dense", "--prompt", PROMPT)
    assert "LlamaForCausalLM has no routed experts" in line
    text = (tmp_path / "dense" / "config.json").read_text()
    (tmp_path / "dense" / "config.json").write_text(text.replace('"llama"', '"no_such_type"'))
    assert "no_such_type" in mistake(capsys, "plan", tmp_path / "dense")


def test_prompts(checkpoint: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    def line(*args: object) -> str:
        return mistake(capsys, "generate", checkpoint, *args)

    assert "128" in line("--prompt", "a" * 129)
    assert "exceeds the model's context of 128" in line("--prompt", "a" * 125)
    assert "the prompt is empty" in line("--prompt", "")
    assert "one of the arguments --prompt --prompt-file is required" in line()
    assert "not allowed with" in line("--prompt", "a", "--prompt-file", "b")
    file = tmp_path / "prompt.txt"
    assert f"--prompt-file {file}: No such file" in line("--prompt-file", file)
    file.write_bytes(b"\xff\xfe")
    assert "expected UTF-8" in line("--prompt-file", file)


@pytest.mark.parametrize(
    ("args", "expected"),
    [
        (["--max-new-tokens", "0"], "expected a whole number of at least 1, got '0'"),
        (["--max-new-tokens", "many"], "got 'many'"),
        (["--temperature", "-1"], "expected a number of at least 0, got '-1'"),
        (["--temperature", "nan"], "got 'nan'"),
        (["--top-p", "0"], "above 0 and at most 1, got '0'"),
        (["--policy", "best"], "invalid choice: 'best'"),
        (["--timeline", "/nowhere/trace.json"], "--timeline /nowhere/trace.json"),
        (["--unknown"], "unrecognized arguments: --unknown"),
    ],
)
def test_arguments(
    checkpoint: Path, args: list[str], expected: str, capsys: pytest.CaptureFixture[str]
) -> None:
    assert expected in mistake(capsys, "generate", checkpoint, "--prompt", PROMPT, *args)


def test_unknown_command(capsys: pytest.CaptureFixture[str]) -> None:
    assert "invalid choice: 'nope'" in mistake(capsys, "nope")


def test_a_missing_packaged_model_is_explained(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr("moe_offload.cli_generate.tiny_moe_path", lambda: tmp_path)
    assert "complete checkout" in mistake(capsys, "plan", "tiny")


def test_surprises_are_one_line_too_and_can_be_traced(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def surprise(args: object) -> int:
        raise KeyError("not\nforeseen")

    monkeypatch.setitem(cli._COMMANDS, "doctor", surprise)
    assert "KeyError: 'not\\nforeseen' (--traceback shows where)" in mistake(capsys, "doctor")
    with pytest.raises(KeyError):
        run("doctor", "--traceback")
