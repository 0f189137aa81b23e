"""Every Triton kernel compiles for sm_80, sm_90 and sm_100 without a GPU and spills nothing."""

from __future__ import annotations

import json
import os
import platform
import subprocess
import sys
from collections import Counter
from pathlib import Path
from typing import Any

import pytest

pytest.importorskip("triton", reason="needs triton (on Linux, pip install -e '.[dev]' has it)")

pytestmark = pytest.mark.skipif(
    platform.machine() != "x86_64", reason="the triton wheel carries ptxas for x86-64 only"
)
SCRIPT = Path(__file__).with_name("triton_compile.py")


def compile_kernels(wanted: list[str], cache: Path) -> list[dict[str, Any]]:
    environment = {k: v for k, v in os.environ.items() if k != "TRITON_INTERPRET"}
    environment["TRITON_CACHE_DIR"] = str(cache)
    environment["PYTHONPATH"] = os.pathsep.join([str(SCRIPT.parent.parent), *sys.path])
    done = subprocess.run(
        [sys.executable, str(SCRIPT), *wanted],
        env=environment,
        capture_output=True,
        text=True,
        check=False,
        timeout=230,
    )
    assert done.returncode == 0, done.stderr[-3000:]
    return [json.loads(line) for line in done.stdout.splitlines()]


def check(records: list[dict[str, Any]]) -> None:
    for record in records:
        print(record)
        assert record["ptx_target"].startswith(f"sm_{record['arch']}"), record
        # Values that outlive the registers go to the stack, or, in older formats, to local memory.
        assert record["stack"] == 0, f"spills: {record}"
        assert record["local"] == 0, f"spills: {record}"
        assert record["registers"] <= 255, record
        assert record["dynamic_shared"] <= 99 * 1024, f"does not fit sm_86: {record}"


def test_quick_shapes(tmp_path: Path) -> None:
    records = compile_kernels(["80:quick"], tmp_path)
    check(records)
    kernels = Counter(record["kernel"] for record in records)
    assert kernels["route_predict_permute_kernel"] == 2  # one launch up to 64 tokens
    chain = {"route_and_predict_kernel", "sum_tiles_kernel", "permute_and_list_kernel"}
    assert chain <= set(kernels)


@pytest.mark.slow
def test_all_shapes_and_architectures(tmp_path: Path) -> None:
    records = compile_kernels(["80:slow", "90:all", "100:all"], tmp_path)
    check(records)
    cases = {arch: {r["case"] for r in records if r["arch"] == arch} for arch in (80, 90, 100)}
    assert cases[80] < cases[90] == cases[100]
    assert len(cases[100]) == 17
