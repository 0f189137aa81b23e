"""What the offloader did, for people and programs: the stats dictionary and the trace file.

Everything is a sum of the C++ counters (csrc/paging/counters.h), per layer and in total, so a
number here never has to be believed: `lookups = hits + joined_prefetches + demand_misses`.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from moe_offload.pager import ExpertPool

_COPY_LANES_START = 10  # trace thread ids of copies; 0 is compute


def layer_stats(pools: list[ExpertPool]) -> list[dict[str, Any]]:
    """One dictionary of counters per layer, in model order, with its module name."""
    rows = []
    for pool in pools:
        counters = pool.counters()
        for local, layer in enumerate(pool.layers):
            row: dict[str, Any] = {"layer": layer, "name": pool.names[local]}
            row.update({name: values[local] for name, values in counters.items()})
            row["stall_seconds"] = row.pop("stall_ns") / 1e9
            row["overlap_seconds"] = row.pop("overlap_ns") / 1e9
            row["hit_rate"] = row["hits"] / row["lookups"] if row["lookups"] else 0.0
            rows.append(row)
    return sorted(rows, key=lambda row: row["layer"])


def total_counters(pools: list[ExpertPool]) -> dict[str, float]:
    """The plain sums among `total_stats`: what may be subtracted from a later reading."""
    totals = total_stats(layer_stats(pools))
    return {name: value for name, value in totals.items() if not name.startswith("hit_rate")}


def total_stats(per_layer: list[dict[str, Any]]) -> dict[str, Any]:
    """Sums over layers, with the hit rates of the sums."""
    totals: dict[str, Any] = {}
    for row in per_layer:
        for name, value in row.items():
            if name not in ("layer", "name", "hit_rate"):
                totals[name] = totals.get(name, 0) + value
    lookups = totals.get("lookups", 0)
    totals["hit_rate"] = totals["hits"] / lookups if lookups else 0.0
    # hits that only prefetching made hits do not flatter the eviction policy
    cached = totals.get("hits", 0) - totals.get("prefetch_hits", 0)
    totals["hit_rate_without_prefetch"] = cached / lookups if lookups else 0.0
    return totals


def write_timeline(pools: list[ExpertPool], path: str | Path) -> int:
    """Write recent events in the Trace Event Format, for chrome://tracing or ui.perfetto.dev.

    Tickets (a layer's working set, locked) and stalls are on row 0; copies fill as many rows as
    overlap. The pager keeps the newest 65 536 events.

    Returns:
        Number of events written.
    """
    trace: list[dict[str, Any]] = []
    for number, pool in enumerate(pools):
        events, dropped = pool.pager.timeline()
        lane_free_ns: list[int] = []
        for kind, layer, expert, slot, begin_ns, end_ns in sorted(events, key=lambda e: e[4]):
            name, lane = f"{kind} {pool.names[layer]}", 0
            if kind.endswith("copy"):
                name = f"{kind} {pool.names[layer]} expert {expert}"
                free = [i for i, free_ns in enumerate(lane_free_ns) if free_ns <= begin_ns]
                if not free:
                    free = [len(lane_free_ns)]
                    lane_free_ns.append(0)
                lane_free_ns[free[0]] = end_ns
                lane = _COPY_LANES_START + free[0]
            trace.append(
                {
                    "name": name,
                    "cat": kind,
                    "ph": "X",
                    "ts": begin_ns / 1e3,
                    "dur": (end_ns - begin_ns) / 1e3,
                    "pid": number,
                    "tid": lane,
                    "args": {"layer": pool.layers[layer], "expert": expert, "slot": slot},
                }
            )
        trace.append(
            {
                "name": "process_name",
                "ph": "M",
                "pid": number,
                "args": {"name": f"expert pool {number} ({dropped} older events dropped)"},
            }
        )
    Path(path).write_text(json.dumps({"traceEvents": trace, "displayTimeUnit": "ms"}))
    return len(trace)
