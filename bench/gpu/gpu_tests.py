"""The tests marked gpu, as a part of `make gpu`: a row for each that failed, then one per outcome.

Each file runs in a pytest of its own, so that a kernel that hangs costs the rest of its file only;
a test that takes over half a minute prints where it is.
"""

from __future__ import annotations

import re
import subprocess
import sys
import time
from collections import Counter
from collections.abc import Iterator
from pathlib import Path

from harness import Row

REPOSITORY = Path(__file__).resolve().parent.parent.parent
COLUMNS = {"outcome": "tests", "count": "count", "test": "test"}
WORDS = {"PASSED": "passed", "FAILED": "failed", "ERROR": "error", "SKIPPED": "skipped"}
# What copies and slots rest on comes before the kernels that have the most to hide.
FILES = (
    "tests/test_gpu_paging.py",
    "tests/test_cuda_kernels.py",
    "tests/test_triton_routing.py",
    "tests/test_triton_experts.py",
    "tests/test_triton_backend.py",
)


def run(budget_s: float) -> Iterator[Row]:
    """Raises SystemExit when a test failed, a file did not end, or none passed."""
    stop = time.perf_counter() + budget_s
    total: Counter[str] = Counter()
    ended = True
    for index, name in enumerate(FILES):
        share = (stop - time.perf_counter()) / (len(FILES) - index)
        share *= 2 if index < 2 else 1  # and what it leaves over is for the others
        outcomes, failures, finished = run_file(name, min(share, stop - time.perf_counter()))
        total += outcomes
        yield from ({"outcome": "failed", "test": test} for test in failures)
        if not finished:
            ended = False
            yield {"outcome": f"stopped after {share:.0f} s", "test": name}
    yield from ({"outcome": outcome, "count": count} for outcome, count in total.items())
    if not ended or not total["passed"] or total["failed"] or total["error"]:
        raise SystemExit("the GPU tests did not all pass")


def run_file(name: str, seconds: float) -> tuple[Counter[str], list[str], bool]:
    """(how many of each outcome, the tests that failed, whether pytest came to its end)."""
    options = ["-v", "-m", "gpu", "-p", "no:cacheprovider", "-o", "faulthandler_timeout=30"]
    command = [sys.executable, "-u", "-m", "pytest", *options, "--tb=short", name]
    process = subprocess.Popen(command, cwd=REPOSITORY, stdout=subprocess.PIPE, text=True)
    try:
        text, finished = process.communicate(timeout=max(seconds, 1.0))[0], True
    except subprocess.TimeoutExpired:
        process.kill()
        text, finished = process.communicate()[0], False
    found = re.findall(r"^(\S+::.*?) (PASSED|FAILED|ERROR|SKIPPED)", text, re.MULTILINE)
    failures = [test for test, word in found if word in ("FAILED", "ERROR")]
    if failures or not finished or not found:
        print(text[-4000:], flush=True)
    return Counter(WORDS[word] for _, word in found), failures, finished
