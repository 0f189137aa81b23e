"""From bytes to tokens per second: what a replayed run would take on given rates.

Per layer call, with m pages missing, d distinct experts in all, P bytes per page:

    copy    = m P / link                 (and m P / disk, if slower, for the share read from disk)
    compute = max(d P / memory, flops / rate)          each used expert is read once
    layer   = other + max(copy + last page's compute, compute)

Copies overlap with the computation of pages that are here, which is what the pager does; the last
page to arrive is computed after it. Prefetched pages use the link while it is idle: what does not
fit into the time of the layer calls since the previous prefetch is waited for. This is a bound of
scheduling, not a prediction of a product: launch costs and contention are in `other_s` only.
"""

from __future__ import annotations

import os
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from moe_offload.replay import ReplayResult
from moe_offload.replay_events import PREFETCH, REQUEST


@dataclass(frozen=True)
class TimeModel:
    """Rates of one machine and model.

    Attributes:
        page_bytes: bytes of one expert.
        link_bytes_per_s: host to device copies (the disk, when slots are RAM fed from files).
        memory_bytes_per_s: what the compute device reads weights with.
        other_s: seconds per layer call for everything else: attention, router, launches.
        disk_bytes_per_s: of the disk, for pages that are not in host memory.
        disk_share: share of missing pages that come from the disk, 0 to 1.
        flops_per_token_expert: FLOPs of one token in one expert; 0 leaves compute memory bound.
        flops_per_s: arithmetic rate.
        swap_back: each page that comes first sends the one it replaces back to the host, over the
            same link, two copies in a row; filling the empty cache counts alike. That is what the
            baselines called Cache-MoE do (mixtral-offloading swaps storages, ExpertFlow's
            baseline class copies both ways). Pages never change, so it buys nothing: this package
            has no such mode live, and a comparison with those systems has to name it.
    """

    page_bytes: float
    link_bytes_per_s: float
    memory_bytes_per_s: float
    other_s: float = 0.0
    disk_bytes_per_s: float = float("inf")
    disk_share: float = 0.0
    flops_per_token_expert: float = 0.0
    flops_per_s: float = float("inf")
    swap_back: bool = False

    def __post_init__(self) -> None:
        for name in ("page_bytes", "link_bytes_per_s", "memory_bytes_per_s", "disk_bytes_per_s"):
            if not getattr(self, name) > 0:
                raise ValueError(f"TimeModel: {name} must be above 0, got {getattr(self, name)}")
        if not 0 <= self.disk_share <= 1 or self.other_s < 0:
            raise ValueError(
                f"TimeModel: expected disk_share in [0, 1] and other_s >= 0, got "
                f"{self.disk_share} and {self.other_s}"
            )

    @property
    def _copies_per_page(self) -> int:
        return 2 if self.swap_back else 1

    def bytes_per_token(self, result: ReplayResult) -> float:
        """Bytes over the link per token, in both directions, prefetched pages included."""
        return self._copies_per_page * result.copies_per_token * self.page_bytes

    def copy_s(self, pages: NDArray[Any]) -> NDArray[Any]:
        """Seconds of link (or disk, whichever is slower) for so many pages."""
        per_page = max(
            self._copies_per_page * self.page_bytes / self.link_bytes_per_s,
            self.disk_share * self.page_bytes / self.disk_bytes_per_s,
        )
        return pages * per_page

    def seconds(self, result: ReplayResult, top_k: int) -> float:
        """Time of a replayed run; top_k is A, for the FLOPs."""
        events = result.events
        is_request = events.kinds == REQUEST
        distinct = np.diff(events.expert_offsets)[is_request]
        missing = result.misses[is_request]
        read = distinct * self.page_bytes / self.memory_bytes_per_s
        rows = events.counts[is_request] * top_k
        compute = np.maximum(read, rows * self.flops_per_token_expert / self.flops_per_s)
        last = np.where(missing > 0, self.page_bytes / self.memory_bytes_per_s, 0.0)
        copy = self.copy_s(missing)
        layer = self.other_s + np.maximum(copy + last, compute)
        # Prefetches before request i use the link time that request i - 1 left idle.
        number = np.cumsum(is_request) - 1
        fetched = np.zeros(len(layer) + 1)
        at = events.kinds == PREFETCH
        np.add.at(fetched, number[at] + 1, result.prefetched[at])
        wanted = self.copy_s(fetched[:-1].astype(np.int32))
        idle = np.concatenate([[0.0], (layer - copy)[:-1]])
        return float((layer + np.maximum(0.0, wanted - idle)).sum())

    def tokens_per_second(self, result: ReplayResult, top_k: int) -> float:
        """Tokens of the run over its time."""
        return result.tokens / self.seconds(result, top_k)

    @staticmethod
    def measured(page_bytes: int, path: str | Path | None = None) -> TimeModel:
        """Rates of this machine: page copies in memory and, when `path` is given, file reads.

        Args:
            page_bytes: bytes of one expert.
            path: a large file on the disk that holds the checkpoint; its reads bypass the page
                cache where the file system allows it, and then are the link.
        """
        count = max(4, (256 << 20) // page_bytes)
        source = np.ones((count, page_bytes), np.uint8)
        slot = np.zeros((4, page_bytes), np.uint8)

        def copy_all() -> float:
            start = time.perf_counter()
            for page in range(count):
                np.copyto(slot[page % 4], source[page])
            return count * page_bytes / (time.perf_counter() - start)

        def read_all() -> float:
            start = time.perf_counter()
            source.reshape(-1).view(np.uint64).sum() if page_bytes % 8 == 0 else source.sum()
            return count * page_bytes / (time.perf_counter() - start)

        copy = max(copy_all() for _ in range(3))
        memory = max(read_all() for _ in range(3))
        link = copy if path is None else _disk_rate(Path(path))
        return TimeModel(page_bytes, link, memory)


def _disk_rate(path: Path) -> float:
    block, limit = 1 << 20, 256 << 20
    buffer = np.empty(block + 4096, np.uint8)
    shift = -buffer.ctypes.data % 4096  # O_DIRECT needs an aligned buffer
    aligned: Any = buffer[shift : shift + block]
    try:
        handle = os.open(path, os.O_RDONLY | os.O_DIRECT)
    except OSError:  # a file system without O_DIRECT: through the page cache
        handle = os.open(path, os.O_RDONLY)
    try:
        start, total = time.perf_counter(), 0
        while total < limit and (got := os.preadv(handle, [aligned], total)) > 0:
            total += got
            if got < block:
                break
        return total / (time.perf_counter() - start)
    finally:
        os.close(handle)
