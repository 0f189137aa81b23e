"""The offloader: one object per model that owns the pools and answers for them.

It divides the budget over the pools (one pool per page layout, so nearly always one), hands each
experts module its address in a pool, reports, resizes, and takes everything down again. It knows
nothing of transformers; `moe_offload.huggingface` finds the modules and supplies `on_restore`.
"""

from __future__ import annotations

import time
import weakref
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from torch import nn

from moe_offload.backends import ExpertBackend, choose
from moe_offload.budgets import check_memory, plan_host, plan_slots, smallest_budget
from moe_offload.config import OffloadConfig, format_bytes
from moe_offload.device import ComputeDevice, open_device
from moe_offload.errors import StateError
from moe_offload.expert_layer import ExpertLayer
from moe_offload.pager import ExpertPool, PagedLayer
from moe_offload.pages import PageLayout
from moe_offload.sources import PageSource
from moe_offload.telemetry import layer_stats, total_stats, write_timeline

if TYPE_CHECKING:
    from moe_offload.predictors.base import Predictor
    from moe_offload.predictors.driver import PrefetchDriver


class Offloader:
    """Owns the slots of one model's experts. Made by `offload` and `from_pretrained`.

    Args:
        layers: every experts module, in model order.
        pages: where the pages of (index in `layers`, expert) come from.
        config: budget, policy and the rest.
        on_restore: called by `restore` to make the model resident again, before the pools close.
        device: where experts are computed; default: what config.device names.

    Raises:
        BudgetError: the budget is malformed or cannot hold one wave.
        PageReadError: a checkpoint file is missing, or the initial fill failed.
        DeviceError: config.device names a GPU that cannot be used.
        ValueError: no layers, or pages whose shapes are not the layers'.
    """

    def __init__(
        self,
        layers: Sequence[ExpertLayer],
        pages: PageSource,
        config: OffloadConfig,
        *,
        on_restore: Callable[[], None] | None = None,
        device: ComputeDevice | None = None,
    ) -> None:
        if not layers:
            raise ValueError("Offloader: expected at least one layer of experts, got none")
        self.config = config
        self.layers = list(layers)
        self._on_restore = on_restore
        self.predicting: PrefetchDriver | None = None
        self._closed = False
        self._restored = False
        groups: dict[PageLayout, list[int]] = {}
        for index, layer in enumerate(self.layers):
            groups.setdefault(PageLayout.build(layer.page), []).append(index)
        self._layouts = list(groups)
        self._num_pages = [
            sum(self.layers[index].num_experts for index in members) for members in groups.values()
        ]
        slots = plan_slots(self._layouts, self._num_pages, config.device_budget)
        self.device = open_device(config.device) if device is None else device
        host_bytes = [0] * len(slots)
        if self.device.cuda is not None:
            host_bytes = plan_host(self._layouts, self._num_pages, config.host_budget, pages)
        else:
            check_memory(self._bytes_of(slots), config.device_budget)
        self.pools: list[ExpertPool] = []
        self._handles: dict[int, PagedLayer] = {}
        self._backends: dict[int, tuple[str, str | None]] = {}  # name, why not a faster one
        try:
            for (layout, members), num_slots, room in zip(
                groups.items(), slots, host_bytes, strict=True
            ):
                counts = [self.layers[index].num_experts for index in members]
                names = [self.layers[index].name for index in members]
                backends = [self._choose(layout, index) for index in members]
                may_shift = all(getattr(backend, "reads_shifted", False) for backend in backends)
                pool = ExpertPool(
                    *(layout, members, names, counts, pages, num_slots, config),
                    *(self.device, room, may_shift),
                )
                self.pools.append(pool)
                for local, (index, backend) in enumerate(zip(members, backends, strict=True)):
                    self._handles[index] = self._bind(pool, local, index, backend)
            self._fill()
        except BaseException:
            _close_pools(self.pools)
            raise
        # Also runs at interpreter exit, before threads become impossible to join.
        self._finalizer = weakref.finalize(self, _close_pools, self.pools)

    def _bytes_of(self, slots: Sequence[int]) -> int:
        """What so many slots in each pool occupy, the room to shift pages in them left out."""
        return sum(
            layout.slot_stride * count for layout, count in zip(self._layouts, slots, strict=True)
        )

    def _choose(self, layout: PageLayout, index: int) -> ExpertBackend | None:
        """Who computes a layer; None for one that is only paged."""
        layer = self.layers[index]
        if layer.module is None:
            return None
        backend, passed_over = choose(
            self.config.expert_backend,
            layer.module,
            layout,
            layer.name,
            self.device.torch_device.type,
        )
        self._backends[index] = (backend.name, passed_over)
        return backend

    def _bind(
        self, pool: ExpertPool, local: int, index: int, backend: ExpertBackend | None
    ) -> PagedLayer:
        layer = self.layers[index]
        experts = None
        if backend is not None:
            experts = backend.bind(layer.module, pool.layout, layer.num_experts)
        return PagedLayer(pool, local, layer.name, layer.num_experts, experts)

    def _fill(self) -> None:
        for pool in self.pools:
            everything_fits = pool.num_slots >= pool.num_pages
            if self.config.fill is True or (self.config.fill == "auto" and everything_fits):
                pool.fill()

    def handle(self, index: int) -> PagedLayer:
        """The address of layer `index` (position in `layers`), for `layer.run_experts`; KeyError
        when there is no such layer."""
        return self._handles[index]

    @property
    def device_budget_bytes(self) -> int:
        """Bytes of the slots that exist now."""
        return sum(pool.num_slots * pool.layout.slot_stride for pool in self.pools)

    @property
    def total_expert_bytes(self) -> int:
        """Bytes of all experts, as slots: what a budget of 100% is."""
        return sum(
            layout.slot_stride * pages
            for layout, pages in zip(self._layouts, self._num_pages, strict=True)
        )

    @property
    def smallest_budget_bytes(self) -> int:
        """The smallest budget this model accepts."""
        return smallest_budget(self._layouts, self._num_pages)

    @property
    def lossy(self) -> str | None:
        """The name of what changes tokens ("lossy_pregated"); None: nothing, as by default."""
        predictor = None if self.predicting is None else self.predicting.predictor
        return predictor.name if predictor is not None and predictor.lossy else None

    def stats(self) -> dict[str, Any]:
        """Counters since construction or `reset_stats`, JSON-ready.

        Counts are of distinct (layer, expert) pages per call of a layer. Keys: acquires (calls),
        lookups = hits + demand_misses + joined_prefetches, prefetch_hits (of the hits, the first
        uses of prefetched pages), hit_rate, hit_rate_without_prefetch, demand_bytes,
        prefetch_bytes_used, prefetch_bytes_wasted, fill_bytes, disk_bytes, swap_back_bytes (of
        pages sent back, see `OffloadConfig`), evictions, bypasses, stall_seconds, overlap_seconds,
        device_budget_bytes, total_expert_bytes, num_slots, num_pages, resident_pages, policy,
        device, lossy (what changes tokens; None: nothing does),
        dense_backend (of a transformers model's other layers),
        expert_backend (several names when layers differ), weight_format of the pages ("plain",
        "mxfp4", "fp8_block", "int4_group"), io_mode, io_engine, io_fallback, files_deleted, and
        per_layer: the same for each layer, with its expert_backend, in passed_over why no faster
        one computes it (None: the fastest does), and in dequantised why pages of a quantised
        checkpoint are not quantised (None: they are, or it is not). predictor is None without one;
        else its recall, time, and what it saved and wasted. On a GPU also, since
        construction: copied_bytes, num_copies, staged_bytes (not pinned, hence slow),
        pinned_bytes, pinning (1 while that goes on), pinning_limit (why not more), and for files
        host_bytes, host_hits, host_misses, host_evictions of the host tier.
        """
        self._check_open("stats")
        per_layer = layer_stats(self.pools)
        totals = total_stats(per_layer)
        for row in per_layer:
            row["expert_backend"], row["passed_over"] = self._backends.get(
                row["layer"], ("none", None)
            )
            row["weight_format"] = self.layers[row["layer"]].weight_format
            row["dequantised"] = self.layers[row["layer"]].dequantised
        return {
            **totals,
            "device_budget_bytes": self.device_budget_bytes,
            "total_expert_bytes": self.total_expert_bytes,
            "num_slots": sum(pool.num_slots for pool in self.pools),
            "num_pages": sum(self._num_pages),
            "resident_pages": sum(len(pool.pager.residents()) for pool in self.pools),
            "policy": self._policy(),
            "lossy": self.lossy,
            "dense_backend": "native" if self.config.native_dense else "torch",
            "expert_backend": "/".join(sorted({row["expert_backend"] for row in per_layer})),
            "weight_format": "/".join(sorted({row["weight_format"] for row in per_layer})),
            "io_mode": "/".join(sorted({pool.io_mode() for pool in self.pools})),
            "io_engine": "/".join(sorted({pool.io_engine() for pool in self.pools})),
            "io_fallback": next(filter(None, (pool.io_fallback() for pool in self.pools)), None),
            "files_deleted": any(pool.files_deleted() for pool in self.pools),
            "predictor": None if self.predicting is None else self.predicting.stats(totals),
            "device": str(self.device.torch_device),
            **self._host_stats(),
            "per_layer": per_layer,
        }

    def _policy(self) -> str:
        return "/".join(sorted({pool.policy for pool in self.pools}))

    def _host_stats(self) -> dict[str, Any]:
        """Of the way to a GPU, summed over pools; nothing on the CPU."""
        if self.device.cuda is None:
            return {}
        sums: dict[str, Any] = {}
        for pool in self.pools:
            for name, value in pool.host_stats().items():
                sums[name] = sums.get(name, 0) + value
        limits = sorted({pool.host_limit() for pool in self.pools} - {""})
        return {**sums, "pinning_limit": "; ".join(limits) or None}

    def wait_until_pinned(self) -> None:
        """Block until the background thread has pinned the host memory it may, for measurements.

        Until then copies of what is not pinned are slower. Returns at once on the CPU.
        """
        self._check_open("wait_until_pinned")
        while any(pool.host_stats().get("pinning") for pool in self.pools):
            time.sleep(0.001)

    def reset_stats(self) -> None:
        """Set every counter to zero and forget the timeline."""
        self._check_open("reset_stats")
        for pool in self.pools:
            pool.reset_counters()
        if self.predicting is not None:
            self.predicting.reset()

    def timeline(self, path: str | Path) -> int:
        """Write recent copies, stalls and tickets as a Chrome / Perfetto trace, the newest 65 536
        of each pool; returns how many were written. OSError when the file cannot be."""
        self._check_open("timeline")
        return write_timeline(self.pools, path)

    def resize(self, device_budget: int | str) -> None:
        """Give the experts another budget. Cached pages are dropped; nothing else changes.

        Raises:
            BudgetError: as at construction; the old budget stays in force.
            StateError: a forward pass is running, or the offloader is closed.
        """
        self._check_open("resize")
        slots = plan_slots(self._layouts, self._num_pages, device_budget)
        if self.device.cuda is None:
            check_memory(self._bytes_of(slots), device_budget, self.device_budget_bytes)
        for pool, num_slots in zip(self.pools, slots, strict=True):
            if num_slots != pool.num_slots:
                pool.resize(num_slots)
        self._fill()

    def prefetch(self, layer: int, experts: Sequence[int]) -> int:
        """Start copies of pages that layer `layer` is likely to need; returns how many started.

        Does not block. Demand fetches go first; what is not used is counted as wasted.

        Args:
            layer: position in `layers`.
            experts: distinct ids, the likeliest first; those resident or on their way cost nothing.

        Raises:
            KeyError: no such layer.
            ValueError: ids out of range, or one twice.
        """
        self._check_open("prefetch")
        handle = self._handles[layer]
        return handle.pool.pager.prefetch(handle.layer, list(experts))

    def predict_with(self, model: nn.Module, predictor: Predictor | None) -> None:
        """Prefetch by the predictions of `predictor` from the next call on; None stops it.

        Args:
            model: the model whose experts these are.
            predictor: one that is bound to no model; it is bound to this one.

        Raises:
            PredictorError: it does not fit the model; there is no predictor then.
        """
        self._check_open("predict_with")
        if self.predicting is not None:
            self.predicting.close()
            self.predicting = None
        if predictor is not None:
            from moe_offload.predictors.driver import PrefetchDriver

            self.predicting = PrefetchDriver(
                model, self, predictor, threshold=self.config.prefetch_threshold
            )

    def chaos(
        self,
        seed: int = 0,
        *,
        max_delay_us: int = 0,
        reorder: bool = False,
        fail_probability: float = 0.0,
        evict_probability: float = 0.0,
    ) -> None:
        """Make timing hostile, for tests and `verify`; call without arguments to stop.

        Args:
            seed: of all random choices.
            max_delay_us: every piece of a copy first sleeps up to this long.
            reorder: queued copies start in random order.
            fail_probability: share of copies that fail with PageReadError.
            evict_probability: share of unlocked pages dropped before each layer.
        """
        self._check_open("chaos")
        for pool in self.pools:
            pool.pager.set_chaos(seed, max_delay_us, reorder, fail_probability, evict_probability)

    def restore(self) -> None:
        """Make the model resident again and close. Also allowed once after `close`.

        Raises:
            StateError: restored before, or nothing to restore (no model attached).
        """
        if self._restored:
            self._check_open("restore")
        if self._on_restore is None:
            self._check_open("restore")
            raise StateError("restore: this offloader is not attached to a model")
        self._on_restore()
        self._restored = True
        self.close()

    def close(self) -> None:
        """Stop all copies, join the worker threads, give the slots back. Idempotent.

        An attached model stays without its experts until `restore`.
        """
        self._closed = True
        if self.predicting is not None:
            self.predicting.close()
        self._finalizer()

    @property
    def closed(self) -> bool:
        return self._closed

    def _check_open(self, call: str) -> None:
        if self._closed:
            raise StateError(f"{call}: this offloader was restored or closed")

    def __enter__(self) -> Offloader:
        return self

    def __exit__(self, *_: object) -> None:
        """Leave no model without experts: restore when attached to one, else close."""
        if self._on_restore is not None and not self._restored:
            self.restore()
        else:
            self.close()

    def __repr__(self) -> str:
        state = "closed" if self._closed else format_bytes(self.device_budget_bytes)
        return (
            f"Offloader({len(self.layers)} layers, {sum(self._num_pages)} experts, {state} of "
            f"{format_bytes(self.total_expert_bytes)}, policy={self._policy()!r})"
        )


def _close_pools(pools: list[ExpertPool]) -> None:
    for pool in pools:
        pool.close()
