"""The plan of `make gpu` holds together, and refuses a machine without a GPU before any work."""

from __future__ import annotations

import importlib
import subprocess
import sys
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
        assert callable(module.run)
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
