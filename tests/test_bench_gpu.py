"""The plan of `make gpu` holds together, and refuses a machine without a GPU before any work."""

from __future__ import annotations

import dataclasses
import importlib
import json
import subprocess
import sys
from collections import Counter
from pathlib import Path

import pytest
import torch

BENCH = Path(__file__).resolve().parent.parent / "bench"


@pytest.fixture
def plan(monkeypatch: pytest.MonkeyPatch):
    monkeypatch.syspath_prepend(str(BENCH))
    monkeypatch.syspath_prepend(str(BENCH / "gpu"))
    return importlib.import_module("run")


def test_every_part_can_be_imported_and_the_whole_fits_nine_minutes(plan) -> None:
    names = [part.name for part in plan.PARTS]
    assert len(set(names)) == len(names)
    assert sum(part.seconds for part in plan.PARTS) <= 540
    for part in plan.PARTS:
        module = importlib.import_module(part.module)
        assert callable(getattr(module, part.function))
        assert module.COLUMNS


@pytest.mark.skipif(torch.cuda.is_available(), reason="would run the benchmarks")
def test_a_machine_without_a_gpu_is_refused_at_once() -> None:
    script = [sys.executable, str(BENCH / "gpu" / "run.py"), "roofs"]
    done = subprocess.run(script, capture_output=True, text=True, check=False)
    assert done.returncode == 1
    assert "no CUDA device" in done.stderr


def test_an_unknown_part_names_the_known() -> None:
    script = [sys.executable, str(BENCH / "gpu" / "run.py"), "rofs"]
    done = subprocess.run(script, capture_output=True, text=True, check=False)
    assert done.returncode == 2
    assert "no part 'rofs'; there are test, roofs" in done.stderr


@pytest.mark.skipif(torch.cuda.is_available(), reason="would run the benchmark")
def test_a_part_that_fails_or_overruns_is_recorded_and_costs_no_other(
    plan, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(plan, "gpu_environment", lambda: {"gpu": "none"})
    parts = {part.name: part for part in plan.PARTS}
    assert not plan.run_part(parts["roofs"], 60.0, tmp_path)  # its process finds no GPU
    record = json.loads((tmp_path / "roofs.json").read_text())
    assert record["outcome"] == "failed with exit code 1"
    assert (record["rows"], record["environment"]) == ([], {"gpu": "none"})
    assert not plan.run_part(parts["routing"], 0.05, tmp_path)
    assert json.loads((tmp_path / "routing.json").read_text())["outcome"].startswith("stopped")
    broken = dataclasses.replace(parts["roofs"], name="broken", module="no_such_module")
    assert not plan.run_part(broken, 60.0, tmp_path)
    assert "No module named" in json.loads((tmp_path / "broken.json").read_text())["outcome"]
    assert not list(tmp_path.glob("*.jsonl"))


def test_rows_are_on_disk_as_they_are_yielded_up_to_a_line_cut_short(plan, tmp_path: Path) -> None:
    rows = tmp_path / "part.rows.jsonl"
    assert plan.read_rows(rows) == []
    rows.write_text('{"us": 1}\n{"us": 2}\n{"us"')
    assert plan.read_rows(rows) == [{"us": 1}, {"us": 2}]


def test_less_time_is_shared_out_and_what_is_left_over_goes_on(plan) -> None:
    parts = plan.PARTS
    planned = sum(part.seconds for part in parts)
    assert plan.shares(parts, planned + 100.0) == parts[0].seconds
    assert plan.shares(parts, planned / 2) == parts[0].seconds / 2
    assert plan.shares(parts[1:], planned) == parts[1].seconds


@pytest.mark.slow
def test_gpu_tests_are_counted_also_when_one_hangs(plan, tmp_path: Path) -> None:
    gpu_tests = importlib.import_module("gpu_tests")
    file = tmp_path / "test_some.py"
    file.write_text(
        "import pytest, time\n"
        "pytestmark = pytest.mark.gpu\n"
        "def test_good(): pass\n"
        "def test_bad(): assert 0\n"
    )
    outcomes, failures, finished = gpu_tests.run_file(str(file), 60.0)
    assert (outcomes, finished) == (Counter(passed=1, failed=1), True)
    assert [failure.rsplit("::", 1)[1] for failure in failures] == ["test_bad"]
    file.write_text(file.read_text() + "def test_hangs(): time.sleep(60)\n")
    outcomes, failures, finished = gpu_tests.run_file(str(file), 8.0)
    assert not finished
    assert outcomes in (Counter(passed=1, failed=1), Counter())  # a slow start may cost all of it


def test_every_file_with_gpu_tests_is_run(plan) -> None:
    gpu_tests = importlib.import_module("gpu_tests")
    folder = Path(__file__).resolve().parent
    marked = {
        f"tests/{path.name}"
        for path in folder.glob("test_*.py")
        if any(word in path.read_text() for word in ("@pytest.mark.gpu", "= pytest.mark.gpu"))
        or "triton_support import" in path.read_text()
    }
    assert marked - {"tests/test_bench_gpu.py"} <= set(gpu_tests.FILES)
