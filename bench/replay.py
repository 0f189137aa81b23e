"""Cache policies on real routing: a table of hit rates, and the speed of the replay.

    python bench/replay.py path/to/data            # a few minutes on one core
    python bench/replay.py path/to/data --tokens 2000

The folder holds the published traces that `moe_offload.trace_files` reads. Every policy runs at
every cap and batch; the column to read is how much of the gap between the better LRU and Belady
(bypass) it closes, in demand misses. `static` learns its set from the first tenth of the requests.
"""

from __future__ import annotations

import argparse
import time
from pathlib import Path

from harness import Row, environment, median, pin_to_cores, print_table, save

from moe_offload.policies import POLICIES
from moe_offload.replay import ReplayResult, replay_events, requests
from moe_offload.trace_files import read_trace

ESFT = "traces_deepseekv2lite_esft/esft_vanilla_lite_routing.npz"
TRACES = {
    "gpt-oss-20b": "traces_gptoss20b/gptoss20b_decode_ids.npz",
    "DeepSeek-V2-Lite law": f"{ESFT}#law",
    "DeepSeek-V2-Lite summary": f"{ESFT}#summary",
    "DeepSeek-V2-Lite translation": f"{ESFT}#translation",
    "Switch-base-32": "traces_switch_base32/switch_base32_cnndm_decode.npz",
}
CAPS = (0.125, 0.25, 0.5, 0.75)
BATCHES = (1, 4, 16)


def gap_closed(result: ReplayResult, lru: int, belady: int) -> float:
    """Share of the misses between the better LRU and Belady with bypass that a policy saves."""
    return (lru - result.demand_misses) / (lru - belady) if lru > belady else 0.0


def table(name: str, path: Path, tokens: int) -> list[Row]:
    """All policies on one trace."""
    trace = read_trace(path)
    trace = trace.rows(slice(0, tokens)) if len(trace) > tokens else trace
    rows: list[Row] = []
    for batch in BATCHES:
        events = requests(trace, batch)
        for cap in CAPS:
            results, speeds = {}, {}
            for policy in POLICIES:
                start = time.perf_counter()
                result = replay_events(events, trace.num_experts, policy, cap, batch)
                speeds[policy] = result.lookups / (time.perf_counter() - start) / 1e6
                results[policy] = result
            lru = min(results[name].demand_misses for name in ("lru", "lru-per-layer"))
            bound = results["belady-bypass"].demand_misses
            for policy, result in results.items():
                closed = gap_closed(result, lru, bound)
                rows.append(
                    {"trace": name, **result.row(), "gap_closed": round(closed, 4)}
                    | {"million_lookups_per_s": round(speeds[policy], 3)}
                )
    return rows


def throughput(path: Path, tokens: int, repeats: int) -> list[Row]:
    """Look-ups per second of each policy at batch 1 and 25 %, median of interleaved repeats."""
    trace = read_trace(path)
    events = requests(trace.rows(slice(0, tokens)), 1)
    samples: dict[str, list[float]] = {policy: [] for policy in POLICIES}
    for _ in range(repeats):
        for policy, speeds in samples.items():
            start = time.perf_counter()
            result = replay_events(events, trace.num_experts, policy, 0.25, 1)
            speeds.append(result.lookups / (time.perf_counter() - start) / 1e6)
    return [{"policy": name, "million_lookups_per_s": median(s)} for name, s in samples.items()]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("data", type=Path, help="folder with the published traces")
    parser.add_argument("--tokens", type=int, default=20_000, help="of each trace at most")
    parser.add_argument("--repeats", type=int, default=5, help="of the speed measurement")
    parser.add_argument("--machine", help="folder name of the results")
    args = parser.parse_args()
    pin_to_cores(1)
    where = environment()
    where["command"] = f"python bench/replay.py DATA --tokens {args.tokens}"
    rows: list[Row] = []
    for name, file in TRACES.items():
        part = table(name, args.data / file, args.tokens)
        rows += part
        for batch in BATCHES:
            shown = [row for row in part if row["batch"] == batch and row["cap"] == 0.25]
            columns = {"policy": "policy", "hit_rate": "hit rate", "gap_closed": "gap closed"}
            columns |= {"copies_per_token": "copies/token", "slots_per_step": "slots/step"}
            print_table(shown, columns, f"{name}, cap 25 %, batch {batch}")
    speed = throughput(args.data / TRACES["gpt-oss-20b"], min(args.tokens, 5000), args.repeats)
    print_table(speed, {"policy": "policy", "million_lookups_per_s": "M look-ups/s"}, "speed")
    path = save("replay", {"environment": where, "throughput": speed, "rows": rows}, args.machine)
    print(f"\nwritten to {path.name}")


if __name__ == "__main__":
    main()
