"""The command line: what it prints, its exit codes, and one line for every mistake.

Commands run inside this process (`cli.main`), because starting one costs seconds; the few tests
that need a real process say so. The checkpoint is random, its tokenizer knows printable ASCII.
"""

from __future__ import annotations

import json
import os
import re
import shutil
import signal
import subprocess
import sys
from collections.abc import Iterator
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers
from tiny_models import tiny_model
from tokenizers import Regex, Tokenizer, decoders, models, pre_tokenizers
from transformers import AutoModelForCausalLM, PreTrainedTokenizerFast

import moe_offload
from moe_offload import cli, demo
from moe_offload.dense import use_dense_kernels
from moe_offload.huggingface.experts import NAME
from moe_offload.models import tiny_moe_path
from moe_offload.verification import to_aligned_memory

PROMPT = "abc"
STATS = {
    *("hits", "demand_misses", "demand_bytes", "prefetch_bytes_used", "prefetch_bytes_wasted"),
    *("evictions", "stall_seconds", "disk_bytes", "per_layer"),
}
RESULT = {
    *("text", "tokens", "seconds", "tokens_per_second", "peak_rss_bytes", "device_budget_bytes"),
    "stats",
}


def ascii_tokenizer() -> PreTrainedTokenizerFast:
    """One token per printable character, ids as in tiny_models: 0 pad, 1 bos, 2 eos."""
    characters = [chr(code) for code in range(32, 127)]
    vocabulary = {text: i for i, text in enumerate(["<pad>", "<s>", "</s>", *characters])}
    for number in range(len(vocabulary), 128):
        vocabulary[f"<{number}>"] = number
    tokenizer = Tokenizer(models.WordLevel(vocabulary, unk_token="<pad>"))
    tokenizer.pre_tokenizer = pre_tokenizers.Split(Regex("."), "isolated")
    tokenizer.decoder = decoders.Fuse()
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer, pad_token="<pad>", bos_token="<s>", eos_token="</s>"
    )


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("cli") / "model"
    tiny_model("qwen3_moe", dtype=torch.bfloat16).save_pretrained(folder)
    ascii_tokenizer().save_pretrained(folder)
    return folder


@pytest.fixture(autouse=True)
def _verbosity() -> Iterator[None]:
    """The commands quieten transformers for their process, which here is everybody's."""
    before = transformers.logging.get_verbosity()
    yield
    transformers.logging.set_verbosity(before)
    transformers.logging.enable_progress_bar()


def resident_tokens(checkpoint: Path, prompt: str, count: int) -> list[int]:
    model = AutoModelForCausalLM.from_pretrained(
        checkpoint, dtype="auto", experts_implementation=NAME
    )
    use_dense_kernels(model)
    to_aligned_memory(model)
    inputs = ascii_tokenizer()(prompt, return_tensors="pt", return_token_type_ids=False)
    output = model.generate(**inputs, max_new_tokens=count, do_sample=False)
    return output[0, inputs.input_ids.shape[1] :].tolist()


def run(*args: object) -> int:
    return cli.main([str(arg) for arg in args])


def generate(checkpoint: Path, capsys: pytest.CaptureFixture[str], *extra: object) -> Any:
    """Exit code 0; returns (the JSON object, what stood before it, stderr)."""
    capsys.readouterr()
    args = ["generate", checkpoint, "--max-new-tokens", 8, "--json", *extra]
    if not {"--prompt", "--prompt-file"} & set(extra):
        args += ["--prompt", PROMPT]
    assert run(*args) == 0
    captured = capsys.readouterr()
    *before, last = captured.out.rstrip("\n").split("\n")
    return json.loads(last), "\n".join(before), captured.err


# --- generate ---------------------------------------------------------------------------------


def test_json_is_the_last_line_and_complete(
    checkpoint: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    result, streamed, _ = generate(checkpoint, capsys, "--device-budget", "25%")
    assert set(result) >= RESULT
    assert set(result["stats"]) >= STATS
    assert streamed == result["text"]
    assert result["tokens"] == resident_tokens(checkpoint, PROMPT, 8)
    assert result["text"] == ascii_tokenizer().decode(result["tokens"], skip_special_tokens=True)
    assert result["tokens_per_second"] == pytest.approx(8 / result["seconds"])
    assert 0 < result["first_token_seconds"] < result["seconds"]
    stats = result["stats"]
    assert result["device_budget_bytes"] == stats["device_budget_bytes"] == 4 * 4096
    assert stats["demand_misses"] > 0
    assert stats["disk_bytes"] >= stats["demand_bytes"] > 0
    assert len(stats["per_layer"]) == 2
    assert result["peak_rss_bytes"] > 50e6, "torch alone is more"


@pytest.mark.parametrize("option", [("--predictor", "lookahead"), ("--preset", "se-moe")])
def test_predictor_and_preset_are_options(
    checkpoint: Path, option: tuple[str, str], capsys: pytest.CaptureFixture[str]
) -> None:
    result, _, _ = generate(checkpoint, capsys, *option, "--device-budget", "50%")
    assert result["tokens"] == resident_tokens(checkpoint, PROMPT, 8)
    assert result["stats"]["predictor"]["name"] in ("lookahead", "ring")


@pytest.mark.parametrize("policy", ["lru", "lfu", "static"])
@pytest.mark.parametrize("budget", ["8192", "8KiB", "50%", "100%"])
def test_tokens_do_not_depend_on_policy_and_budget(
    checkpoint: Path, policy: str, budget: str, capsys: pytest.CaptureFixture[str]
) -> None:
    result, _, _ = generate(checkpoint, capsys, "--policy", policy, "--device-budget", budget)
    assert result["tokens"] == resident_tokens(checkpoint, PROMPT, 8)
    assert result["stats"]["policy"] == policy


def test_all_resident_is_filled_once(checkpoint: Path, capsys: pytest.CaptureFixture[str]) -> None:
    result, _, _ = generate(checkpoint, capsys, "--device-budget", "100%")
    stats = result["stats"]
    assert stats["fill_bytes"] == 16 * 3 * 32 * 16 * 2  # 16 experts of 3 matrices, bf16
    assert stats["demand_bytes"] == stats["demand_misses"] == 0


def test_prompt_file_is_the_whole_file(
    checkpoint: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    file = tmp_path / "prompt.txt"
    file.write_text("ab cd ef")
    from_file, _, _ = generate(checkpoint, capsys, "--prompt-file", file)
    given, _, _ = generate(checkpoint, capsys, "--prompt", "ab cd ef")
    assert from_file["prompt_tokens"] == 8
    assert from_file["tokens"] == given["tokens"]


def test_sampling_follows_its_seed(checkpoint: Path, capsys: pytest.CaptureFixture[str]) -> None:
    def tokens(*extra: object) -> list[int]:
        return generate(checkpoint, capsys, *extra)[0]["tokens"]

    greedy, one = tokens(), tokens("--temperature", 5, "--seed", 1)
    assert one == tokens("--temperature", 5, "--seed", 1)
    assert one != tokens("--temperature", 5, "--seed", 2)
    assert one != greedy
    assert tokens("--temperature", 5, "--seed", 1, "--top-p", 1e-6) == greedy


def test_timeline(checkpoint: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    file = tmp_path / "trace.json"
    generate(checkpoint, capsys, "--timeline", file)
    assert "demand_copy" in {e.get("cat") for e in json.loads(file.read_text())["traceEvents"]}


def test_without_json_the_summary_is_on_stderr(
    checkpoint: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert run("generate", checkpoint, "--prompt", PROMPT, "--max-new-tokens", 4) == 0
    captured = capsys.readouterr()
    assert len(captured.out.splitlines()) == 1
    assert captured.err.startswith("4 tokens in ")
    assert len(captured.err.splitlines()) == 1


# --- the other commands -----------------------------------------------------------------------


def test_plan(checkpoint: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert run("plan", checkpoint, "--device-budget", "50%") == 0
    text = capsys.readouterr().out
    assert "8 slots, 50.0% of the experts" in text
    assert run("plan", checkpoint, "--device-budget", "50%", "--json") == 0
    assert json.loads(capsys.readouterr().out)["num_slots"] == 8


def test_verify(checkpoint: Path, capsys: pytest.CaptureFixture[str]) -> None:
    args = ["verify", checkpoint, "--max-new-tokens", 4, "--prompt", "ab", "--prompt", "xyz"]
    assert run(*args) == 0
    assert "tokens identical, max |logit difference| 0" in capsys.readouterr().out


def test_verify_fails_when_something_differs(
    checkpoint: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    from moe_offload import layer

    exact = layer.run_experts
    monkeypatch.setattr(
        "moe_offload.huggingface.attach.run_experts", lambda *args: exact(*args) * 1.01
    )
    assert run("verify", checkpoint, "--max-new-tokens", 4, "--prompt", "ab") == cli.FAILED


PROMPTS = [{"domain": "books", "text": "It was"}, {"domain": "math", "text": "2 + 2 ="}]


def test_demo(
    checkpoint: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(demo, "NEW_TOKENS", 6)
    assert demo.demo(str(checkpoint), PROMPTS) == 0
    text = capsys.readouterr().out
    table = [line.split() for line in text.splitlines() if line.endswith(("reference", "yes"))]
    assert [row[0] for row in table] == ["resident", "smallest", "12.5%", "25%", "50%", "100%"]
    assert [row[1] for row in table] == ["all", "2", "2", "4", "8", "16"]
    assert "[books] It was\n    >>> " in text
    assert "[math] 2 + 2 =\n    >>> " in text
    assert "Every run wrote exactly" in text


def test_demo_says_so_when_a_run_differs(
    checkpoint: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    from moe_offload import layer

    monkeypatch.setattr(demo, "NEW_TOKENS", 6)
    exact = layer.run_experts
    monkeypatch.setattr(
        "moe_offload.huggingface.attach.run_experts", lambda *args: -3 * exact(*args)
    )
    assert demo.demo(str(checkpoint), PROMPTS) == cli.FAILED
    text = capsys.readouterr().out
    assert " NO\n" in text
    assert "NOT every run" in text


def test_demo_takes_one_prompt_of_each_domain() -> None:
    prompts = [{"domain": d, "text": t} for d, t in ["a1", "a2", "b1", "c1", "b2"]]
    assert [p["text"] for p in demo._one_per_domain(prompts)] == ["1", "1", "1"]


@pytest.mark.skipif(
    not (tiny_moe_path() / "model.safetensors").is_file(), reason="the packaged model is absent"
)
def test_tiny_is_the_packaged_model(capsys: pytest.CaptureFixture[str]) -> None:
    assert run("generate", "tiny", "--prompt", "Once upon a time", "--max-new-tokens", 4) == 0
    assert len(capsys.readouterr().out) > 4
    assert {prompt["domain"] for prompt in demo._packaged_prompts()} >= {"books", "math"}


@pytest.mark.skipif(
    not (tiny_moe_path() / "model.safetensors").is_file(), reason="the packaged model is absent"
)
def test_the_examples_of_the_readme_run(capsys: pytest.CaptureFixture[str]) -> None:
    readme = Path(moe_offload.__file__).parent.parent / "README.md"
    if not readme.is_file():
        pytest.skip("needs the source tree")
    ten_lines, own_model = re.findall(r"```python\n(.*?)```", readme.read_text(), re.DOTALL)
    exec(ten_lines, {})
    text, hit_rate = capsys.readouterr().out.rstrip("\n").rsplit("\n", 1)
    assert text.startswith("Once upon a time")
    assert 0 < float(hit_rate) < 1

    names = {"torch": torch, "moe_offload": moe_offload, "H": 16, "E": 8}
    names |= {"gate_up": torch.randn(8, 24, 16), "down": torch.randn(8, 16, 12)}
    names["hidden"] = torch.randn(2, 3, 16)
    exec(own_model, names)
    assert names["out"].shape == (2, 3, 16)


# --- mistakes ---------------------------------------------------------------------------------


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


def test_interrupt(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    def interrupt(args: object) -> int:
        raise KeyboardInterrupt

    monkeypatch.setitem(cli._COMMANDS, "doctor", interrupt)
    assert run("doctor") == 130
    assert capsys.readouterr().err == "\nmoe-offload: interrupted\n"


# --- as a process -----------------------------------------------------------------------------


def start(*args: object, **options: Any) -> subprocess.Popen[str]:
    return subprocess.Popen(
        [sys.executable, "-m", "moe_offload", *map(str, args)],
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        env={**os.environ, "PYTHONPATH": str(Path(moe_offload.__file__).parent.parent)},
        **options,
    )


def test_help_and_version_import_nothing_heavy(capsys: pytest.CaptureFixture[str]) -> None:
    code = (
        "import sys; from moe_offload import cli\n"
        "try: cli.main(['--help'])\n"
        "except SystemExit: pass\n"
        "print({'torch', 'transformers', 'numpy'} & set(sys.modules))"
    )
    out = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert out.stdout.rstrip().endswith("set()")
    with pytest.raises(SystemExit) as stop:
        run("--version")
    assert stop.value.code == 0
    assert capsys.readouterr().out == f"moe-offload {moe_offload.__version__}\n"
    assert run() == 0
    assert "commands:" in capsys.readouterr().out


@pytest.mark.slow
def test_a_real_process_is_quiet_and_its_interrupt_is_130(checkpoint: Path, tmp_path: Path) -> None:
    """Without a terminal there is no bar, no warning, no traceback; Ctrl-C ends at a token."""
    folder = Path(shutil.copytree(checkpoint, tmp_path / "long"))
    config = json.loads((folder / "config.json").read_text())
    config["max_position_embeddings"] = 100_000
    (folder / "config.json").write_text(json.dumps(config))

    args = ["generate", folder, "--prompt", "a b", "--max-new-tokens", 90_000, "--temperature", 2]
    # A shell has what it runs in the background ignore this signal, and children inherit that.
    default = partial(signal.signal, signal.SIGINT, signal.SIG_DFL)
    process = start(*args, "--device-budget", "100%", preexec_fn=default)
    assert process.stdout is not None
    assert process.stdout.read(1) != ""  # it writes
    process.send_signal(signal.SIGINT)
    _, err = process.communicate(timeout=60)
    assert process.returncode == 130
    assert err == "\nmoe-offload: interrupted\n"


def test_a_reader_that_stops_is_no_error() -> None:
    process = start()  # the help text
    assert process.stdout is not None
    process.stdout.close()
    assert process.stderr is not None
    err = process.stderr.read()
    process.wait(60)
    assert (process.returncode, err) == (cli.BROKEN_PIPE, "")
