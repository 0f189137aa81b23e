"""The end-to-end benchmark still runs, compares tokens before it prints times, and counts right.

Toy sizes, all four contenders in their own processes; nothing here judges a time.
"""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import pytest

pytest.importorskip("transformers")

BENCH = Path(__file__).resolve().parent.parent / "bench"


@pytest.fixture
def report(monkeypatch: pytest.MonkeyPatch):
    monkeypatch.syspath_prepend(str(BENCH))
    import report

    return report


CPUINFO = "processor\t: 0\nmodel name\t: AMD EPYC 9B14 (Genoa) @ 2.6GHz\n"


@pytest.mark.parametrize(
    ("more", "name"),
    [
        ("model name\t: AMD EPYC\ncpu family\t: 26\n", "amd-epyc-family-26-2-cores"),
        ("flags\t\t: fpu avx avx2 fma\n", "amd-epyc-9b14-avx2-2-cores"),
        ("flags\t\t: avx2 avx512f avx512bw\n", "amd-epyc-9b14-avx512-2-cores"),
        ("flags\t\t: avx2 avx512f avx512_bf16\n", "amd-epyc-9b14-avx512-bf16-2-cores"),
        ("flags\t\t: avx2 avx512f avx512_bf16 amx_bf16\n", "amd-epyc-9b14-amx-2-cores"),
        ("", "amd-epyc-9b14-2-cores"),  # no x86
    ],
)
def test_results_of_other_processors_have_another_folder(
    monkeypatch: pytest.MonkeyPatch, more: str, name: str
) -> None:
    monkeypatch.syspath_prepend(str(BENCH))
    import harness

    text = more if "model name" in more else CPUINFO + more
    monkeypatch.setattr(harness.Path, "read_text", lambda _: text)
    monkeypatch.setattr(harness.os, "sched_getaffinity", lambda _: {0, 1})
    assert harness.machine_name() == name


def test_quick_run_writes_every_target(tmp_path: Path) -> None:
    output = tmp_path / "results.json"
    script = [sys.executable, str(BENCH / "end_to_end.py"), "--quick", "--output", str(output)]
    done = subprocess.run(script, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    results = json.loads(output.read_text())
    assert results["tokens_equal_to_resident"] == 2 * 4 * 5  # prompts, contenders, tokens
    assert "bench/end_to_end.py --quick" in results["environment"]["command"]
    assert len(results["targets"]) == 23
    kept = {row["target"]: row["kept"] for row in results["targets"]}
    assert kept["100%: disk bytes in steady state"]
    rows = {row["contender"]: row for row in results["rows"]}
    assert set(rows) == {
        *("moe_offload 25%", "moe_offload 25%, predictor none", "accelerate disk"),
        *("moe_offload 100%", "transformers resident"),
    }
    assert rows["moe_offload 100%"]["hit_percent"] == 100
    assert rows["moe_offload 25%"]["pages_per_token"] == 4  # 2 layers, top-2
    assert "Targets" in done.stdout


def test_roofs_and_paging_write_every_row(tmp_path: Path) -> None:
    (tmp_path / "pages.safetensors").write_bytes(bytes(range(256)) * 4096)
    roofs, paging = tmp_path / "roofs.json", tmp_path / "paging.json"
    for arguments in (
        ["roofs.py", tmp_path, "--quick", "--output", roofs],
        ["paging.py", "--quick", "--workdir", tmp_path, "--output", paging],
    ):
        command = [sys.executable, str(BENCH / arguments[0]), *map(str, arguments[1:])]
        done = subprocess.run(command, capture_output=True, text=True, check=False)
        if "Invalid argument" in done.stderr and "disk_roof" in done.stderr:
            pytest.skip("no O_DIRECT in the temporary directory")
        assert done.returncode == 0, done.stderr
    found = json.loads(roofs.read_text())
    assert found["environment"]["command"] == (
        "python bench/roofs.py FOLDER --quick --output FOLDER"
    )
    assert {row["huge_pages"] for row in found["disk"]} == {True, False}
    assert all(row["gb_per_s"]["median"] > 0 for row in found["disk"])
    assert [row["dtype"] for row in found["gemm"]] == ["bfloat16", "float16", "float32"]
    assert all(row["tflops"] > 0 and row["multiply_tflops"] > 0 for row in found["gemm"])
    assert all(rate > 0 for rate in found["memory"].values())
    found = json.loads(paging.read_text())
    assert found["bytes_compared"] > 0
    assert "threads" in {row["engine"] for row in found["rows"]}


def test_linear_compares_with_torch(tmp_path: Path) -> None:
    output = tmp_path / "linear.json"
    command = [sys.executable, BENCH / "linear.py", "--quick", "--output", output]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    rows = json.loads(output.read_text())["rows"]
    assert {row["dtype"] for row in rows} == {"bfloat16", "float16", "float32"}
    assert all(row["x_torch"] > 0 and row["x_error"] > 0 for row in rows)


def test_attention_compares_with_torch(tmp_path: Path) -> None:
    output = tmp_path / "attention.json"
    command = [sys.executable, BENCH / "attention.py", "--quick", "--output", output]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    rows = json.loads(output.read_text())["rows"]
    assert {row["dtype"] for row in rows} == {"bfloat16", "float16", "float32"}
    assert all(row["x_best"] > 0 and row["of_read"] > 0 for row in rows)


def test_wrong_tokens_print_no_time(report) -> None:
    from comparison import Comparison

    right, wrong = [{"tokens": [1, 2, 3]}], [{"tokens": [1, 2, 4]}]
    quarter = Comparison("25%", 0, {}, turns={report.PAGED: right, report.ACCELERATE: right})
    resident = [{"tokens": [1, 2, 3], "same_kernel_tokens": [1, 2, 3]}]
    whole = Comparison("100%", 0, {}, turns={report.FULL: right, report.RESIDENT: resident})
    assert report.check_tokens([quarter, whole]) == 9
    quarter.turns[report.PAGED] = wrong
    with pytest.raises(SystemExit, match=r"WRONG TOKENS.*moe_offload 25%, prompt 0"):
        report.check_tokens([quarter, whole])
    resident[0]["same_kernel_tokens"] = [1, 2, 4]  # what moe_offload is held to, and only it
    with pytest.raises(SystemExit, match=r"WRONG TOKENS.*moe_offload 100%, prompt 0"):
        report.check_tokens([quarter, whole])


def test_time_of_overlapping_copies_counts_once(report) -> None:
    import contenders

    spans = [(0.0, 2.0), (1.0, 3.0), (1.5, 1.7), (5.0, 6.0)]
    assert contenders._union(spans) == 4.0
    assert contenders._union([]) == 0.0


def test_a_model_of_any_size_gives_the_same_tokens_at_every_budget(tmp_path: Path) -> None:
    output = tmp_path / "full_size.json"
    command = [sys.executable, BENCH / "full_size.py", "--quick", "--output", output]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    results = json.loads(output.read_text())
    assert [row["budget"] for row in results["rows"]] == ["25%", "50%"]
    assert [row["slots"] for row in results["rows"]] == [8, 16]  # of 2 x 16
    assert all(row["pages_per_token"] == 16 for row in results["rows"])  # 2 layers, top-8
    assert results["comparisons"][0]["turns"]["moe_offload"][0]["tokens"]
