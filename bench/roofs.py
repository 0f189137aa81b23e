"""What this machine can do: O_DIRECT disk reads the way a pager reads, and memory reads.

Disk: pages at random offsets of the checkpoint's own files, cut into chunks, read by several
threads at once into aligned buffers, and thrown away. No copy into a slot, no arithmetic beside it:
an upper bound for any pager with the same chunk size and depth. Memory: one pass over a buffer far
larger than the caches, all cores at once. Virtual disks are noisy (swings of 1.5x that last
minutes), so a benchmark takes short slices between its own samples.

    python bench/roofs.py FOLDER_WITH_SAFETENSORS [--seconds 1]
"""

from __future__ import annotations

import argparse
import mmap
import os
import random
import threading
import time
from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import numpy as np
from harness import Row, pin_to_cores, print_table, spread

BLOCK = 4096
DEPTHS = (1, 2, 4, 8)
CHUNK_BYTES = (1 << 20, 4 << 20)


def disk_read(
    paths: Sequence[str | Path],
    page_bytes: int,
    chunk_bytes: int,
    depth: int,
    seconds: float,
    seed: int,
) -> float:
    """GB/s of O_DIRECT reads of random pages with `depth` chunks in flight.

    Raises OSError where the file system has no O_DIRECT.
    """
    descriptors = [os.open(path, os.O_RDONLY | os.O_DIRECT) for path in paths]
    chunk_bytes = min(chunk_bytes, -(-page_bytes // BLOCK) * BLOCK)
    try:
        sizes = [os.fstat(descriptor).st_size for descriptor in descriptors]
        chunks = _random_chunks(descriptors, sizes, page_bytes, chunk_bytes, seed)
        lock, read_bytes, errors = threading.Lock(), [0] * depth, []
        start = time.perf_counter()

        def work(number: int) -> None:
            with mmap.mmap(-1, chunk_bytes) as buffer:
                try:
                    while time.perf_counter() - start < seconds:
                        with lock:
                            descriptor, offset = next(chunks)
                        read_bytes[number] += os.preadv(descriptor, [buffer], offset)
                except OSError as error:
                    errors.append(error)

        threads = [threading.Thread(target=work, args=(number,)) for number in range(depth)]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
        elapsed = time.perf_counter() - start
        if errors:
            raise errors[0]
        return sum(read_bytes) / elapsed / 1e9
    finally:
        for descriptor in descriptors:
            os.close(descriptor)


def _random_chunks(
    descriptors: Sequence[int], sizes: Sequence[int], page_bytes: int, chunk_bytes: int, seed: int
) -> Iterator[tuple[int, int]]:
    """Chunk after chunk of random pages, as a queue of demand fetches would ask for them."""
    rng = random.Random(seed)
    pages = [
        (descriptor, number * page_bytes // BLOCK * BLOCK)
        for descriptor, size in zip(descriptors, sizes, strict=True)
        for number in range(max(1, size // page_bytes))
    ]
    while True:
        descriptor, begin = rng.choice(pages)
        for offset in range(begin, begin + page_bytes, chunk_bytes):
            yield descriptor, offset


def disk_sweep(
    paths: Sequence[str | Path], page_bytes: int, seconds: float, seed: int
) -> list[Row]:
    """One row per chunk size and depth; `seconds` each."""
    rows = []
    for chunk_bytes in dict.fromkeys([*CHUNK_BYTES, page_bytes]):
        for depth in DEPTHS:
            rate = disk_read(paths, page_bytes, chunk_bytes, depth, seconds, seed)
            rows.append({"chunk_bytes": chunk_bytes, "depth": depth, "gb_per_s": rate})
            seed += 1
    return rows


def memory_read(num_bytes: int = 1 << 29, repeats: int = 5) -> float:
    """GB/s of reading memory once through with one thread per core; best of `repeats`."""
    cores = len(os.sched_getaffinity(0))
    parts = [np.ones(num_bytes // 8 // cores, dtype=np.int64) for _ in range(cores)]
    times = []
    with ThreadPoolExecutor(cores) as pool:  # numpy sums without the interpreter lock
        for _ in range(repeats + 1):
            start = time.perf_counter()
            list(pool.map(np.sum, parts))
            times.append(time.perf_counter() - start)
    return sum(part.nbytes for part in parts) / min(times[1:]) / 1e9


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("folder", type=Path)
    parser.add_argument("--page-bytes", type=int, default=12 << 20)
    parser.add_argument("--seconds", type=float, default=0.5, help="per row and repeat")
    parser.add_argument("--repeats", type=int, default=5)
    arguments = parser.parse_args()
    pin_to_cores(2)
    paths = sorted(arguments.folder.glob("*.safetensors"))
    samples: dict[tuple[int, int], list[float]] = {}
    for repeat in range(arguments.repeats):  # rows interleaved: the disk drifts
        for row in disk_sweep(paths, arguments.page_bytes, arguments.seconds, 100 * repeat):
            samples.setdefault((row["chunk_bytes"], row["depth"]), []).append(row["gb_per_s"])
    rows = [
        {"chunk_mib": chunk / 2**20, "depth": depth, "gb_per_s": spread(rates)}
        for (chunk, depth), rates in samples.items()
    ]
    columns = {"chunk_mib": "chunk MiB", "depth": "depth", "gb_per_s": "GB/s"}
    print_table(rows, columns, "O_DIRECT reads of random pages, median [p10, p90]")
    print(f"\nmemory reads: {memory_read():.1f} GB/s")


if __name__ == "__main__":
    main()
