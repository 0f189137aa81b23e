"""What every benchmark shares: where it ran, how samples are summed up, printed and kept.

A row is a dictionary; `print_table` shows chosen columns of it and `save` writes everything as JSON
with the environment beside it, under bench/results/<machine>/. Nothing here imports torch: the
parent process of a benchmark stays small, and its children decide what is in memory.
"""

from __future__ import annotations

import importlib.metadata
import json
import os
import platform
import re
import statistics
import subprocess
import sys
import tempfile
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from datetime import datetime, timezone
from pathlib import Path
from typing import Any

REPOSITORY = Path(__file__).resolve().parent.parent
RESULTS = REPOSITORY / "bench" / "results"
PACKAGES = ("torch", "transformers", "accelerate", "safetensors", "numpy")
# By /proc/cpuinfo's flag, the widest first.
INSTRUCTION_SETS = {
    "amx_bf16": "amx",
    "avx512_bf16": "avx512-bf16",
    "avx512f": "avx512",
    "avx2": "avx2",
}

# What is measured is this checkout, installed or not; children get the same (comparison.py).
sys.path.insert(0, str(REPOSITORY))

Row = dict[str, Any]


def pin_to_cores(num_cores: int) -> list[int]:
    """Restrict this process and its children to the first cores it may use; returns them."""
    cores = sorted(os.sched_getaffinity(0))[:num_cores]
    os.sched_setaffinity(0, cores)
    os.environ["OMP_NUM_THREADS"] = str(len(cores))
    return cores


def environment() -> Row:
    """The record every results file carries: code, versions and machine, but no host names."""
    versions = {name: importlib.metadata.version(name) for name in PACKAGES}
    return {
        "command": " ".join(["python", *_relative(sys.argv)]),
        "commit": _git("rev-parse", "HEAD") or "unknown",
        "uncommitted_changes": _git("status", "--porcelain", "--untracked-files=no").splitlines(),
        "date": datetime.now(timezone.utc).isoformat(timespec="seconds"),
        "versions": {"python": platform.python_version(), **versions},
        "kernel": platform.release(),
        "cpu": _cpu_model(),
        "isa": _widest_isa(),
        "cores": len(os.sched_getaffinity(0)),
        "memory_bytes": os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES"),
        "load_average_at_start": round(os.getloadavg()[0], 2),
    }


def _relative(arguments: Sequence[str]) -> list[str]:
    """The command as anybody would type it: no absolute paths of this machine."""
    script = Path(arguments[0]).resolve()
    inside = script.is_relative_to(REPOSITORY)
    rest = ["FOLDER" if Path(argument).is_absolute() else argument for argument in arguments[1:]]
    return [str(script.relative_to(REPOSITORY)) if inside else script.name, *rest]


def _git(*arguments: str) -> str:
    try:
        done = subprocess.run(
            ["git", "-C", str(REPOSITORY), *arguments], capture_output=True, text=True, check=True
        )
    except (OSError, subprocess.CalledProcessError):
        return ""
    return done.stdout.strip()


def _cpu_model() -> str:
    return _cpuinfo("model name") or platform.machine()


def _widest_isa() -> str | None:
    flags = (_cpuinfo("flags") or "").split()
    return next((isa for flag, isa in INSTRUCTION_SETS.items() if flag in flags), None)


def _cpuinfo(key: str) -> str | None:
    """The first value of `key` in /proc/cpuinfo."""
    for line in Path("/proc/cpuinfo").read_text().splitlines():
        if line.startswith(key):
            return line.split(":", 1)[1].strip()
    return None


def machine_name() -> str:
    """A folder name for this kind of machine, such as "amd-epyc-family-26-avx512-bf16-2-cores".

    Virtual machines of different processors call them all "AMD EPYC": then the family tells them
    apart (26 is Zen 5). What the kernels run at depends on the widest instruction set there is.
    """
    slug = re.sub(r"[^a-z0-9]+", "-", re.sub(r"\(.*?\)|@.*", "", _cpu_model().lower())).strip("-")
    if not re.search("[0-9]", slug) and (family := _cpuinfo("cpu family")):
        slug += f"-family-{family}"
    cores = f"{len(os.sched_getaffinity(0))}-cores"
    return "-".join(filter(None, (slug, _widest_isa(), cores)))


def spread(values: Iterable[float]) -> Row:
    """Median, 10th and 90th percentile and number of samples."""
    data = sorted(values)
    if not data:
        return {"median": float("nan"), "p10": float("nan"), "p90": float("nan"), "samples": 0}
    return {
        "median": statistics.median(data),
        "p10": _percentile(data, 0.1),
        "p90": _percentile(data, 0.9),
        "samples": len(data),
    }


def _percentile(data: Sequence[float], share: float) -> float:
    position = share * (len(data) - 1)
    low = int(position)
    high = min(low + 1, len(data) - 1)
    return data[low] + (data[high] - data[low]) * (position - low)


def median(values: Iterable[float]) -> float:
    return float(spread(values)["median"])


def print_table(rows: Sequence[Row], columns: Mapping[str, str], title: str = "") -> None:
    """Print `columns` ({key: heading}) of the rows; a spread shows as median [p10, p90]."""
    if title:
        print(f"\n{title}")
    lines = [list(columns.values())] + [[_text(row.get(key)) for key in columns] for row in rows]
    widths = [max(len(line[i]) for line in lines) for i in range(len(columns))]
    for number, line in enumerate(lines):
        cells = [
            text.ljust(width) if i == 0 else text.rjust(width)
            for i, (text, width) in enumerate(zip(line, widths, strict=True))
        ]
        print("  " + "  ".join(cells).rstrip())
        if number == 0:
            print("  " + "  ".join("-" * width for width in widths))


def _text(value: Any) -> str:
    if isinstance(value, Mapping):
        return f"{value['median']:.3g} [{value['p10']:.3g}, {value['p90']:.3g}]"
    if isinstance(value, bool):
        return "yes" if value else "NO"
    if isinstance(value, float):
        return f"{value:.3g}" if abs(value) < 1000 else f"{value:.0f}"
    return "" if value is None else str(value)


def save(name: str, results: Row, machine: str | None = None) -> Path:
    """Write bench/results/<machine>/<name>.json and return its path."""
    path = RESULTS / (machine or machine_name()) / f"{name}.json"
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(json.dumps(results, indent=1) + "\n")
    return path


@contextmanager
def workdir(given: Path | None, temporary: bool) -> Iterator[Path]:
    """The folder for checkpoints: as given, a temporary one, or one that stays in the cache."""
    if given is None and temporary:
        with tempfile.TemporaryDirectory() as folder:
            yield Path(folder)
        return
    path = given or Path.home() / ".cache" / "moe_offload_bench"
    path.mkdir(parents=True, exist_ok=True)
    yield path
