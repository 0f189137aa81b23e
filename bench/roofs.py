"""What this machine can do: disk reads the way a pager reads, memory reads, matrix products.

Disk: `_core.disk_roof` reads pages at random places of the given files with O_DIRECT, cut into
chunks, several in flight, into huge pages that are thrown away: an upper bound for any pager with
the same chunk size and depth. Memory: one pass over a buffer far larger than the caches, all cores
at once, in pages of 4 KiB, where torch's tensors lie, and of 2 MiB, where slots do, with prefetches
and without: the faster counts. Products: a
square matrix product of torch's per dtype, and `_core.multiply_roof`, the multiply-adds of our
kernels with nothing to load, which no product can beat. Virtual disks are noisy (swings of 1.5x
that last minutes), so a benchmark takes short slices between its own samples, and this script
interleaves its rows and gives medians with percentiles.

    python bench/roofs.py FOLDER_WITH_SAFETENSORS [--seconds 0.1]
"""

from __future__ import annotations

import argparse
import mmap
import os
import time
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import numpy as np
from harness import Row, environment, machine_name, pin_to_cores, print_table, save, spread

BLOCK = 4096
# Slices between a benchmark's turns: settings that saturated one disk or another.
DEPTHS = (1, 2, 4, 8)
CHUNK_BYTES = (1 << 20, 4 << 20)
# Far larger than the caches, as what a pager reads into is.
MEMORY_BYTES = 1 << 28
READ_AHEAD = 8192  # bytes; 4 to 128 KiB are as fast
# The sweep of this script, the evidence for the defaults of io_depth and chunk_bytes.
SWEEP_CHUNKS = tuple(1 << power for power in (17, 18, 19, 20, 21, 22))
SWEEP_DEPTHS = (1, 2, 4, 8, 16)


def io_engines() -> list[str]:
    """The ways to read that this build and kernel have."""
    from moe_offload import _core

    return ["threads"] if _core.why_no_io_uring() else ["threads", "io_uring"]


def disk_read(
    paths: Sequence[str | Path],
    page_bytes: int,
    chunk_bytes: int,
    depth: int,
    seconds: float,
    seed: int,
    engine: str = "threads",
    huge_pages: bool = True,
    memory_bytes: int = 0,
) -> Row:
    """GB/s of O_DIRECT reads of random pages with `depth` chunks in flight, and CPU seconds per GB.

    They go to one buffer for each read in flight, again and again, or round `memory_bytes`.
    Raises OSError where the file system has no O_DIRECT.
    """
    from moe_offload import _core

    page_bytes = -(-page_bytes // BLOCK) * BLOCK
    num_bytes, wall, cpu = _core.disk_roof(
        [str(path) for path in paths],
        page_bytes=page_bytes,
        chunk_bytes=min(chunk_bytes, page_bytes),
        depth=depth,
        seconds=seconds,
        seed=seed,
        io_uring=engine == "io_uring",
        huge_pages=huge_pages,
        memory_bytes=memory_bytes,
    )
    return {"gb_per_s": num_bytes / wall / 1e9, "cpu_s_per_gb": cpu / (num_bytes / 1e9)}


def disk_sweep(
    paths: Sequence[str | Path], page_bytes: int, seconds: float, seed: int, memory_bytes: int = 0
) -> list[Row]:
    """One row per engine, chunk size and depth; `seconds` each; `memory_bytes` as in disk_read."""
    rows = []
    for engine in io_engines():
        for chunk_bytes in CHUNK_BYTES:
            for depth in DEPTHS:
                row = disk_read(
                    paths,
                    page_bytes,
                    chunk_bytes,
                    depth,
                    seconds,
                    seed,
                    engine,
                    memory_bytes=memory_bytes,
                )
                rows.append({"engine": engine, "chunk_bytes": chunk_bytes, "depth": depth, **row})
                seed += 1
    return rows


def memory_reader(num_bytes: int = 1 << 29, huge_pages: bool = True) -> Callable[[], float]:
    """A function that reads memory once through with one thread per core and returns GB/s.

    Once as it is and once with prefetches (`_core.memory_roof`), the faster of the two:
    Emerald Rapids reads 1.3 times as fast with them.
    """
    from moe_offload import _core

    cores = len(os.sched_getaffinity(0))
    parts = [_ones(num_bytes // cores // BLOCK * BLOCK, huge_pages) for _ in range(cores)]
    pool = ThreadPoolExecutor(cores)  # the native loop runs without the interpreter lock

    def rate(ahead: int) -> float:
        start = time.perf_counter()
        list(pool.map(lambda part: _core.memory_roof(part.ctypes.data, part.nbytes, ahead), parts))
        return sum(part.nbytes for part in parts) / (time.perf_counter() - start) / 1e9

    return lambda: max(rate(0), rate(READ_AHEAD))


def _ones(num_bytes: int, huge_pages: bool) -> np.ndarray[Any, Any]:
    """int64 in pages of 2 MiB, if the kernel has them to give, or of 4 KiB."""
    memory = mmap.mmap(-1, num_bytes + (2 << 20), flags=mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS)
    memory.madvise(mmap.MADV_HUGEPAGE if huge_pages else mmap.MADV_NOHUGEPAGE)
    array = np.frombuffer(memory, dtype=np.int64)
    start = -array.ctypes.data % (2 << 20) // 8
    array = array[start : start + num_bytes // 8]
    array[:] = 1
    return array


def memory_read(num_bytes: int = 1 << 29, repeats: int = 5, huge_pages: bool = True) -> float:
    """GB/s of reading memory once through with one thread per core; best of `repeats`."""
    read = memory_reader(num_bytes, huge_pages)
    return max([read() for _ in range(repeats + 1)][1:])


def memory_copy(num_bytes: int = 1 << 20, repeats: int = 200) -> float:
    """GB/s of copying a chunk that has just arrived into memory that is not in the caches.

    What a bounce buffer costs: one core, source in the cache, destination not.
    """
    source = np.ones(num_bytes, dtype=np.uint8)
    slots = np.ones((128, num_bytes), dtype=np.uint8)
    start = time.perf_counter()
    for i in range(repeats):
        slots[i % len(slots)] = source
    return repeats * num_bytes / (time.perf_counter() - start) / 1e9


def gemm_peak(dtype: str, size: int, seconds: float = 2.0) -> float:
    """TFLOP/s of a [size, size] product in torch on all cores; the best within `seconds`.

    The first is a warm-up that counts only when it alone takes that long: products in a dtype that
    the processor has no instructions for can be a hundred times slower than the others.
    """
    import torch

    left = torch.ones(size, size, dtype=getattr(torch, dtype))
    out = torch.empty_like(left)
    times = []
    while sum(times) < seconds:
        start = time.perf_counter()
        torch.mm(left, left, out=out)
        times.append(time.perf_counter() - start)
    return 2 * size**3 / min(times[1:] or times) / 1e12


def multiply_peak(dtype: str, seconds: float = 0.1, repeats: int = 5) -> float:
    """TFLOP/s of our kernels' multiply-adds from registers, one thread per core; the best."""
    from moe_offload import _core

    cores = len(os.sched_getaffinity(0))
    with ThreadPoolExecutor(cores) as pool:  # the native loop runs without the interpreter lock

        def once() -> float:
            found = pool.map(lambda _: _core.multiply_roof(dtype, seconds), range(cores))
            return sum(operations / took for operations, took in found) / 1e12

        return max(once() for _ in range(repeats))


def _disk_table(paths: Sequence[Path], arguments: argparse.Namespace) -> list[Row]:
    """The sweep, rows interleaved over the repeats because the disk drifts."""
    settings: list[dict[str, Any]] = [
        {"engine": engine, "chunk_bytes": chunk, "depth": depth, "huge_pages": True}
        for engine in io_engines()
        for chunk in SWEEP_CHUNKS
        for depth in SWEEP_DEPTHS
        if 1 << 19 <= chunk * depth <= 1 << 24
    ]
    settings += [  # what buffers of small pages cost, and what keeping the bytes does
        {"engine": engine, "chunk_bytes": 1 << 20, "depth": 4, **other}
        for other in ({"huge_pages": False}, {"huge_pages": True, "memory_bytes": MEMORY_BYTES})
        for engine in io_engines()
    ]
    samples: list[list[Row]] = [[] for _ in settings]
    for repeat in range(arguments.repeats):
        for number, setting in enumerate(settings):
            seed = 1000 * repeat + number
            samples[number].append(
                disk_read(
                    paths, arguments.page_bytes, seconds=arguments.seconds, seed=seed, **setting
                )
            )
    return [
        {
            **setting,
            "chunk_kib": setting["chunk_bytes"] >> 10,
            "gb_per_s": spread(row["gb_per_s"] for row in rows),
            "cpu_s_per_gb": spread(row["cpu_s_per_gb"] for row in rows),
        }
        for setting, rows in zip(settings, samples, strict=True)
    ]


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("folder", type=Path)
    parser.add_argument("--page-bytes", type=int, default=12 << 20)
    parser.add_argument("--seconds", type=float, default=0.1, help="per row and repeat")
    parser.add_argument("--repeats", type=int, default=9)
    parser.add_argument("--quick", action="store_true", help="toy sizes; rates mean nothing")
    parser.add_argument("--machine", help="name of the results folder; default: from the CPU")
    parser.add_argument("--output", type=Path, help="write the JSON here instead of bench/results")
    arguments = parser.parse_args()
    pin_to_cores(2)
    record = environment()
    paths = sorted(arguments.folder.glob("*.safetensors"))
    if arguments.quick:
        arguments.page_bytes, arguments.seconds, arguments.repeats = 1 << 16, 0.002, 1
    disk = _disk_table(paths, arguments)
    columns = {
        "engine": "engine",
        "chunk_kib": "chunk KiB",
        "depth": "depth",
        "huge_pages": "huge pages",
        "memory_bytes": "round bytes",
        "gb_per_s": "GB/s",
        "cpu_s_per_gb": "CPU s/GB",
    }
    print_table(disk, columns, "O_DIRECT reads of random pages, median [p10, p90]")
    size, num_bytes = (128, 1 << 22) if arguments.quick else (2048, 1 << 29)
    gemm_seconds = 0.01 if arguments.quick else 2.0
    memory = {
        "read_gb_per_s": memory_read(num_bytes),
        "read_4k_pages_gb_per_s": memory_read(num_bytes, huge_pages=False),
        "copy_gb_per_s": memory_copy(),
    }
    gemm = [
        {
            "dtype": dtype,
            "tflops": gemm_peak(dtype, size, gemm_seconds),
            "multiply_tflops": multiply_peak(dtype, gemm_seconds / 20),
        }
        for dtype in ("bfloat16", "float16", "float32")
    ]
    print(
        f"\nmemory: read {memory['read_gb_per_s']:.1f} GB/s on all cores in pages of 2 MiB, "
        f"{memory['read_4k_pages_gb_per_s']:.1f} in pages of 4 KiB; "
        f"chunk to slot {memory['copy_gb_per_s']:.1f} GB/s on one"
    )
    columns = {"dtype": "dtype", "tflops": "torch.mm", "multiply_tflops": "from registers"}
    print_table(gemm, columns, f"TFLOP/s on all cores; torch.mm of {size} x {size}")
    results = {"environment": record, "disk": disk, "memory": memory, "gemm": gemm}
    if arguments.output is not None:
        import json

        arguments.output.write_text(json.dumps(results, indent=1) + "\n")
    elif not arguments.quick:
        print(f"\nwritten to {save('roofs', results, arguments.machine or machine_name())}")


if __name__ == "__main__":
    main()
