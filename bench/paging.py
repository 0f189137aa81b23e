"""The pager by itself: what a page costs, against what the disk can do in the same minute.

A file of random pages, a pool that holds few of them, requests for random pages: every request is
a demand miss. Both copy engines, several page sizes; the disk's roof (bench/roofs.py) is measured
between the rows of each round. Every page of the first round is compared with the file, byte for
byte, before any time is taken.

    python bench/paging.py [--workdir DIR]      about four minutes, 2 GB of disk
    python bench/paging.py --quick              does it run?
"""

from __future__ import annotations

import argparse
import json
import os
import random
import resource
import tempfile
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from harness import Row, environment, machine_name, median, pin_to_cores, print_table, save, spread
from roofs import disk_read, io_engines

from moe_offload import _core

HEADER_BYTES = 1304  # pages start where a safetensors header would end: aligned to 8, no more
CHUNK_BYTES = 1 << 20
SLOTS = 24


@dataclass(frozen=True)
class Plan:
    page_bytes: tuple[int, ...]
    file_bytes: int
    rounds: int
    seconds: float  # per row and round


STANDARD = Plan((1 << 19, 3 << 20, 12 << 20), 2 << 30, 9, 0.25)
QUICK = Plan((1 << 14, 1 << 18), 32 << 20, 1, 0.01)


class Pool:
    """A pager over the file, its slots, and the random pages it is asked for."""

    def __init__(self, path: Path, page_bytes: int, engine: str, seed: int) -> None:
        self.page_bytes = page_bytes
        self.num_pages = (path.stat().st_size - HEADER_BYTES) // page_bytes
        self.stride = -(-page_bytes // 4096) * 4096
        source = _core.FileSource([str(path)], True)
        self.io_mode = source.io_mode
        for page in range(self.num_pages):
            # gate and up are neighbours in file and page, down lies elsewhere in the page
            begin, part = HEADER_BYTES + page * page_bytes, page_bytes // 4 * 3
            source.add_page(
                0, page, [(0, begin, part, 0), (0, begin + part, page_bytes - part, part)]
            )
        self.slab = np.zeros(SLOTS * self.stride + (2 << 20), dtype=np.uint8)
        address = self.slab.ctypes.data
        self.offset = -address % (2 << 20)
        self.pager = _core.Pager(
            source=source,
            num_experts=[self.num_pages],
            layer_names=["pages"],
            slots=address + self.offset,
            num_slots=SLOTS,
            slot_stride=self.stride,
            io_engine=engine,
            chunk_bytes=CHUNK_BYTES,
        )
        self._random = random.Random(seed)

    def slot(self, number: int) -> Any:
        begin = self.offset + number * self.stride
        return self.slab[begin : begin + self.page_bytes]

    def absent(self, count: int) -> list[int]:
        """Random pages that are in no slot."""
        present = {page for _, page, _ in self.pager.residents()}
        found: set[int] = set()
        while len(found) < count:
            page = self._random.randrange(self.num_pages)
            if page not in present:
                found.add(page)
        return sorted(found)

    def demand(self, pages: list[int]) -> list[tuple[int, int]]:
        """Ask for pages and wait for all: (page, slot)."""
        arrived = []
        with self.pager.acquire(0, pages) as ticket:
            while ready := ticket.next():
                arrived += [(pages[index], slot) for index, slot in ready]
                ticket.release([index for index, _ in ready])
        return arrived


def check_bytes(pool: Pool, path: Path) -> int:
    """Pages in slots against the file; returns how many bytes were equal, or ends the program."""
    compared = 0
    with path.open("rb") as file:
        for page, slot in pool.demand(pool.absent(min(SLOTS // 2, pool.num_pages // 2))):
            file.seek(HEADER_BYTES + page * pool.page_bytes)
            if pool.slot(slot).tobytes() != file.read(pool.page_bytes):
                raise SystemExit(f"WRONG BYTES, so no times: page {page}")
            compared += pool.page_bytes
    return compared


def cpu_seconds() -> float:
    usage = resource.getrusage(resource.RUSAGE_SELF)
    return usage.ru_utime + usage.ru_stime


def latency(pool: Pool, seconds: float, prefetching: int = 0) -> float:
    """Milliseconds from asking for one absent page until it is there; median.

    With `prefetching`, that many prefetches are queued just before.
    """
    times = []
    end = time.perf_counter() + seconds
    while time.perf_counter() < end or len(times) < 3:
        page, *ahead = pool.absent(1 + prefetching)
        if ahead:
            pool.pager.prefetch(0, ahead)
            time.sleep(2e-3)  # until the first of them are in flight
        begin = time.perf_counter()
        with pool.pager.acquire(0, [page]) as ticket:
            ticket.next()
            times.append(time.perf_counter() - begin)
        pool.pager.cancel_prefetches()
        pool.pager.drain()
    return 1e3 * median(times)


def bandwidth(pool: Pool, seconds: float, per_ticket: int, alongside: Any = None) -> Row:
    """GB/s and CPU seconds per GB of requests for `per_ticket` absent pages, one after another."""
    moved, waited, requests = 0, 0.0, 0
    cpu, end = cpu_seconds(), time.perf_counter() + seconds
    while time.perf_counter() < end or requests < 2:
        pages = pool.absent(per_ticket)
        begin = time.perf_counter()
        if alongside is None:
            pool.demand(pages)
        else:
            pool.pager.prefetch(0, pages)
            alongside()
            pool.demand(pages)
        waited += time.perf_counter() - begin
        moved += per_ticket * pool.page_bytes
        requests += 1
    return {
        "gb_per_s": moved / waited / 1e9,
        "cpu_s_per_gb": (cpu_seconds() - cpu) / (moved / 1e9),
        "ms_per_request": 1e3 * waited / requests,
    }


def run(plan: Plan, path: Path) -> tuple[list[Row], int]:
    """All rows, a round at a time, each beside a slice of the disk's roof."""
    settings = [(size, engine) for size in plan.page_bytes for engine in io_engines()]
    samples: dict[tuple[int, str], list[Row]] = {setting: [] for setting in settings}
    pools = {setting: Pool(path, *setting, seed=number) for number, setting in enumerate(settings)}
    compared = sum(check_bytes(pool, path) for pool in pools.values())
    product = _product()
    for number in range(plan.rounds):
        for (size, engine), pool in pools.items():
            roofs = [
                disk_read([path], size, CHUNK_BYTES, depth, plan.seconds / 2, number, kind)
                for depth in (4, 8)
                for kind in io_engines()
            ]
            row: Row = {"roof_gb_per_s": max(roof["gb_per_s"] for roof in roofs)}
            row["latency_ms"] = latency(pool, plan.seconds)
            row["behind_prefetch_ms"] = latency(pool, plan.seconds, prefetching=12)
            for per_ticket in (1, 2, 4, 8):
                found = bandwidth(pool, plan.seconds, per_ticket)
                row[f"gb_per_s_{per_ticket}"] = found["gb_per_s"]
            row["cpu_s_per_gb"] = found["cpu_s_per_gb"]  # of eight pages a request
            row["roof_percent"] = 100 * found["gb_per_s"] / row["roof_gb_per_s"]
            # The same with arithmetic in between that takes about as long as the copies.
            repeats = max(1, round(found["ms_per_request"] / product.milliseconds))
            alone = time.perf_counter()
            product(repeats)
            alone = time.perf_counter() - alone
            both = bandwidth(pool, plan.seconds, 8, lambda: product(repeats))  # noqa: B023
            hidden = found["ms_per_request"] + 1e3 * alone - both["ms_per_request"]
            row["overlap_percent"] = 100 * hidden / min(found["ms_per_request"], 1e3 * alone)
            row["fill_gb_per_s"] = _fill(path, size, engine, number)
            samples[size, engine].append(row)
    for pool in pools.values():
        pool.pager.close()
    rows = []
    for (size, engine), found in samples.items():
        summed: Row = {"page_kib": size >> 10, "engine": engine}
        summed.update({name: spread(row[name] for row in found) for name in found[0]})
        # How much longer, in times one chunk takes at the roof.
        chunk_ms = min(CHUNK_BYTES, size) / summed["roof_gb_per_s"]["median"] / 1e6
        waits = [row["behind_prefetch_ms"] - row["latency_ms"] for row in found]
        summed["behind_prefetch_chunks"] = spread(wait / chunk_ms for wait in waits)
        rows.append(summed)
    return rows, compared


def _fill(path: Path, page_bytes: int, engine: str, seed: int) -> float:
    """GB/s of filling an empty pool, construction not counted."""
    pool = Pool(path, page_bytes, engine, seed)
    begin = time.perf_counter()
    started = pool.pager.fill([(0, page) for page in pool.absent(min(SLOTS, pool.num_pages))])
    pool.pager.drain()
    seconds = time.perf_counter() - begin
    pool.pager.close()
    return started * page_bytes / seconds / 1e9


class _product:
    """Arithmetic to overlap with: products on one core that stay in its cache."""

    def __init__(self) -> None:
        self.left = np.ones((256, 256), dtype=np.float32)
        self.out = np.empty_like(self.left)
        self(20)
        begin = time.perf_counter()
        self(200)
        self.milliseconds = 1e3 * (time.perf_counter() - begin) / 200

    def __call__(self, repeats: int) -> None:
        for _ in range(repeats):
            np.dot(self.left, self.left, out=self.out)


@contextmanager
def page_file(workdir: Path | None, num_bytes: int) -> Iterator[Path]:
    """A file of random bytes, gone afterwards."""
    with tempfile.TemporaryDirectory(dir=workdir, prefix="paging-") as folder:
        path = Path(folder, "pages.bin")
        rng = np.random.default_rng(0)
        with path.open("wb") as file:
            file.write(bytes(HEADER_BYTES))
            for _ in range(0, num_bytes, 1 << 23):
                file.write(rng.bytes(min(num_bytes, 1 << 23)))
            file.flush()
            os.fsync(file.fileno())
            os.posix_fadvise(file.fileno(), 0, 0, os.POSIX_FADV_DONTNEED)
        yield path


COLUMNS = {
    "page_kib": "page KiB",
    "engine": "engine",
    "latency_ms": "one page ms",
    "behind_prefetch_chunks": "+ behind prefetches, chunks",
    "gb_per_s_1": "GB/s, 1 a ticket",
    "gb_per_s_8": "8 a ticket",
    "roof_percent": "% disk roof",
    "cpu_s_per_gb": "CPU s/GB",
    "overlap_percent": "overlap %",
    "fill_gb_per_s": "fill GB/s",
}


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--quick", action="store_true", help="toy sizes; times mean nothing")
    parser.add_argument("--workdir", type=Path, help="where the page file goes")
    parser.add_argument("--machine", help="name of the results folder; default: from the CPU")
    parser.add_argument("--output", type=Path, help="write the JSON here instead of bench/results")
    arguments = parser.parse_args()
    os.environ["OPENBLAS_NUM_THREADS"] = "1"
    pin_to_cores(2)
    record = environment()
    plan = QUICK if arguments.quick else STANDARD
    with page_file(arguments.workdir, plan.file_bytes) as path:
        io_mode = Pool(path, plan.page_bytes[0], "auto", 0).io_mode
        rows, compared = run(plan, path)
    print(f"{compared} bytes equal to the file's; reads are {io_mode}")
    print_table(rows, COLUMNS, "Random absent pages, median [p10, p90] over rounds")
    results = {
        "environment": record,
        "io_mode": io_mode,
        "chunk_bytes": CHUNK_BYTES,
        "slots": SLOTS,
        "bytes_compared": compared,
        "rows": rows,
    }
    if arguments.output is not None:
        arguments.output.write_text(json.dumps(results, indent=1) + "\n")
    elif not arguments.quick:
        print(f"\nwritten to {save('paging', results, arguments.machine or machine_name())}")


if __name__ == "__main__":
    main()
