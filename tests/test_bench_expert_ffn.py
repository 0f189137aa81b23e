"""The kernel benchmark still runs, and prints a time only beside a measured error."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest

pytest.importorskip("transformers")

BENCH = Path(__file__).resolve().parent.parent / "bench"


def test_quick_run_prints_every_contender_beside_its_error() -> None:
    script = [sys.executable, str(BENCH / "expert_ffn.py"), "--quick"]
    env = {key: value for key, value in os.environ.items() if key != "PYTHONPATH"}
    done = subprocess.run(script, capture_output=True, text=True, check=False, env=env)
    assert done.returncode == 0, done.stderr
    rows = [line for line in done.stdout.splitlines() if line.startswith(("  ours", "  transf"))]
    names = {line[2:].split("  ")[0] for line in rows}
    assert {"ours", "ours, plain", "transformers grouped_mm", "transformers eager"} <= names
    assert "ours, paged layer, all resident" in names
    for line in rows:
        assert float(line.split()[-1]) <= (1.2 if line.startswith("  ours") else 2.0), line
