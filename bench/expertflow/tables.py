"""The tables of docs/study.md, from the results files beside this repository's other numbers.

python bench/expertflow/tables.py [--machine NAME]
"""

from __future__ import annotations

import argparse
import json
import sys
from collections.abc import Iterable, Sequence
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

from harness import RESULTS, Row

CAPS = (0.125, 0.25, 0.5, 0.75)
BATCHES = (1, 4, 16, 32)


def markdown(head: Sequence[str], lines: Iterable[Sequence[str]]) -> None:
    print("| " + " | ".join(head) + " |")
    print("|" + " --- |" * len(head))
    for line in lines:
        print("| " + " | ".join(line) + " |")
    print()


def percent(value: float) -> str:
    return f"{100 * value:.0f}"


def replay_rows(path: Path) -> dict[tuple[str, str, float, int], Row]:
    """Rows by trace, policy, cap and batch."""
    results = json.loads(path.read_text())
    rows = [dict(zip(results["columns"], row, strict=True)) for row in results["rows"]]
    return {(row["trace"], row["policy"], row["cap"], row["batch"]): row for row in rows}


def gaps(rows: dict[tuple[str, str, float, int], Row], policy: str, column: str) -> None:
    """Share of the distance closed: a line per trace, caps within a cell, a column per batch."""
    print(f"{column} of {policy}, per cent, caps 12.5 / 25 / 50 / 75 %\n")
    traces = list(dict.fromkeys(key[0] for key in rows))
    markdown(
        ["trace", *(f"batch {batch}" for batch in BATCHES)],
        (
            [trace]
            + [
                " / ".join(percent(rows[trace, policy, cap, batch][column]) for cap in CAPS)
                for batch in BATCHES
            ]
            for trace in traces
        ),
    )
    print("worse than the better LRU:")
    for (trace, name, cap, batch), row in rows.items():
        if name == policy and row["gap_closed"] < 0:
            lru = min(
                rows[trace, each, cap, batch]["demand_misses"] for each in ("lru", "lru-per-layer")
            )
            more = row["demand_misses"] + row["wasted_prefetches"] - lru
            print(f"- {trace}, cap {cap}, batch {batch}: {more} more than {lru} misses")
    print()


def hit_rates(rows: dict[tuple[str, str, float, int], Row], cap: float, batch: int) -> None:
    """Hit rate, hits of prefetches included / not, of every policy at one cap and batch."""
    traces = list(dict.fromkeys(key[0] for key in rows))
    policies = list(dict.fromkeys(key[1] for key in rows))
    print(f"Hit rate, per cent, cap {percent(cap)} %, batch {batch}\n")

    def cell(trace: str, policy: str) -> str:
        row = rows[trace, policy, cap, batch]
        hits, without = row["hit_rate"], row["hit_rate_without_prefetch"]
        same = row["prefetches"] == 0
        return f"{100 * hits:.1f}" if same else f"{100 * hits:.1f} ({100 * without:.1f})"

    markdown(
        ["policy", *traces],
        ([policy] + [cell(trace, policy) for trace in traces] for policy in policies),
    )


def live(path: Path) -> None:
    """Every setting of the live study."""
    rows = json.loads(path.read_text())["rows"]
    for workload, cap, batch in dict.fromkeys((r["workload"], r["cap"], r["batch"]) for r in rows):
        some = [r for r in rows if (r["workload"], r["cap"], r["batch"]) == (workload, cap, batch)]
        first = some[0]
        print(
            f"{workload}, cap {100 * cap:g} % ({first['slots']} slots), batch {batch}: resident "
            f"{first['resident_tokens_per_s']:.0f} tokens/s, Belady "
            f"{first['belady_kb_per_token']:.0f} kB per token\n"
        )
        markdown(
            [
                *("preset", "tokens/s", "hit rate, %", "without prefetch hits", "demand kB/token"),
                *("wasted", "total", "stall ms/token", "distinct per step (in order)"),
            ],
            (
                [
                    row["preset"],
                    f"{row['tokens_per_s']:.0f}",
                    f"{100 * row['hit_rate']:.1f}",
                    f"{100 * row['hit_rate_without_prefetch']:.1f}",
                    f"{row['demand_kb_per_token']:.0f}",
                    f"{row['wasted_kb_per_token']:.0f}",
                    f"{row['total_kb_per_token']:.0f}",
                    f"{row['stall_ms_per_token']:.2f}",
                    f"{row['distinct_per_step']:.1f} ({row['distinct_per_step_in_order']:.1f})",
                ]
                for row in some
            ),
        )


def settings(path: Path) -> None:
    """A line per setting: of each preset speed, hit rate (without prefetch hits), and bytes."""

    def cell(row: Row) -> str:
        rates = f"{percent(row['hit_rate'])} ({percent(row['hit_rate_without_prefetch'])})"
        wasted, total = (f"{row[f'{what}_kb_per_token']:.0f}" for what in ("wasted", "total"))
        demand = f"{row['demand_kb_per_token']:.0f}"
        return f"{row['tokens_per_s']:.0f}; {rates}; {demand} + {wasted}, {total}"

    rows = json.loads(path.read_text())["rows"]
    by = {(r["workload"], r["cap"], r["batch"], r["preset"]): r for r in rows}
    lines = []
    for workload, cap, batch in dict.fromkeys(key[:3] for key in by):
        some = [by[workload, cap, batch, preset] for preset in PRESETS]
        lines.append(
            [
                f"{workload}, {100 * cap:g} %, batch {batch}",
                f"{some[0]['resident_tokens_per_s']:.0f}",
                f"{some[0]['belady_kb_per_token']:.0f}",
                *map(cell, some),
            ]
        )
    markdown(["setting", "resident tok/s", "Belady kB", *PRESETS], lines)


def ratios(path: Path) -> None:
    """expertflow over the others in tokens/s, and what the resident model allows at most."""
    rows = json.loads(path.read_text())["rows"]
    by = {(r["workload"], r["cap"], r["batch"], r["preset"]): r for r in rows}
    lines = []
    for (workload, cap, batch, preset), row in by.items():
        if preset != "expertflow":
            continue
        speed = {name: by[workload, cap, batch, name]["tokens_per_s"] for name in PRESETS}
        resident = row["resident_tokens_per_s"]
        lines.append(
            [f"{workload}, {100 * cap:g} %, {batch}"]
            + [f"{row['tokens_per_s'] / speed[name]:.2f}" for name in ("cache-moe", "se-moe")]
            + [f"{speed['auto'] / speed[name]:.2f}" for name in ("cache-moe", "se-moe")]
            + [f"{resident / speed[name]:.2f}" for name in ("cache-moe", "se-moe")]
        )
    markdown(
        [
            *("setting", "expertflow / cache-moe", "expertflow / se-moe"),
            *("auto / cache-moe", "auto / se-moe"),
            *("bound: resident / cache-moe", "bound: resident / se-moe"),
        ],
        lines,
    )


PRESETS = ("cache-moe", "se-moe", "pregated-moe", "expertflow", "auto")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument(
        "--machine", default="amd-epyc-avx512-bf16-2-cores", help="folder of the results"
    )
    folder = RESULTS / parser.parse_args().machine
    if (folder / "replay.json").is_file():
        rows = replay_rows(folder / "replay.json")
        gaps(rows, "auto", "gap_closed")
        gaps(rows, "auto+recall", "gap_closed")
        gaps(rows, "auto+recall", "gap_closed_all_copies")
        for cap, batch in ((0.25, 1), (0.25, 16), (0.5, 4), (0.5, 16)):
            hit_rates(rows, cap, batch)
    if (folder / "expertflow_live.json").is_file():
        live(folder / "expertflow_live.json")
        settings(folder / "expertflow_live.json")
        ratios(folder / "expertflow_live.json")


if __name__ == "__main__":
    main()
