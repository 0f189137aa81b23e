"""Everything only a GPU can show, in one command: tests first, then the benchmarks, part by part.

    make gpu                        build for the present GPU, then all parts (under nine minutes)
    make gpu PARTS="test paging"    some of them
    python3 bench/gpu/run.py --list

A part is a module in this folder with a generator `run(budget_s)` that yields one dictionary per
measured case, and `COLUMNS`, the keys to print and their headings. Each part runs in a process of
its own: a crash or an overrun costs that part only, and the rows it had yielded are kept. Results
go to `<results>/<gpu>/<part>.json` with the environment beside them.

To add a part: write the module, add a line to PARTS, keep the sum of seconds under 540.
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
import tempfile
import time
from dataclasses import dataclass
from pathlib import Path

HERE = Path(__file__).resolve().parent
REPOSITORY = HERE.parent.parent
sys.path[:0] = [str(REPOSITORY), str(HERE.parent), str(HERE)]

from harness import Row, environment, print_table, save  # noqa: E402


@dataclass(frozen=True)
class Part:
    """One line of the plan: `module` in this folder, and the seconds it may take."""

    name: str
    module: str
    seconds: int
    what: str


PARTS = (
    Part("test", "gpu_tests", 120, "the tests marked gpu; nothing is timed when one fails"),
    Part("roofs", "copy_roofs", 30, "pinned copies idle and while computing, HBM, GEMM, pinning"),
    Part("routing", "routing", 40, "routing, prediction and sorting in one launch, in a graph"),
    Part("triton", "triton_experts", 45, "Triton expert kernels beside transformers' own"),
    Part("expert_kernels", "expert_kernels", 110, "resident experts: ours, grouped_mm, batched_mm"),
    Part("paging", "page_copies", 70, "rate by page size, demand latency, pre-emption, overlap"),
    Part("end_to_end", "end_to_end_gpu", 120, "models at four budgets, and accelerate's offload"),
)


def gpu_name() -> str:
    """A folder name for this GPU, such as "nvidia-h200"; exits where there is none."""
    import torch

    if not torch.cuda.is_available():
        sys.exit("bench/gpu: no CUDA device, or torch was built without CUDA. Nothing was run.")
    return re.sub(r"[^a-z0-9]+", "-", torch.cuda.get_device_name().lower()).strip("-")


def run_part(part: Part, results: Path) -> bool:
    """Run one part in its own process, print and save what it yielded; True when it finished."""
    with tempfile.TemporaryDirectory() as folder:
        rows_file = Path(folder, "rows.jsonl")
        command = [sys.executable, str(HERE / "run.py"), "--child", part.name, str(rows_file)]
        start = time.perf_counter()
        # A group of its own, so that an overrun also ends what the part itself started.
        process = subprocess.Popen(command, cwd=REPOSITORY, start_new_session=True)
        try:
            code = process.wait(timeout=part.seconds)
            outcome = "finished" if code == 0 else f"failed with exit code {code}"
        except subprocess.TimeoutExpired:
            os.killpg(process.pid, signal.SIGKILL)
            process.wait()
            outcome = f"stopped after its {part.seconds} s"
        seconds = time.perf_counter() - start
        rows = []
        if rows_file.exists():
            rows = [json.loads(line) for line in rows_file.read_text().splitlines()]
    columns = importlib.import_module(part.module).COLUMNS
    print_table(rows, columns, f"{part.name}: {outcome}, {seconds:.0f} s")
    record: Row = {"part": part.name, "outcome": outcome, "seconds": seconds, "rows": rows}
    path = save(part.name, {**record, "environment": gpu_environment()}, str(results))
    print(f"  -> {path}")
    return outcome == "finished"


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


def run_child(name: str, rows_file: Path) -> None:
    """In the part's own process: write each row as soon as there is one."""
    part = next(part for part in PARTS if part.name == name)
    module = importlib.import_module(part.module)
    with rows_file.open("w") as file:
        for row in module.run(part.seconds - 5.0):
            file.write(json.dumps(row) + "\n")
            file.flush()


def main() -> int:
    parser = argparse.ArgumentParser(description="GPU tests and benchmarks")
    names = [part.name for part in PARTS]
    parser.add_argument("parts", nargs="*", metavar="PART", help=f"of {', '.join(names)}")
    parser.add_argument("--list", action="store_true", help="list the parts and run nothing")
    parser.add_argument("--results", type=Path, default=REPOSITORY / "bench" / "results")
    parser.add_argument("--child", nargs=2, help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.child:
        run_child(args.child[0], Path(args.child[1]))
        return 0
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
    failed = []
    for part in chosen:
        if not run_part(part, results):
            failed.append(part.name)
            if part.name == "test":
                print("\nbench/gpu: the GPU tests did not pass, so nothing is timed.")
                break
    if failed:
        print(f"\nbench/gpu: {', '.join(failed)} did not finish; see above.")
    return 1 if failed else 0


if __name__ == "__main__":
    sys.exit(main())
