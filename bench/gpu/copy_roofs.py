"""What the link and the GPU can do, measured with torch alone: the roofs other parts divide by.

Pinned host-to-device and device-to-host copies, idle and while a large matrix product keeps the
GPU busy; device-to-device copies (bytes read plus written); a bf16 matrix product on random data;
and how fast memory is pinned. Buffers are far larger than the L2 cache and rotate.
"""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable, Iterator

import torch
from harness import Row

COLUMNS = {"case": "case", "bytes": "bytes", "gb_s": "GB/s", "tflops": "TFLOP/s"}
MIB = 1 << 20


def event_seconds(work: Callable[[], None], repeats: int) -> list[float]:
    """Seconds of each repeat on the current stream, by device events, after one warm-up."""
    work()
    times = []
    for _ in range(repeats):
        begin, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        begin.record()
        work()
        end.record()
        end.synchronize()
        times.append(begin.elapsed_time(end) / 1e3)
    return times


def run(budget_s: float) -> Iterator[Row]:
    device = torch.device("cuda")
    nbytes = 256 * MIB
    host = torch.empty(nbytes, dtype=torch.uint8, pin_memory=True).random_(0, 255)
    slab = torch.empty(4, nbytes, dtype=torch.uint8, device=device)
    turn = 0

    def copy_in() -> None:
        nonlocal turn
        turn = (turn + 1) % 4
        slab[turn].copy_(host, non_blocking=True)

    def copy_out() -> None:
        host.copy_(slab[turn], non_blocking=True)

    def copy_device() -> None:
        nonlocal turn
        turn = (turn + 1) % 4
        slab[turn].copy_(slab[(turn + 1) % 4])

    def rate(case: str, work: Callable[[], None], moved: int) -> Row:
        seconds = statistics.median(event_seconds(work, 12))
        return {"case": case, "bytes": moved, "gb_s": moved / seconds / 1e9, "seconds": seconds}

    yield rate("pinned H2D, idle", copy_in, nbytes)
    yield rate("pinned D2H, idle", copy_out, nbytes)
    yield rate("device copy, read + write", copy_device, 2 * nbytes)

    size = 8192
    a = torch.randn(size, size, device=device, dtype=torch.bfloat16)
    b = torch.randn(size, size, device=device, dtype=torch.bfloat16)
    product = torch.empty_like(a)
    seconds = statistics.median(event_seconds(lambda: torch.mm(a, b, out=product), 10))
    yield {"case": "bf16 GEMM 8192, idle", "tflops": 2 * size**3 / seconds / 1e12}

    compute = torch.cuda.Stream()
    for case, work in (("pinned H2D, computing", copy_in), ("pinned D2H, computing", copy_out)):
        torch.cuda.synchronize()
        with torch.cuda.stream(compute):  # about 1.4 ms each on an H100: longer than the copies
            for _ in range(400):
                torch.mm(a, b, out=product)
        yield rate(case, work, nbytes)
        torch.cuda.synchronize()
    for small in (1, 4, 8, 16, 64):
        part = host[: small * MIB]

        def copy_small(part: torch.Tensor = part) -> None:
            for index in range(4):
                slab[index, : len(part)].copy_(part, non_blocking=True)

        yield rate(f"pinned H2D in copies of {small} MiB", copy_small, 4 * len(part))

    yield from _pinning()


def _pinning() -> Iterator[Row]:
    """GB/s of cudaHostRegister over memory whose pages exist, and of a pinned allocation."""
    runtime = torch.cuda.cudart()
    nbytes = 1 << 30
    memory = torch.ones(nbytes, dtype=torch.uint8)
    start = time.perf_counter()
    if int(runtime.cudaHostRegister(memory.data_ptr(), nbytes, 0)) == 0:
        seconds = time.perf_counter() - start
        yield {"case": "register memory in use", "bytes": nbytes, "gb_s": nbytes / seconds / 1e9}
        runtime.cudaHostUnregister(memory.data_ptr())
    start = time.perf_counter()
    torch.empty(nbytes, dtype=torch.uint8, pin_memory=True)
    seconds = time.perf_counter() - start
    yield {"case": "allocate pinned memory", "bytes": nbytes, "gb_s": nbytes / seconds / 1e9}
