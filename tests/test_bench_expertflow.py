"""The study's harness: prompts from files, tokens compared before any time is printed."""

from __future__ import annotations

import gzip
import json
import subprocess
import sys
from pathlib import Path

import pytest

pytest.importorskip("transformers")

FOLDER = Path(__file__).resolve().parent.parent / "bench" / "expertflow"
ROWS = {
    "alpaca/alpaca_eval_5000.jsonl.gz": {"instruction": "Name a fruit.", "input": ""},
    "wmt16/newstest2016.de-en.jsonl.gz": {"en": "The house is old.", "de": "Das Haus ist alt."},
    "summarisation_scitldr/scitldr_a_test.jsonl.gz": {"document": "We measure a cache. " * 40},
    "aime2024/aime2024.jsonl": {"problem": "Find the number of minutes."},
}


@pytest.fixture
def data(tmp_path: Path) -> Path:
    for name, row in ROWS.items():
        path = tmp_path / name
        path.parent.mkdir(parents=True)
        opener = gzip.open if path.suffix == ".gz" else open
        with opener(path, "wt") as file:
            file.write(json.dumps(row) + "\n")
    return tmp_path


@pytest.fixture
def workloads(monkeypatch: pytest.MonkeyPatch):
    monkeypatch.syspath_prepend(str(FOLDER))
    import workloads

    return workloads


def test_prompts_are_in_the_models_formats_cut_and_repeated(workloads, data: Path) -> None:
    assert workloads.prompts("alpaca", 2, data) == ["<|user|>Name a fruit.<|assistant|>"] * 2
    assert workloads.prompts("wmt16", 1, data) == ["English: The house is old.\nGerman:"]
    (summary,) = workloads.prompts("scitldr", 1, data)
    assert len(summary.removesuffix("\n\nIn short:").split()) == workloads.MAX_WORDS
    mixed = workloads.prompts("mixed", 6, data)
    assert len(mixed) == 6
    assert mixed[:2] == [workloads.prompts(name, 1, data)[0] for name in ("alpaca", "wmt16")]


def test_a_users_own_xsum_file_is_read(workloads, tmp_path: Path) -> None:
    path = tmp_path / "mine.jsonl"
    path.write_text(json.dumps({"document": "An article."}) + "\n")
    assert workloads.prompts("xsum", 1, tmp_path, xsum=path) == ["An article.\n\nIn short:"]
    path.write_text(json.dumps({"title": "no text"}) + "\n")
    with pytest.raises(ValueError, match="expected a field document"):
        workloads.prompts("xsum", 1, tmp_path, xsum=path)


def test_what_is_missing_is_named(workloads, tmp_path: Path) -> None:
    with pytest.raises(FileNotFoundError, match=r"alpaca_eval_5000\.jsonl\.gz is not there"):
        workloads.prompts("alpaca", 1, tmp_path)
    with pytest.raises(ValueError, match="expected one of alpaca"):
        workloads.prompts("nope", 1, tmp_path)
    with pytest.raises(ValueError, match="path of your own XSUM file"):
        workloads.prompts("xsum", 1, tmp_path)


def test_another_models_rows_need_a_file_of_their_own(data: Path, tmp_path: Path) -> None:
    script = [sys.executable, str(FOLDER / "live.py"), "--data", str(data)]
    done = subprocess.run(
        [*script, "--model", str(tmp_path)], capture_output=True, text=True, check=False
    )
    assert done.returncode == 2
    assert "--model needs --name: the rows of two models never share a file" in done.stderr


@pytest.mark.slow
def test_every_preset_is_a_row(data: Path, tmp_path: Path) -> None:
    output = tmp_path / "live.json"
    script = [sys.executable, str(FOLDER / "live.py"), "--quick", "--part", "1/2"]
    script += ["--data", str(data)]
    done = subprocess.run(
        [*script, "--output", str(output)], capture_output=True, text=True, check=False
    )
    assert done.returncode == 0, done.stderr
    rows = json.loads(output.read_text())["rows"]
    assert len(rows) == 6
    for row in rows:
        assert 0 <= row["hit_rate_without_prefetch"] <= row["hit_rate"] <= 1
        assert row["distinct_per_step"] > 0
        assert row["belady_kb_per_token"] > 0
        assert (row["swap_back_kb_per_token"] > 0) == (row["preset"] == "cache-moe-swap-back")
    assert {row["schedule"] for row in rows if row["preset"] == "expertflow"} == {"route"}
