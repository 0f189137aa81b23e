"""The benchmark of quantised pages still runs, and compares outputs before it prints times."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

pytest.importorskip("transformers")

BENCH = Path(__file__).resolve().parent.parent / "bench"


def test_quick_run_writes_every_row(tmp_path: Path) -> None:
    output = tmp_path / "results.json"
    script = [sys.executable, str(BENCH / "quantised.py"), "--quick", "--output", str(output)]
    env = {**os.environ, "PYTHONPATH": str(BENCH.parent)}  # also in a checkout never installed
    done = subprocess.run(script, capture_output=True, text=True, check=False, env=env)
    assert done.returncode == 0, done.stderr
    results = json.loads(output.read_text())
    layers = {(row["shape"], row["pages"], row["T"]) for row in results["layer"]}
    assert ("toy gpt-oss", "mxfp4", 1) in layers
    assert len(layers) == 3 * 2 * 2
    formats = [row["weight_format"] for row in results["model"]]
    assert formats == [
        form
        for quantised in ("mxfp4", "fp8_block", "int4_group")
        for form in ("plain", quantised, quantised)
    ]
    shares = {row["contender"]: row["slots"] for row in results["model"]}
    assert shares["mxfp4, as many bytes"] > 3 * shares["bf16, 25 %"]
