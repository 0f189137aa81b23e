"""The tests marked gpu, as a part of `make gpu`: one row per outcome."""

from __future__ import annotations

import re
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

from harness import Row

REPOSITORY = Path(__file__).resolve().parent.parent.parent
COLUMNS = {"outcome": "tests", "count": "count"}


def run(budget_s: float) -> Iterator[Row]:
    """Raises SystemExit when a test failed or none ran."""
    command = [sys.executable, "-m", "pytest", "-q", "-m", "gpu", "-p", "no:cacheprovider", "tests"]
    done = subprocess.run(command, cwd=REPOSITORY, stdout=subprocess.PIPE, text=True, check=False)
    print(done.stdout[-6000:])
    counts = re.findall(r"(\d+) (passed|failed|error|errors|skipped)", done.stdout)
    for count, outcome in counts:
        yield {"outcome": outcome, "count": int(count)}
    if done.returncode != 0 or not any(outcome == "passed" for _, outcome in counts):
        raise SystemExit(f"pytest ended with {done.returncode}")
