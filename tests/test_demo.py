"""`moe-offload demo`: texts, the table over budgets, and the verdict."""

from __future__ import annotations

from pathlib import Path

import pytest
from cli_cases import keep_verbosity, write_checkpoint

from moe_offload import cli, demo


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_checkpoint(tmp_path_factory.mktemp("cli") / "model")


_verbosity = pytest.fixture(autouse=True)(keep_verbosity)
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
