"""Configuration: one frozen dataclass that checks itself, and the budget parser.

A budget is what experts may occupy on the compute device: bytes (`6442450944`), a size with a unit
("6GiB", "500 MB") or a share of all expert bytes ("25%"). Units follow IEC 80000-13: "GB" is
10^9 bytes, "GiB" is 2^30.
"""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import dataclass, fields
from typing import Any, Literal

from moe_offload.errors import BudgetError
from moe_offload.policies import LIVE_POLICIES
from moe_offload.predictors import check_predictor
from moe_offload.presets import with_preset

_UNITS = {"": 1, "b": 1}
for _power, _prefix in enumerate("kmgt", start=1):
    _UNITS[f"{_prefix}b"] = 1000**_power
    _UNITS[f"{_prefix}ib"] = 1024**_power
_BUDGET = re.compile(r"\s*([0-9]*\.?[0-9]+)\s*(%|[a-zA-Z]*)\s*")
_EXPECTED = 'bytes (an int > 0), a size such as "6GiB" or "500 MB", or a share such as "25%"'


def parse_budget(budget: int | str, total_bytes: int, name: str = "device_budget") -> int:
    """Turn a budget into bytes.

    Args:
        budget: bytes as int, a size with unit, or a percentage of `total_bytes`, 0 < p <= 100.
        total_bytes: bytes of all experts, what a percentage refers to.
        name: of the option, for messages.

    Returns:
        Budget in bytes, at most `total_bytes` for a percentage, as given otherwise.

    Raises:
        BudgetError: malformed, zero, negative, or a percentage above 100.

    Example:
        >>> parse_budget("25%", 400), parse_budget("1KiB", 0), parse_budget(7, 0)
        (100, 1024, 7)
    """
    if isinstance(budget, bool) or not isinstance(budget, int | str):
        raise BudgetError(f"{name}: expected {_EXPECTED}, got {budget!r}")
    if isinstance(budget, int):
        if budget <= 0:
            raise BudgetError(f"{name}: expected {_EXPECTED}, got {budget}")
        return budget
    match = _BUDGET.fullmatch(budget)
    unit = match.group(2).lower() if match else None
    if match is None or (unit != "%" and unit not in _UNITS):
        raise BudgetError(f"{name}: expected {_EXPECTED}, got {budget!r}")
    number = float(match.group(1))
    if unit == "%":
        if not 0 < number <= 100:
            raise BudgetError(f"{name}: a share must lie in (0%, 100%], got {budget!r}")
        return int(total_bytes * number / 100)
    size = int(number * _UNITS[unit or ""])
    if size <= 0:
        raise BudgetError(f"{name}: expected {_EXPECTED}, got {budget!r}")
    return size


def format_bytes(num_bytes: float) -> str:
    """Bytes for people: 1536 -> "1.5 KiB"."""
    for unit in ("B", "KiB", "MiB", "GiB"):
        if abs(num_bytes) < 1024:
            return f"{num_bytes:.0f} {unit}" if unit == "B" else f"{num_bytes:.1f} {unit}"
        num_bytes /= 1024
    return f"{num_bytes:.2f} TiB"


EXPERT_BACKENDS = ("auto", "native", "cuda", "triton", "grouped_mm")
DENSE_BACKENDS = ("auto", "native", "torch")


@dataclass(frozen=True)
class OffloadConfig:
    """How experts are kept and fetched. Every field is used; unknown names are refused.

    Attributes:
        device_budget: what experts may occupy on the compute device, see `parse_budget`.
        policy: which resident page leaves first: "auto" (learned from this model's routing, or
            least recently used while that does better), "lru" over all layers, "lru-per-layer",
            "lfu", "static", "score", ...: a name in `moe_offload.policies.LIVE_POLICIES`.
        predictor: what is fetched ahead of need: "none", "auto" (what the measurements in
            docs/predictors.md say pays: "lookahead-0" for pages of 4 MiB and more that are read
            from disk on a CPU machine, else nothing), "previous", "recall", "lookahead-0",
            "lookahead", "lookahead-2", "lookahead-3", the folder of a trained predictor, a
            `Predictor`, "ring", "rpp", "preattention" or "pregate" (trained ones, in the
            checkpoint's own folder under predictors/). It never changes a token, but for
            "lossy_pregated", which executes what pre-gates predicted.
        prefetch_threshold: a page is fetched ahead when the chance that it is used is at least
            this, above 0 and at most 1. At a half as many bytes are saved as wasted by the least
            likely page; less buys hits with bytes, where the link has time for them.
        preset: name of a system in `moe_offload.presets`, which sets policy and predictor.
        static_experts: for policy "static", the (layer, expert) pairs that stay. Default: the
            first experts of each layer, evenly.
        device: where experts are computed, and their slots are: "cpu", "cuda" or "cuda:N".
        host_budget: for a GPU, the host memory between disk and slots: bytes, a size or a share
            of all expert bytes, as device_budget; or "auto" = all experts, but no more than half
            of the memory that is free. Of a checkpoint, so much is kept, least recently wanted
            first out; of a live model, whose experts are in memory anyway, so much is pinned.
        copy_chunk_bytes: for a GPU, the most bytes of prefetches that a demand fetch can find in
            its way on the link; a multiple of 4096.
        expert_backend: who computes experts: "native" (this package's CPU kernels), "cuda" (its
            CUDA kernels), "triton" (its Triton kernels: for GPUs; on the CPU only interpreted, for
            tests), "grouped_mm" (transformers' own arithmetic), or "auto": the first of these made
            for the device that is built and supports the layer. `stats()` says who it is and why.
        dense_backend: who computes the rest of a transformers model: "native" (linear layers and
            RMSNorms by this package's CPU kernels, decoded tokens' attention too, where that is
            faster, and KV caches grown in place, see `moe_offload.dense`), "torch", or "auto":
            native on the CPU, unless expert_backend asks for transformers' arithmetic.
        fill: read experts into the slots at construction: True, False, or "auto" = when all fit.
        io_engine: how files are read: "io_uring", "threads" (a pool of them that call pread), or
            "auto" = io_uring where it was built and the kernel allows it. What was taken, and why
            not io_uring, is in `stats()`. Experts in memory are always copied by threads.
        io_threads: worker threads that read or copy pages, 1 to 64. Half of them at most copy
            prefetches, so that a demand fetch finds one free.
        io_depth: reads that io_uring keeps in flight for demand fetches, 1 to 256; prefetches
            never have more than two.
        chunk_bytes: copies are cut into pieces of this size: the unit in which a demand fetch
            overtakes prefetches; a multiple of 4096. Pages that are read straight into their slot
            (large ones, for the native kernels, where the disk can) are cut into pieces four
            times as long when they are prefetched, sixteen times when they are demanded.
        direct_io: read checkpoints with O_DIRECT so that expert bytes stay out of the page cache;
            False reads through the page cache.
        swap_back: send each page that loses its slot back to host memory before the next one comes,
            as published caches do that swap experts. Nothing reads that copy: it is there for
            comparisons with them (preset "cache-moe-swap-back"). Costs a page of memory for each
            copy under way, outside device_budget. Not for a GPU.
        wait_timeout_s: no wait for a page lasts longer than this; a timeout raises.
    """

    device_budget: int | str = "25%"
    policy: str = "auto"
    predictor: Any = "auto"
    prefetch_threshold: float = 0.5
    preset: str | None = None
    static_experts: Sequence[tuple[int, int]] | None = None
    device: str = "cpu"
    host_budget: int | str = "auto"
    copy_chunk_bytes: int = 8 << 20
    expert_backend: Literal["auto", "native", "cuda", "triton", "grouped_mm"] = "auto"
    dense_backend: Literal["auto", "native", "torch"] = "auto"
    fill: bool | Literal["auto"] = "auto"
    io_engine: Literal["auto", "io_uring", "threads"] = "auto"
    io_threads: int = 4
    io_depth: int = 4
    chunk_bytes: int = 1 << 20
    direct_io: bool = True
    swap_back: bool = False
    wait_timeout_s: float = 120.0

    def __post_init__(self) -> None:
        parse_budget(self.device_budget, 1 << 62)  # malformed budgets fail here, before any work
        _choose("policy", self.policy, LIVE_POLICIES)
        _choose("expert_backend", self.expert_backend, EXPERT_BACKENDS)
        _choose("dense_backend", self.dense_backend, DENSE_BACKENDS)
        check_predictor(self.predictor)
        if not 0 < self.prefetch_threshold <= 1:
            raise ValueError(
                f"prefetch_threshold: expected a chance above 0 and at most 1, got "
                f"{self.prefetch_threshold}"
            )
        if self.fill not in (True, False, "auto"):
            raise ValueError(f'fill: expected True, False or "auto", got {self.fill!r}')
        if not re.fullmatch(r"cpu|cuda(:[0-9]+)?", self.device):
            raise ValueError(f'device: expected "cpu", "cuda" or "cuda:N", got {self.device!r}')
        if self.dense_backend == "native" and self.device != "cpu":
            raise ValueError(
                f'dense_backend: "native" computes on the CPU only, got device={self.device!r}. '
                'Use "auto".'
            )
        if self.host_budget != "auto":
            parse_budget(self.host_budget, 1 << 62, "host_budget")
        if self.copy_chunk_bytes < 4096 or self.copy_chunk_bytes % 4096:
            raise ValueError(
                f"copy_chunk_bytes: expected a positive multiple of 4096, got "
                f"{self.copy_chunk_bytes}"
            )
        _choose("io_engine", self.io_engine, ("auto", "io_uring", "threads"))
        if not 1 <= self.io_threads <= 64:
            raise ValueError(f"io_threads: expected 1 to 64, got {self.io_threads}")
        if not 1 <= self.io_depth <= 256:
            raise ValueError(f"io_depth: expected 1 to 256, got {self.io_depth}")
        if self.chunk_bytes < 4096 or self.chunk_bytes % 4096:
            raise ValueError(
                f"chunk_bytes: expected a positive multiple of 4096, got {self.chunk_bytes}"
            )
        if self.swap_back and self.device != "cpu":
            raise ValueError(
                f'swap_back: only slots in host memory, device="cpu", can have it; got device='
                f'{self.device!r}. Leave it out, or use preset="cache-moe".'
            )
        if not self.wait_timeout_s > 0:
            raise ValueError(f"wait_timeout_s: expected seconds > 0, got {self.wait_timeout_s}")
        if self.static_experts is not None and self.policy != "static":
            raise ValueError(f'static_experts needs policy="static", got policy={self.policy!r}')

    @property
    def native_dense(self) -> bool:
        """Is what is not an expert computed as `moe_offload.dense` does?"""
        if self.dense_backend != "auto":
            return self.dense_backend == "native"
        return self.device == "cpu" and self.expert_backend in ("auto", "native")

    @classmethod
    def from_options(cls, **options: Any) -> OffloadConfig:
        """Build from keyword options; an unknown name raises TypeError that lists the known."""
        known = [field.name for field in fields(cls)]
        unknown = [name for name in options if name not in known]
        if unknown:
            raise TypeError(f"unknown option {unknown[0]!r}; known options: {', '.join(known)}")
        return cls(**with_preset(options))


def _choose(name: str, value: object, choices: tuple[str, ...]) -> None:
    if value not in choices:
        raise ValueError(f"{name}: expected one of {', '.join(choices)}, got {value!r}")
