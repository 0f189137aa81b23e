"""A pool of slots and its pager: where torch's memory meets the C++ core.

One `ExpertPool` per page layout, shared by all layers that have it. torch allocates the slab of
slots; `_core.Pager` decides and copies; the views are the slots seen as parameters, [S, ...].

A page read from a file may begin some bytes behind the start of its slot, so that the disk can
write it there without a detour (csrc/paging/file_source.h). Only backends that ask for each slot's
shift get such a pool; it has no views, because no stride leads from page to page.
"""

from __future__ import annotations

import itertools
import weakref
from collections.abc import Callable
from dataclasses import dataclass, field

from torch import Tensor

from moe_offload import _core
from moe_offload.backends import BoundExperts
from moe_offload.config import OffloadConfig
from moe_offload.device import HOST, ComputeDevice
from moe_offload.errors import StateError
from moe_offload.pages import SLOT_ALIGN, PageLayout
from moe_offload.sources import PageSource

MIN_SLOTS: int = _core.MIN_SLOTS  # one page is computed while the next arrives
MAX_ROUTED_TOKENS: int = _core.MAX_ROUTED_TOKENS  # of a call whose routes a policy is told

# Smaller pages begin where their slots do: the room to shift them, SLOT_ALIGN bytes a slot, would
# cost more of the budget than 1 / 256 of it, and models that small fit in memory anyway.
MIN_SHIFTED_BYTES = 1 << 20

Counters = dict[str, list[int]]


@dataclass(frozen=True)
class PagedLayer:
    """One experts module's address in a pool: what `layer.run_experts` needs."""

    pool: ExpertPool
    layer: int  # index in the pool
    name: str
    num_experts: int
    experts: BoundExperts | None = None  # who computes them; None for layers that are only paged
    key: int = field(default_factory=itertools.count().__next__)  # for `find_layer`

    def __post_init__(self) -> None:
        _LAYERS[self.key] = self


# Compiled code names a layer by number, because an op takes no Python objects (see ops.py).
_LAYERS: weakref.WeakValueDictionary[int, PagedLayer] = weakref.WeakValueDictionary()


def find_layer(key: int) -> PagedLayer | None:
    """The layer with this key, None when it no longer exists."""
    return _LAYERS.get(key)


class ExpertPool:
    """Slots for pages of one layout, for one or more layers.

    Args:
        layout: byte layout of every page.
        layers: index of each layer in the source.
        names: module name of each layer, for messages and telemetry.
        num_experts: experts of each layer.
        source: where pages come from.
        num_slots: slots to allocate, at least MIN_SLOTS; more than there are pages is cut.
        device: where the slots are.
        host_bytes: for slots on a GPU, host memory between source and slots: pages in files get
            frames in it, tensors are pinned where they lie, up to so many bytes.
        config: io_engine, chunk_bytes, direct_io, policy and so on.
        may_shift: whoever reads the slots asks the pager where in them pages begin.
    """

    def __init__(
        self,
        layout: PageLayout,
        layers: list[int],
        names: list[str],
        num_experts: list[int],
        source: PageSource,
        num_slots: int,
        config: OffloadConfig,
        device: ComputeDevice = HOST,
        host_bytes: int = 0,
        may_shift: bool = False,
    ) -> None:
        self.layout = layout
        self.device = device
        self._host_bytes = host_bytes
        self.layers = layers
        self.names = names
        self.num_experts = num_experts
        self._config = config
        self._source = source.core_source(layout, layers, num_experts, config.direct_io)
        self.shifted = (
            may_shift
            and device.cuda is None
            and layout.page_bytes >= MIN_SHIFTED_BYTES
            and isinstance(self._source, _core.FileSource)
            and self._source.io_mode != "buffered"
        )
        self.slot_stride = layout.slot_stride + (SLOT_ALIGN if self.shifted else 0)
        # A prompt's reads of the next layer begin while this one is computed, see layer.py. Not
        # measured, so not done, for pages in memory and slots on a GPU.
        self.reads_ahead = device.cuda is None and isinstance(self._source, _core.FileSource)
        self.on_acquired: Callable[[], None] | None = None  # a predictor's turn, see predictors/
        self._past: Counters = {}  # counters of pagers that a resize replaced
        self._open(num_slots)

    @property
    def policy(self) -> str:
        """The policy at work. Where every page has a slot nobody ever leaves, and "auto" would
        learn for nothing: then it is "lru"."""
        configured = self._config.policy
        return "lru" if configured == "auto" and self.num_slots >= self.num_pages else configured

    @property
    def num_pages(self) -> int:
        return sum(self.num_experts)

    def _open(self, num_slots: int) -> None:
        self.num_slots = min(num_slots, self.num_pages)
        slots = max(self.num_slots, MIN_SLOTS)  # a pool of one page still gets two slots
        kept = self.kept_pages() if self._config.policy == "static" else []
        self.slab: Tensor | None = self.device.allocate_slab(slots, self.slot_stride)
        # Parameters [S, ...] of pages that begin where their slots do. Where the pool is shifted,
        # the page of slot s lies pager.slot_shift(s) bytes further on.
        self.slot_starts: dict[str, Tensor] = self.layout.views(self.slab, self.slot_stride)
        self.pager = _core.Pager(
            source=self._source,
            num_experts=self.num_experts,
            layer_names=self.names,
            slots=self.slab.data_ptr(),
            num_slots=slots,
            slot_stride=self.slot_stride,
            policy=self.policy,
            kept=kept,
            io_engine=self._config.io_engine,
            num_threads=self._config.io_threads,
            queue_depth=self._config.io_depth,
            chunk_bytes=self._config.chunk_bytes,
            wait_timeout_s=self._config.wait_timeout_s,
            cuda=self.device.cuda,
            page_bytes=self.layout.page_bytes,
            copy_chunk_bytes=self._config.copy_chunk_bytes,
            host_bytes=self._host_bytes,
            shift_pages=self.shifted,
            swap_back=self._config.swap_back,
        )

    @property
    def views(self) -> dict[str, Tensor]:
        """All slots as parameters, [S, ...].

        Raises:
            StateError: pages of this pool are shifted, each by its own bytes.
        """
        if self.shifted:
            raise StateError(
                "pool: its pages are shifted within their slots, so they are not one tensor. Use "
                "page_views(slot)."
            )
        return self.slot_starts

    def page_views(self, slot: int) -> dict[str, Tensor]:
        """The page in a slot as one expert's parameters, wherever in the slot it begins.

        Valid for pages that are resident or that a ticket was given, while they stay.
        """
        if self.slab is None:
            raise StateError("pool: its slots were given back")
        begin = slot * self.slot_stride + self.pager.slot_shift(slot)
        page = self.slab[begin : begin + self.layout.page_bytes]
        return {
            section.name: page[section.offset : section.offset + section.nbytes]
            .view(section.dtype)
            .view(section.shape)
            for section in self.layout.sections
        }

    def kept_pages(self) -> list[tuple[int, int]]:
        """The static set in pool indices: as configured, else the first experts of each layer."""
        if self._config.static_experts is not None:
            local = {layer: i for i, layer in enumerate(self.layers)}
            return [
                (local[layer], expert)
                for layer, expert in self._config.static_experts
                if layer in local
            ]
        if self.num_slots >= self.num_pages:
            return self.pages_by_rank(self.num_pages)
        return self.pages_by_rank(self.num_slots - MIN_SLOTS)

    def pages_by_rank(self, count: int) -> list[tuple[int, int]]:
        """The first `count` pages, spread evenly: expert 0 of every layer, then expert 1, ..."""
        ranked = [
            (layer, expert)
            for expert in range(max(self.num_experts))
            for layer, num in enumerate(self.num_experts)
            if expert < num
        ]
        return ranked[:count]

    def fill(self) -> None:
        """Read pages into all free slots and wait for them."""
        if self._config.policy == "static":
            self.pager.fill(self.kept_pages())
        else:
            self.pager.fill(self.pages_by_rank(self.num_pages))
        self.pager.drain()

    def resize(self, num_slots: int) -> None:
        """Replace the slab by one of another size; the cache starts empty.

        The old slab is given back before the new one is allocated, so the peak is the larger of
        the two, not their sum.

        Raises:
            StateError: a forward pass holds slots at this moment.
        """
        if self.pager.num_live_tickets:
            raise StateError(
                "resize: a forward pass is using the slots. Call it between calls of the model."
            )
        self._past = self.counters()
        self.pager.close()
        self.slot_starts = {}
        self.slab = None
        self._open(num_slots)

    def counters(self) -> Counters:
        """Counters per layer since construction or the last reset, across resizes."""
        now = self.pager.counters()
        if not self._past:
            return now
        return {
            name: [a + b for a, b in zip(values, self._past[name], strict=True)]
            for name, values in now.items()
        }

    def reset_counters(self) -> None:
        self._past = {}
        self.pager.reset_counters()

    def host_stats(self) -> dict[str, int]:
        """Bytes and counts of the way from host memory to a GPU; {} on the CPU."""
        return self.pager.engine_stats()

    def host_limit(self) -> str:
        """Why not all host memory is pinned; "" when all is, or none needs to be."""
        return self.pager.engine_limit()

    def io_mode(self) -> str:
        """How pages come: "direct", "buffered" or "mixed" reads, "memory", or "converted"."""
        if isinstance(self._source, _core.FileSource):
            return self._source.io_mode
        return "converted" if isinstance(self._source, _core.CallbackSource) else "memory"

    def io_engine(self) -> str:
        """What moves the bytes: "io_uring" or "threads"."""
        return self.pager.io_engine

    def io_fallback(self) -> str | None:
        """Why files are read by threads although io_uring was preferred; None when they are not."""
        wanted = self._config.io_engine == "auto" and isinstance(self._source, _core.FileSource)
        return _core.why_no_io_uring() if wanted and self.io_engine() == "threads" else None

    def files_deleted(self) -> bool:
        """True when a checkpoint file lost its name; reads go on from the open handle."""
        return isinstance(self._source, _core.FileSource) and self._source.any_deleted()

    def close(self) -> None:
        """Stop the workers and give the slots back. Idempotent."""
        self.pager.close()
        self.slot_starts = {}
        self.slab = None
