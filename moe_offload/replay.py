"""Replay a routing trace against cache policies: what would have been in the slots?

    rows = replay_grid(read_trace("trace.npz"), ["lru", "belady-bypass"], [0.25], batches=[1, 16])

The C++ simulator drives the policy objects of the live pager through the same SlotTable, with
copies that end at once; so the counters of a recorded live run are reproduced exactly
(`replay_recorded`), and what a policy does here it does live.

A step is one model call: all its tokens' experts of a layer are one request. `batch` B cuts the
trace into B streams of equal length and steps through them side by side, so every step but the last
has B tokens and every token is used once. Looking up one token after the other instead would let
the second token of a step hit what the first one fetched, and flatter recency.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field, replace
from typing import Any, Literal

import numpy as np
from numpy.typing import NDArray

from moe_offload import _core
from moe_offload.errors import TraceError
from moe_offload.pager import MAX_ROUTED_TOKENS
from moe_offload.policies import POLICIES
from moe_offload.replay_events import REQUEST, ROUTES, SEQUENCE, with_recall
from moe_offload.traces import DECODE, Events, Trace

_CELLS = 1 << 24  # (step, layer, expert) cells handled at once: 128 MiB of counts
RECALL = "+recall"  # behind a policy's name
_PROFILE_SHARE = 0.1  # of the trace: what `static` learns its set from
Batch = int | Literal["recorded"]


@dataclass(frozen=True)
class ReplayResult:
    """One policy, cap and batch.

    Attributes:
        policy, cap, batch: what was asked; cap is a share of all experts.
        num_slots: slots the cap bought.
        steps, tokens: model calls and rows replayed.
        lookups: distinct (step, layer, expert); hits + demand_misses.
        hits: found in a slot, prefetched ones included.
        demand_misses: fetched on demand.
        prefetch_hits: hits that a prefetch made.
        prefetches: pages prefetched.
        wasted_prefetches: of these, evicted before any use.
        bypasses: demand misses that left no page behind.
        evictions: pages that lost their slot.
        per_layer: the same counters as lists over layers.
        misses: [events] copies on demand, and
        prefetched: [events] copies by prefetch, along `events`.
    """

    policy: str
    cap: float
    batch: Batch
    num_slots: int
    steps: int
    tokens: int
    lookups: int
    hits: int
    demand_misses: int
    prefetch_hits: int
    prefetches: int
    wasted_prefetches: int
    bypasses: int
    evictions: int
    per_layer: dict[str, list[int]] = field(repr=False)
    events: Events = field(repr=False)
    misses: NDArray[np.int32] = field(repr=False)
    prefetched: NDArray[np.int32] = field(repr=False)

    @property
    def hit_rate(self) -> float:
        return self.hits / self.lookups if self.lookups else 0.0

    @property
    def slots_per_step(self) -> float:
        """Slots over distinct experts per step; hit rates compare at equal values of it only."""
        return self.num_slots * self.steps / self.lookups if self.lookups else 0.0

    @property
    def copies_per_token(self) -> float:
        """Pages moved per token, prefetched ones included; times page bytes is the traffic."""
        return (self.demand_misses + self.prefetches) / self.tokens if self.tokens else 0.0

    def row(self) -> dict[str, Any]:
        """The row that `moe-offload replay --json` prints."""
        return {
            "policy": self.policy,
            "cap": self.cap,
            "batch": self.batch,
            "lookups": self.lookups,
            "hits": self.hits,
            "demand_misses": self.demand_misses,
            "prefetch_hits": self.prefetch_hits,
            "wasted_prefetches": self.wasted_prefetches,
            "hit_rate": round(self.hit_rate, 6),
            "num_slots": self.num_slots,
            "slots_per_step": round(self.slots_per_step, 3),
            "steps": self.steps,
            "tokens": self.tokens,
            "copies_per_token": round(self.copies_per_token, 4),
            "bypasses": self.bypasses,
            "evictions": self.evictions,
        }


def replay_grid(
    trace: Trace,
    policies: Sequence[str] = ("lru",),
    caps: Sequence[float] = (0.25,),
    batches: Sequence[Batch] = (1,),
) -> Iterator[ReplayResult]:
    """Replay every combination, batch by batch, cap by cap, policy by policy.

    "auto+recall" is `auto` with the predictor `recall`, which prefetches: see `with_recall`.

    Raises:
        TraceError: the trace is empty or malformed.
        ValueError: unknown policy, cap outside (0, 1], batch below 1 or above the rows there are.
    """
    for name in policies:
        if name.removesuffix(RECALL) not in POLICIES:
            raise ValueError(
                f"policy: expected one of {', '.join(POLICIES)}, or one with {RECALL} behind it, "
                f"got {name!r}"
            )
    for cap in caps:
        check_cap(cap)
    trace.check()
    for batch in batches:
        check_batch(batch)
    for batch in batches:
        events = requests(trace, batch)
        recalled = any(name.endswith(RECALL) for name in policies)
        told = with_recall(events, trace.num_experts) if recalled else events
        for cap in caps:
            for name in policies:
                policy, log = name, events
                if name.endswith(RECALL):
                    policy, log = name.removesuffix(RECALL), told
                result = replay_events(log, trace.num_experts, policy, cap, batch)
                yield replace(result, policy=name)


def replay(trace: Trace, policy: str = "lru", cap: float = 0.25, batch: Batch = 1) -> ReplayResult:
    """Replay one combination; see `replay_grid`."""
    return next(replay_grid(trace, [policy], [cap], [batch]))


def replay_events(
    events: Events,
    num_experts: Sequence[int],
    policy: str,
    cap: float = 1.0,
    batch: Batch = "recorded",
    *,
    num_slots: int | None = None,
    kept: Sequence[int] | None = None,
    admit_limit: int = 0,
) -> ReplayResult:
    """Replay a stream of events.

    Args:
        events: see `requests`, `EventList`, or `Trace.events` of a recorded run.
        num_experts: [L].
        policy: a name in POLICIES.
        cap: share of all experts that have a slot, when num_slots is not given.
        batch: for the result only.
        num_slots: slots; at least 2.
        kept: for "static": pages (layer * max(num_experts) + expert) that stay. Default: the
            most used ones in the first tenth of the requests.
        admit_limit: misses of a request that may stay, 0 for the pager's default.
    """
    if num_slots is None:
        num_slots = max(_core.MIN_SLOTS, int(check_cap(cap) * sum(num_experts)))
    if policy == "static" and kept is None:
        kept = _profile(events, num_experts, max(0, num_slots - _core.MIN_SLOTS))
    counted = _core.replay(
        policy=policy,
        num_experts=list(num_experts),
        num_slots=num_slots,
        kept=list(kept or ()),
        admit_limit=admit_limit,
        **events.arrays(),
    )
    per_layer = counted["per_layer"]
    is_request = events.kinds == REQUEST
    first = events.layers[is_request].min(initial=0)
    at_first = is_request & (events.layers == first)
    total = {name: sum(values) for name, values in per_layer.items()}
    return ReplayResult(
        policy=policy,
        cap=cap,
        batch=batch,
        num_slots=num_slots,
        steps=int(at_first.sum()),
        tokens=int(events.counts[at_first].sum()),
        lookups=total["lookups"],
        hits=total["hits"],
        demand_misses=total["demand_misses"],
        prefetch_hits=total["prefetch_hits"],
        prefetches=total["prefetches"],
        wasted_prefetches=total["wasted_prefetches"],
        bypasses=total["bypasses"],
        evictions=total["evictions"],
        per_layer=per_layer,
        events=events,
        misses=counted["misses"],
        prefetched=counted["prefetched"],
    )


def replay_recorded(trace: Trace, policy: str | None = None) -> ReplayResult:
    """Repeat a recorded live run, by default under the policy it ran with.

    Raises:
        TraceError: the trace has no events; record an offloaded model with one page layout.
    """
    if trace.events is None:
        raise TraceError(
            "the trace holds no pager events; record an offloaded model with one page layout"
        )
    events = trace.events
    return replay_events(
        events,
        trace.num_experts,
        policy or events.policy,
        events.num_slots / sum(trace.num_experts),
        num_slots=events.num_slots,
        kept=events.kept,
    )


def check_cap(cap: float) -> float:
    """Raise ValueError unless 0 < cap <= 1."""
    if not 0 < cap <= 1:
        raise ValueError(f"cap: expected a share of all experts above 0 and at most 1, got {cap}")
    return cap


def check_batch(batch: Batch) -> Batch:
    """Raise ValueError unless batch is at least 1 or "recorded"."""
    if batch == "recorded" or (isinstance(batch, int) and batch >= 1):
        return batch
    raise ValueError(f'batch: expected a whole number of at least 1 or "recorded", got {batch!r}')


def requests(trace: Trace, batch: Batch = 1, *, routes: bool = True) -> Events:
    """The pager's requests for a trace, distinct experts in rising order as the layer asks.

    Args:
        trace: its decode rows are used, all rows when it has none ("recorded": always all).
        batch: B streams side by side, or "recorded" for the model calls as they were.
        routes: of calls of 2 to 32 tokens, tell whose experts are whose; a live pager tells
            policies that ask.

    New sequences are announced when B of them have begun (B of them share a batch).
    """
    if batch == "recorded":
        step = np.unique(trace.call, return_inverse=True)[1]
        rows = trace
    else:
        decode = (trace.phase == DECODE) & (trace.sequence >= 0)
        rows = trace.rows(decode) if decode.any() and not decode.all() else trace
        if len(rows) < batch:
            raise ValueError(
                f"batch: {batch} streams need as many tokens, the trace has {len(rows)}"
            )
        lane = np.arange(len(rows)) * batch // len(rows)
        step = np.arange(len(rows)) - np.searchsorted(lane, lane)
    events = _requests(rows, step, 1 if batch == "recorded" else batch)
    return _with_routes(events, rows, step) if routes else events


def _requests(trace: Trace, step: NDArray[np.int64], batch: int) -> Events:
    num_layers, num_experts = trace.num_layers, max(trace.num_experts)
    num_steps = int(step.max()) + 1
    order = np.argsort(step, kind="stable")
    ids, step = trace.ids[order], step[order]
    weights = None if trace.weights is None else trace.weights[order]
    parts: list[tuple[Any, Any, Any]] = []  # expert, weight, requests' sizes
    steps_at_once = max(1, _CELLS // (num_layers * num_experts))
    for begin in range(0, num_steps, steps_at_once):
        end = min(begin + steps_at_once, num_steps)
        rows = slice(*np.searchsorted(step, [begin, end]))
        request = (step[rows] - begin)[:, None] * num_layers + np.arange(num_layers)  # [n, L]
        cells = (request[..., None] * num_experts + ids[rows]).reshape(-1)
        used = (ids[rows] >= 0).reshape(-1)
        size = (end - begin) * num_layers * num_experts
        present = np.bincount(cells[used], minlength=size)
        found = np.flatnonzero(present)
        sums: NDArray[Any] = np.empty(0)
        if weights is not None:
            flat = weights[rows].reshape(-1)[used].astype(np.float64)
            sums = np.bincount(cells[used], weights=flat, minlength=size)[found]
        sizes = np.bincount(found // num_experts, minlength=(end - begin) * num_layers)
        parts.append((found % num_experts, sums, sizes))
    columns = zip(*parts, strict=True)
    experts, values, sizes = (np.concatenate(list(column)) for column in columns)
    # One event per step and layer; a step in which the next B sequences begin has one before.
    begins = np.zeros(num_steps, np.int64)
    started = np.unique(trace.sequence[trace.sequence >= 0], return_index=True)[1]
    by_row = np.zeros(len(trace), np.int64)
    by_row[started] = 1
    np.add.at(begins, step, by_row[order])
    announced = np.cumsum(begins) // batch
    first = np.flatnonzero(np.diff(announced, prepend=0) > 0)
    at = first * num_layers
    tokens = np.bincount(step, minlength=num_steps)

    def with_sequences(column: NDArray[Any], value: int) -> NDArray[Any]:
        return np.insert(column, at, value)

    kinds = with_sequences(np.full(num_steps * num_layers, REQUEST, np.uint8), SEQUENCE)
    layers = with_sequences(np.tile(np.arange(num_layers, dtype=np.int32), num_steps), 0)
    counts = with_sequences(np.repeat(tokens, num_layers).astype(np.int32), 0)
    offsets = np.concatenate([[0], np.cumsum(with_sequences(sizes, 0))])
    return Events(
        kinds,
        layers,
        counts,
        offsets.astype(np.int64),
        experts.astype(np.int32),
        offsets.astype(np.int64) if weights is not None else np.zeros(len(offsets), np.int64),
        values.astype(np.float32),
    )


def _with_routes(events: Events, trace: Trace, step: NDArray[np.int64]) -> Events:
    """ROUTES before each request of 2 to MAX_ROUTED_TOKENS tokens."""
    told = np.flatnonzero(
        (events.kinds == REQUEST) & (events.counts > 1) & (events.counts <= MAX_ROUTED_TOKENS)
    )
    if not len(told):
        return events
    # [N, L, A] by step, then layer; of a step's tokens in order.
    _, num_layers, top_k = trace.ids.shape
    size = np.bincount(step)[step]
    in_told = (size > 1) & (size <= MAX_ROUTED_TOKENS)
    call = step[in_told][:, None] * num_layers + np.arange(num_layers)
    order = np.argsort(call.reshape(-1), kind="stable")
    routes = trace.ids[in_told].reshape(-1, top_k)[order].reshape(-1)

    kinds = np.insert(events.kinds, told, ROUTES)
    is_routes = kinds == ROUTES
    counts = np.insert(events.counts, told, events.counts[told])
    sizes = np.insert(np.diff(events.expert_offsets), told, events.counts[told] * top_k)
    value_sizes = np.insert(np.diff(events.value_offsets), told, 0)
    experts = np.empty(sizes.sum(), np.int32)
    of_routes = np.repeat(is_routes, sizes)
    experts[of_routes], experts[~of_routes] = routes, events.experts
    return Events(
        kinds,
        np.insert(events.layers, told, events.layers[told]),
        counts,
        np.concatenate([[0], np.cumsum(sizes)]).astype(np.int64),
        experts,
        np.concatenate([[0], np.cumsum(value_sizes)]).astype(np.int64),
        events.values,
    )


def _profile(events: Events, num_experts: Sequence[int], count: int) -> list[int]:
    """The most used pages in the first tenth of the requests."""
    asked = np.flatnonzero(events.kinds == REQUEST)
    part = int(asked[: max(1, int(len(asked) * _PROFILE_SHARE))].max(initial=0)) + 1
    end = int(events.expert_offsets[part])
    stride = max(num_experts)
    sizes = np.diff(events.expert_offsets[: part + 1])
    pages = np.repeat(events.layers[:part], sizes) * stride + events.experts[:end]
    pages = pages[np.repeat(events.kinds[:part] == REQUEST, sizes)]
    uses = np.bincount(pages, minlength=len(num_experts) * stride)
    best = np.argsort(-uses, kind="stable")[:count]
    return [int(page) for page in best if uses[page] > 0]
