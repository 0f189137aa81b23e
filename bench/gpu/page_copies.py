"""Paging by itself: how close copies into slots come to the link, and what a demand waits for.

Pages are random bytes of a live "model", pinned in place; slots are a CUDA slab; no arithmetic but
a large matrix product where a row says "computing". Every slot is compared with its page before a
time of that page size is reported. Rates are divided by this run's own pinned-copy roof, measured
beside them (`% roof`).
"""

from __future__ import annotations

import statistics
import time
from collections.abc import Iterator

import torch
from copy_roofs import event_seconds
from harness import Row

from moe_offload import _core
from moe_offload.config import OffloadConfig
from moe_offload.expert_layer import ExpertLayer
from moe_offload.offloader import Offloader
from moe_offload.pager import ExpertPool
from moe_offload.sources import TensorPages

COLUMNS = {
    "case": "case",
    "page_mib": "page MiB",
    "gb_s": "GB/s",
    "roof_percent": "% roof",
    "us": "us",
    "chunk_us": "one chunk us",
}
MIB = 1 << 20
PAGE_MIB = (1.0, 4.0, 9.0, 50.0, 336.0)  # 9: Qwen3-30B-A3B; 50: gpt-oss bf16; 336: Mixtral


class Paging:
    """Random pages of one size in host memory, and a pool of slots on the GPU."""

    def __init__(
        self, page_bytes: int, num_pages: int, num_slots: int, num_layers: int = 1
    ) -> None:
        elements = page_bytes // 2
        block = torch.randint(-30000, 30000, (32 * MIB,), dtype=torch.int16)
        tensor = torch.empty(num_layers * num_pages, elements, dtype=torch.int16)
        flat = tensor.view(-1)
        for start in range(0, flat.numel(), block.numel()):  # each page starts elsewhere in it
            part = flat[start : start + block.numel()]
            part.copy_(block[: part.numel()])
        tensor[:, 0] = torch.arange(len(tensor), dtype=torch.int16)
        self.weights = tensor.view(torch.bfloat16).view(num_layers, num_pages, elements)
        pages, layers = TensorPages(), []
        for index in range(num_layers):
            sections = {"up_proj": ((elements,), torch.bfloat16)}
            layers.append(ExpertLayer(f"bench.{index}", None, num_pages, sections))
            pages.add_layer(index, {"up_proj": self.weights[index]})
        config = OffloadConfig(device="cuda", device_budget=num_slots * page_bytes, fill=False)
        self.offloader = Offloader(layers, pages, config)
        self.num_pages, self.page_bytes = num_pages, page_bytes

    @property
    def pool(self) -> ExpertPool:
        return self.offloader.pools[0]

    def wait_until_pinned(self) -> float:
        """Seconds until the background thread has pinned everything."""
        start = time.perf_counter()
        self.offloader.wait_until_pinned()
        return time.perf_counter() - start

    def demand(self, experts: list[int]) -> None:
        """Enqueue a forward that needs these pages, on the current stream."""
        stream = torch.cuda.current_stream().cuda_stream
        ticket: _core.Ticket = self.pool.pager.acquire(0, experts, stream=stream)
        while ready := ticket.next():
            ticket.release([index for index, _ in ready])
        ticket.close()

    def check(self) -> None:
        """Every resident slot holds its page."""
        torch.cuda.synchronize()
        slots = self.pool.views["up_proj"]
        for layer, expert, slot in self.pool.pager.residents():
            page = self.weights[layer, expert]
            if not torch.equal(slots[slot].cpu().view(torch.int16), page.view(torch.int16)):
                raise SystemExit(f"paging: slot {slot} does not hold page {layer}, {expert}")

    def close(self) -> None:
        self.offloader.close()


def copy_roof(nbytes: int = 256 * MIB) -> float:
    """GB/s of one pinned copy to the device."""
    host = torch.empty(nbytes, dtype=torch.uint8, pin_memory=True).fill_(7)
    device = torch.empty(nbytes, dtype=torch.uint8, device="cuda")
    seconds = event_seconds(lambda: device.copy_(host, non_blocking=True), 8)
    return nbytes / statistics.median(seconds) / 1e9


class Busy:
    """Keeps the GPU computing on a stream of its own."""

    def __init__(self) -> None:
        self.a = torch.randn(4096, 4096, device="cuda", dtype=torch.bfloat16)
        self.b = torch.randn_like(self.a)
        self.out = torch.empty_like(self.a)
        self.stream = torch.cuda.Stream()

    def products(self, count: int) -> None:
        with torch.cuda.stream(self.stream):
            for _ in range(count):
                torch.mm(self.a, self.b, out=self.out)


def run(budget_s: float) -> Iterator[Row]:
    deadline = time.perf_counter() + budget_s
    roof = copy_roof()
    yield {"case": "roof: one pinned copy of 256 MiB", "gb_s": roof, "roof_percent": 100.0}
    busy = Busy()
    for page_mib in PAGE_MIB:
        if time.perf_counter() > deadline - 15:
            return
        yield from bandwidth(page_mib, roof, busy)
    yield from latency(roof)
    yield from overlap(busy)


def bandwidth(page_mib: float, roof: float, busy: Busy) -> Iterator[Row]:
    """A long stream of misses through few slots, idle and beside a busy GPU."""
    page_bytes = int(page_mib * MIB)
    num_pages = max(8, min(256, 4096 * MIB // page_bytes))
    paging = Paging(page_bytes, num_pages, max(4, num_pages // 4))
    pin_seconds = paging.wait_until_pinned()
    yield {
        "case": "pinning in place",
        "page_mib": page_mib,
        "gb_s": paging.weights.nbytes / pin_seconds / 1e9,
    }
    everything = list(range(num_pages))
    paging.demand(everything)
    paging.check()
    for case in ("stream of misses", "stream of misses, computing"):
        rates = []
        for _ in range(5):
            torch.cuda.synchronize()
            before = paging.pool.host_stats()["copied_bytes"]
            begin, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
            if case.endswith("computing"):
                busy.products(3000)
            begin.record()
            paging.demand(everything)
            end.record()
            end.synchronize()
            moved = paging.pool.host_stats()["copied_bytes"] - before
            rates.append(moved / begin.elapsed_time(end) / 1e6)
            torch.cuda.synchronize()
        rate = statistics.median(rates)
        yield {
            "case": case,
            "page_mib": page_mib,
            "gb_s": rate,
            "roof_percent": 100 * rate / roof,
            "all_gb_s": rates,
        }
    paging.check()
    paging.close()


def latency(roof: float) -> Iterator[Row]:
    """From acquire to the page being there, alone and behind a full queue of prefetches."""
    page_mib = 9.0
    page_bytes = int(page_mib * MIB)
    paging = Paging(page_bytes, 128, 160, num_layers=2)
    paging.wait_until_pinned()
    chunk_us = paging.offloader.config.copy_chunk_bytes / roof / 1e3
    samples: dict[str, list[float]] = {"demand, link idle": [], "demand behind prefetches": []}
    expert = 0
    for turn in range(60):
        case = list(samples)[turn % 2]
        if turn % 2:
            paging.pool.pager.prefetch(1, [(turn + i) % 128 for i in range(64)])
            time.sleep(0.0005)  # the link is busy with them by now
        start = time.perf_counter()
        paging.demand([expert])
        torch.cuda.current_stream().synchronize()
        samples[case].append((time.perf_counter() - start) * 1e6)
        paging.pool.pager.cancel_prefetches()
        paging.pool.pager.drain()
        expert = (expert + 37) % 128
    for case, values in samples.items():
        yield {
            "case": case,
            "page_mib": page_mib,
            "us": statistics.median(values),
            "chunk_us": chunk_us,
            "floor_us": page_bytes / roof / 1e3,
            "all_us": values,
        }
    paging.check()
    paging.close()


def overlap(busy: Busy) -> Iterator[Row]:
    """Products and copies one after the other and at once: what of the copies hides."""
    paging = Paging(9 * MIB, 128, 16)
    paging.wait_until_pinned()
    everything = list(range(128))

    def seconds(compute: bool, copy: bool) -> float:
        torch.cuda.synchronize()
        start = time.perf_counter()
        if compute:
            busy.products(200)
        if copy:
            paging.demand(everything)
        torch.cuda.synchronize()
        return time.perf_counter() - start

    seconds(True, True)
    compute = statistics.median(seconds(True, False) for _ in range(5))
    copy = statistics.median(seconds(False, True) for _ in range(5))
    both = statistics.median(seconds(True, True) for _ in range(5))
    hidden = 100 * (compute + copy - both) / min(compute, copy)
    for case, value in (("computing alone", compute), ("copying alone", copy), ("both", both)):
        yield {"case": f"overlap: {case}", "page_mib": 9.0, "us": value * 1e6}
    yield {"case": "overlap: share of the shorter that is hidden", "roof_percent": hidden}
    paging.close()
