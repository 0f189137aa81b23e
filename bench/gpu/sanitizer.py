"""compute-sanitizer over the smallest kernel tests: memory errors, then races in shared memory.

The tool comes with the CUDA toolkit; where it is not found the part says so and is done. It slows
kernels ten to a hundred times, hence the few small cases.
"""

from __future__ import annotations

import re
import shutil
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path

from harness import Row

REPOSITORY = Path(__file__).resolve().parent.parent.parent
COLUMNS = {"tool": "tool", "outcome": "outcome", "errors": "errors", "seconds": "s"}
# Decode and prefill, off every tile: plain and transposed in bf16, and one quantised format.
CASES = "(off and every and bfloat16 and not float16) or (off and every and mxfp4)"


def find() -> str | None:
    places = ["/usr/local/cuda/bin/compute-sanitizer", "compute-sanitizer"]
    return next((path for place in places if (path := shutil.which(place))), None)


def run(budget_s: float) -> Iterator[Row]:
    """Raises SystemExit when a tool found errors or the tests failed under it."""
    tool, stop = find(), time.perf_counter() + budget_s
    if tool is None:
        yield {"tool": "compute-sanitizer", "outcome": "not found: nothing was checked"}
        return
    clean = True
    for kind, others in (("memcheck", 1), ("racecheck", 0)):
        command = [tool, "--tool", kind, "--error-exitcode", "9", sys.executable, "-m", "pytest"]
        command += ["-q", "-x", "-m", "gpu", "-p", "no:cacheprovider", "-k", CASES]
        start = time.perf_counter()
        try:
            done = subprocess.run(
                [*command, "tests/test_cuda_kernels.py"],
                cwd=REPOSITORY,
                capture_output=True,
                text=True,
                timeout=max((stop - start) / (1 + others), 1.0),
                check=False,
            )
        except subprocess.TimeoutExpired:
            yield {"tool": kind, "outcome": "stopped: its time is up, nothing is known"}
            continue
        errors = re.search(
            r"ERROR SUMMARY: (\d+) error|RACECHECK SUMMARY: (\d+) hazard", done.stdout
        )
        found = int(errors[1] or errors[2]) if errors else None
        clean &= done.returncode == 0
        if done.returncode != 0:
            print(done.stdout[-4000:], flush=True)
        outcome = "clean" if done.returncode == 0 else f"exit code {done.returncode}"
        seconds = time.perf_counter() - start
        yield {"tool": kind, "outcome": outcome, "errors": found, "seconds": seconds}
    if not clean:
        raise SystemExit("compute-sanitizer: see above")
