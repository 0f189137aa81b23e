"""The command line: what each command prints and returns."""

from __future__ import annotations

import json
import re
from pathlib import Path
from typing import Any

import pytest
import torch
from cli_cases import PROMPT, ascii_tokenizer, keep_verbosity, run, write_checkpoint
from transformers import AutoModelForCausalLM

import moe_offload
from moe_offload import cli, demo
from moe_offload.dense import use_dense_kernels
from moe_offload.huggingface.experts import NAME
from moe_offload.models import tiny_moe_path
from moe_offload.verification import to_aligned_memory

STATS = {
    *("hits", "demand_misses", "demand_bytes", "prefetch_bytes_used", "prefetch_bytes_wasted"),
    *("evictions", "stall_seconds", "disk_bytes", "per_layer"),
}


RESULT = {
    *("text", "tokens", "seconds", "tokens_per_second", "peak_rss_bytes", "device_budget_bytes"),
    "stats",
}


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_checkpoint(tmp_path_factory.mktemp("cli") / "model")


_verbosity = pytest.fixture(autouse=True)(keep_verbosity)


def resident_tokens(checkpoint: Path, prompt: str, count: int) -> list[int]:
    model = AutoModelForCausalLM.from_pretrained(
        checkpoint, dtype="auto", experts_implementation=NAME
    )
    use_dense_kernels(model)
    to_aligned_memory(model)
    inputs = ascii_tokenizer()(prompt, return_tensors="pt", return_token_type_ids=False)
    output = model.generate(**inputs, max_new_tokens=count, do_sample=False)
    return output[0, inputs.input_ids.shape[1] :].tolist()


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
