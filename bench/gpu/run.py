"""Everything only a GPU can show, in one command: tests first, then the benchmarks, part by part.

    make gpu                        build for the present GPU, then all parts (under nine minutes)
    make gpu PARTS="test paging"    some of them
    make gpu TIME=420               all of them, each with less time: for a machine lent by the call
    python3 bench/gpu/run.py --list

A part is a module in this folder with a generator `run(budget_s)` that yields one dictionary per
measured case, and `COLUMNS`, the keys to print and their headings. Each part runs in a process of
its own: a crash, a hang or an overrun costs that part only. What it measured is in
`<results>/<gpu>/<part>.rows.jsonl` from the moment it was yielded, so that it outlives this command
too; when the part ends, rows and environment become `<results>/<gpu>/<part>.json`. Benchmarks check
what they time, so they run although a test failed; the exit code and the last lines say so.

To add a part: write the module, add a line to PARTS, keep the sum of seconds within 540.
"""

from __future__ import annotations

import argparse
import importlib
import json
import os
import re
import signal
import subprocess
import sys
import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

HERE = Path(__file__).resolve().parent
REPOSITORY = HERE.parent.parent
sys.path[:0] = [str(REPOSITORY), str(HERE.parent), str(HERE)]

from harness import Row, environment, print_table, save  # noqa: E402


@dataclass(frozen=True)
class Part:
    """One line of the plan: `module` in this folder, and the seconds it may take.

    `function` is the module's generator; several let a module's cases fail apart from each other.
    """

    name: str
    module: str
    seconds: int
    what: str
    function: str = "run"


PARTS = (
    Part("test", "gpu_tests", 110, "the tests marked gpu"),
    Part("roofs", "copy_roofs", 25, "pinned copies idle and while computing, HBM, GEMM, pinning"),
    Part("decode", "expert_kernels", 50, "resident experts, few tokens, and peers", "run_decode"),
    Part(
        "prefill", "expert_kernels", 40, "resident experts, many tokens, and peers", "run_prefill"
    ),
    Part("quantised", "expert_kernels", 25, "resident quantised experts", "run_quantised"),
    Part("routing", "routing", 35, "routing, prediction and sorting in one launch, in a graph"),
    Part("triton", "triton_experts", 40, "Triton expert kernels, and peers"),
    Part("paging", "page_copies", 65, "rate by page size, demand latency, pre-emption, overlap"),
    Part("end_to_end", "end_to_end_gpu", 110, "models at four budgets, and accelerate's offload"),
    Part("sanitizer", "sanitizer", 40, "memcheck and racecheck of small kernel tests"),
)


def gpu_name() -> str:
    """A folder name for this GPU, such as "nvidia-h200"; exits where there is none."""
    import torch

    if not torch.cuda.is_available():
        sys.exit("bench/gpu: no CUDA device, or torch was built without CUDA. Nothing was run.")
    return re.sub(r"[^a-z0-9]+", "-", torch.cuda.get_device_name().lower()).strip("-")


def run_part(part: Part, seconds: float, results: Path) -> bool:
    """Run one part in its own process, print and save what it yielded; True when it finished."""
    results.mkdir(parents=True, exist_ok=True)
    rows_file = results / f"{part.name}.rows.jsonl"
    rows_file.unlink(missing_ok=True)
    command = [sys.executable, str(HERE / "run.py"), "--child", part.name, str(rows_file)]
    start = time.perf_counter()
    # A group of its own, so that an overrun also ends what the part itself started.
    process = subprocess.Popen([*command, str(seconds)], cwd=REPOSITORY, start_new_session=True)
    try:
        code = process.wait(timeout=seconds)
        outcome = "finished" if code == 0 else f"failed with exit code {code}"
    except subprocess.TimeoutExpired:
        outcome = f"stopped after its {seconds:.0f} s"
    finally:  # also when this command itself is interrupted
        if process.poll() is None:
            os.killpg(process.pid, signal.SIGKILL)
            process.wait()
    taken = time.perf_counter() - start
    rows = read_rows(rows_file)
    try:
        columns = importlib.import_module(part.module).COLUMNS
    except Exception as error:  # the part's own process has said it at length
        columns, outcome = {}, f"cannot be imported: {type(error).__name__}: {error}"
    print_table(rows, columns, f"{part.name}: {outcome}, {taken:.0f} s")
    record: Row = {"part": part.name, "outcome": outcome, "seconds": taken, "rows": rows}
    path = save(part.name, {**record, "environment": gpu_environment()}, str(results))
    rows_file.unlink(missing_ok=True)
    print(f"  -> {path}", flush=True)
    return outcome == "finished"


def read_rows(path: Path) -> list[Row]:
    """The rows a part wrote; a line that it was killed in the middle of is left out."""
    rows: list[Row] = []
    for line in path.read_text().splitlines() if path.exists() else []:
        try:
            rows.append(json.loads(line))
        except json.JSONDecodeError:
            break
    return rows


def shares(parts: Sequence[Part], remaining: float) -> float:
    """Seconds of the first part, when `remaining` are left for all: as planned, or less for each.

    What a part leaves over goes to those after it.
    """
    planned = sum(part.seconds for part in parts)
    return parts[0].seconds * min(1.0, remaining / planned)


def gpu_environment() -> Row:
    """harness.environment and what identifies the GPU's side."""
    import torch

    properties = torch.cuda.get_device_properties(0)
    driver = subprocess.run(
        ["nvidia-smi", "--query-gpu=driver_version", "--format=csv,noheader"],
        capture_output=True,
        text=True,
        check=False,
    ).stdout.strip()
    return {
        **environment(),
        "gpu": properties.name,
        "capability": f"{properties.major}.{properties.minor}",
        "multiprocessors": properties.multi_processor_count,
        "gpu_memory_bytes": properties.total_memory,
        "driver": driver,
        "cuda": torch.version.cuda,
    }


def run_child(name: str, rows_file: Path, seconds: float) -> None:
    """In the part's own process: write each row as soon as there is one."""
    part = next(part for part in PARTS if part.name == name)
    module = importlib.import_module(part.module)
    with rows_file.open("w") as file:
        for row in getattr(module, part.function)(seconds - min(5.0, seconds / 4)):
            file.write(json.dumps(row) + "\n")
            file.flush()


def main() -> int:
    parser = argparse.ArgumentParser(description="GPU tests and benchmarks")
    names = [part.name for part in PARTS]
    parser.add_argument("parts", nargs="*", metavar="PART", help=f"of {', '.join(names)}")
    parser.add_argument("--list", action="store_true", help="list the parts and run nothing")
    parser.add_argument("--results", type=Path, default=REPOSITORY / "bench" / "results")
    parser.add_argument("--seconds", type=float, default=540.0, help="for all parts (540)")
    parser.add_argument("--child", nargs=3, help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.child:
        run_child(args.child[0], Path(args.child[1]), float(args.child[2]))
        return 0
    if not args.seconds > 0:
        parser.error(f"--seconds: expected a positive number, got {args.seconds}")
    if unknown := set(args.parts) - set(names):
        parser.error(f"no part {sorted(unknown)[0]!r}; there are {', '.join(names)}")
    chosen = [part for part in PARTS if not args.parts or part.name in args.parts]
    if args.list:
        print_table(
            [vars(part) for part in PARTS],
            {"name": "part", "seconds": "at most s", "what": "what"},
        )
        return 0
    results = args.results / gpu_name()
    end = time.perf_counter() + args.seconds
    failed = []
    for index, part in enumerate(chosen):
        if not run_part(part, shares(chosen[index:], end - time.perf_counter()), results):
            failed.append(part.name)
    if failed:
        print(f"\nbench/gpu: {', '.join(failed)} did not finish; see above.")
    return 1 if failed else 0


if __name__ == "__main__":
    sys.exit(main())
