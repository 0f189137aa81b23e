"""The `replay` command: rows of counters for a trace, as a table or as JSON."""

from __future__ import annotations

import argparse
import json
from collections.abc import Sequence
from typing import Any

from moe_offload.console import aligned, progress
from moe_offload.errors import InputError, TraceError
from moe_offload.policies import POLICIES
from moe_offload.replay import ReplayResult, replay_grid
from moe_offload.trace_files import read_trace

_COLUMNS = (
    "policy",
    "cap",
    "batch",
    "lookups",
    "hits",
    "demand_misses",
    "prefetch_hits",
    "wasted_prefetches",
    "hit_rate",
    "slots_per_step",
    "copies_per_token",
)


def replay(args: argparse.Namespace) -> int:
    """Run the command; returns the exit code."""
    policies = list(POLICIES) if args.policy == ["all"] else args.policy
    try:
        trace = read_trace(args.trace)
        grid = replay_grid(trace, policies, args.cap, args.batch)
        total = len(policies) * len(args.cap) * len(args.batch)
        results = list(progress(grid, total=total, desc="Replay"))
    except TraceError:
        raise
    except (ValueError, FileNotFoundError) as error:
        raise InputError(str(error)) from error
    if args.json:
        print(json.dumps([result.row() for result in results]))
    else:
        print(f"{trace.model or args.trace}: {_describe(trace)}")
        print(table(results))
    if args.plot:
        from moe_offload.replay_report import write_report

        path = write_report(trace, results, args.plot)
        if not args.json:
            print(f"figures: {path}")
    return 0


def _describe(trace: Any) -> str:
    return (
        f"{len(trace)} tokens, {trace.num_sequences} sequences, {trace.num_layers} MoE layers of "
        f"{max(trace.num_experts)} experts, {trace.top_k} per token"
    )


def table(results: Sequence[ReplayResult]) -> str:
    """The rows as text, columns aligned."""
    rows = [[str(name) for name in _COLUMNS]]
    for result in results:
        row = result.row()
        rows.append([_cell(name, row[name]) for name in _COLUMNS])
    return "\n".join(aligned(rows))


def _cell(name: str, value: Any) -> str:
    if name == "hit_rate":
        return f"{value:.1%}"
    return f"{value:.2f}" if name in ("slots_per_step", "copies_per_token") else str(value)
