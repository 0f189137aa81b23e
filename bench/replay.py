"""Cache policies on real routing: how far each is from the bound, and the speed of the replay.

    python bench/replay.py FOLDER                       # ten minutes on one core
    python bench/replay.py FOLDER --traces law,intent   # some; other results in the file are kept
    python bench/replay.py FOLDER --speed-only          # look-ups per second, half a minute

FOLDER holds the published traces that `moe_offload.trace_files` reads, and the prompts of
bench/expertflow, on which the packaged model writes one more trace. Counts depend on nothing but
the traces; only the speeds need a quiet machine.

A row is a trace, policy, cap and batch. `gap_closed` is the share of the distance between the
better of `lru` and `lru-per-layer` and Belady with bypass that a policy closes, in demand misses
plus wasted prefetches; `gap_closed_all_copies` counts prefetches that were used as well. Names with
"+recall" prefetch one layer ahead what `recall` gives a chance of 0.7, predicted from the requests
so far only, as in a live run, and tell the policy every chance. `static` learns its set from the
first tenth of the requests.
"""

from __future__ import annotations

import argparse
import json
import sys
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent / "expertflow"))

from harness import (
    RESULTS,
    Row,
    environment,
    machine_name,
    median,
    pin_to_cores,
    print_table,
)
from workloads import prompts

from moe_offload.policies import POLICIES
from moe_offload.replay import (
    ReplayResult,
    replay_events,
    requests,
)
from moe_offload.replay_events import with_recall
from moe_offload.trace_files import read_trace
from moe_offload.traces import Trace

CAPS = (0.125, 0.25, 0.5, 0.75)
BATCHES = (1, 4, 16, 32)
PREFETCHING = ("predictive", "auto")  # also run with recall's predictions


@dataclass(frozen=True)
class Source:
    """A trace: how to get it, and the bytes of one expert of that model in bfloat16."""

    read: Callable[[Path], Trace]
    page_bytes: int
    caps: tuple[float, ...] = CAPS


def _published(file: str) -> Callable[[Path], Trace]:
    return lambda data: read_trace(data / file)


def _esft(task: str) -> Source:
    file = f"traces_deepseekv2lite_esft/esft_vanilla_lite_routing.npz#{task}"
    return Source(_published(file), 3 * 2048 * 1408 * 2)


def packaged_model_writes(data: Path, num_prompts: int = 48, new_tokens: int = 80) -> Trace:
    """The packaged model's own routing while it answers the study's prompts, one at a time."""
    from transformers import AutoModelForCausalLM, AutoTokenizer

    import moe_offload
    from moe_offload.models import tiny_moe_path

    model = AutoModelForCausalLM.from_pretrained(tiny_moe_path(), dtype="auto").eval()
    tokenizer = AutoTokenizer.from_pretrained(tiny_moe_path())
    with moe_offload.record(model) as trace:
        for prompt in prompts("mixed", num_prompts, data):
            inputs = tokenizer(prompt, return_tensors="pt", return_token_type_ids=False)
            model.generate(
                **inputs, max_new_tokens=new_tokens, min_new_tokens=new_tokens, do_sample=False
            )
    return trace


_GPT_OSS = "traces_gptoss20b/gptoss20b_decode_ids.npz"
_GPT_OSS_PAGE = (3 * 2880 * 2880 + 3 * 2880) * 2  # with its biases
TRACES = {
    "gpt-oss-20b": Source(_published(f"{_GPT_OSS}#0-5000"), _GPT_OSS_PAGE),
    # No constant of a policy was ever chosen on these two (docs/policies.md).
    "gpt-oss-20b later": Source(_published(f"{_GPT_OSS}#100000-105000"), _GPT_OSS_PAGE),
    "packaged model": Source(packaged_model_writes, 98304),
    "intent": _esft("intent"),
    "law": _esft("law"),
    "summary": _esft("summary"),
    "translation": _esft("translation"),
    "Switch-base-32": Source(
        _published("traces_switch_base32/switch_base32_cnndm_decode.npz"),
        2 * 768 * 3072 * 2,
        (1 / 32, 1 / 16, *CAPS),  # 4 of 128 experts a layer are the smallest cache of ExpertFlow
    ),
}
COLUMNS = (
    *("trace", "policy", "cap", "batch", "lookups", "hit_rate", "hit_rate_without_prefetch"),
    *("demand_misses", "prefetches", "wasted_prefetches", "gap_closed", "gap_closed_all_copies"),
    *("net_mb_per_token", "slots_per_step"),
)


def table(name: str, trace: Trace, page_bytes: int, caps: tuple[float, ...]) -> list[Row]:
    """All policies on one trace."""
    rows: list[Row] = []
    for batch in BATCHES:
        events = requests(trace, batch)
        told = with_recall(events, trace.num_experts)
        for cap in caps:
            results = {
                policy: replay_events(events, trace.num_experts, policy, cap, batch)
                for policy in POLICIES
            }
            lru = min(results[name].demand_misses for name in ("lru", "lru-per-layer"))
            gap = lru - results["belady-bypass"].demand_misses
            for policy in PREFETCHING:
                results[f"{policy}+recall"] = replay_events(
                    told, trace.num_experts, policy, cap, batch
                )
            for policy, result in results.items():
                rows.append({"trace": name} | _row(policy, result, lru, gap, page_bytes))
    return rows


def _row(policy: str, result: ReplayResult, lru: int, gap: int, page_bytes: int) -> Row:
    """`lru`: misses of the better one; `gap`: its distance to the bound."""
    net = result.demand_misses + result.wasted_prefetches
    moved = result.demand_misses + result.prefetches
    return {
        **result.row(),
        "policy": policy,
        "hit_rate": round(result.hit_rate, 4),
        "hit_rate_without_prefetch": round(
            (result.hits - result.prefetch_hits) / result.lookups, 4
        ),
        "prefetches": result.prefetches,
        "gap_closed": round((lru - net) / gap, 4) if gap else 0.0,
        "gap_closed_all_copies": round((lru - moved) / gap, 4) if gap else 0.0,
        "net_mb_per_token": round(net * page_bytes / result.tokens / 1e6, 4),
    }


def throughput(trace: Trace, repeats: int) -> list[Row]:
    """Look-ups per second of each policy at batch 1 and 25 %, median of interleaved repeats."""
    events = requests(trace, 1)
    samples: dict[str, list[float]] = {policy: [] for policy in POLICIES}
    for _ in range(repeats):
        for policy, speeds in samples.items():
            start = time.perf_counter()
            result = replay_events(events, trace.num_experts, policy, 0.25, 1)
            speeds.append(result.lookups / (time.perf_counter() - start) / 1e6)
    calls = result.steps * trace.num_layers
    return [
        {
            "policy": policy,
            "million_lookups_per_s": round(median(speeds), 3),
            "us_per_layer_call": round(result.lookups / calls / median(speeds), 3),
        }
        for policy, speeds in samples.items()
    ]


def _write(path: Path, results: Row) -> None:
    """As `harness.save`, with one line per row: a tenth of the lines."""
    rows = ",\n".join(json.dumps([row[name] for name in COLUMNS]) for row in results["rows"])
    head = json.dumps(results | {"columns": list(COLUMNS), "rows": []}, indent=1)
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(head.replace('"rows": []', f'"rows": [\n{rows}\n]') + "\n")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("data", type=Path, help="folder with the published traces")
    parser.add_argument("--tokens", type=int, default=5000, help="of each trace at most")
    parser.add_argument("--traces", default=",".join(TRACES), help="some of them")
    parser.add_argument("--repeats", type=int, default=5, help="of the speed measurement")
    parser.add_argument("--speed-only", action="store_true", help="renew the speeds, keep the rows")
    parser.add_argument("--machine", help="folder name of the results")
    args = parser.parse_args()
    path = RESULTS / (args.machine or machine_name()) / "replay.json"  # before a core is taken away
    pin_to_cores(1)
    where = environment() | {"command": f"python bench/replay.py FOLDER --tokens {args.tokens}"}
    results: Row = {"environments": {}, "page_bytes": {}, "tokens": {}, "rows": []}
    for name in [] if args.speed_only else args.traces.split(","):
        source = TRACES[name]
        trace = source.read(args.data)
        trace = trace.rows(slice(0, args.tokens)) if len(trace) > args.tokens else trace
        part = table(name, trace, source.page_bytes, source.caps)
        shown = [row for row in part if row["batch"] in (1, 16) and row["cap"] == 0.25]
        print_table(shown, {key: key for key in COLUMNS[1:]}, name)
        results["rows"] += part
        results["environments"][name] = where
        results["page_bytes"][name] = source.page_bytes
        results["tokens"][name] = len(trace)
    if args.speed_only:
        trace = TRACES["gpt-oss-20b"].read(args.data).rows(slice(0, 5000))
        results["throughput"] = throughput(trace, args.repeats)
        results["environments"]["throughput"] = where
        print_table(results["throughput"], {key: key for key in results["throughput"][0]})
    _write(path, _added(path, results))
    print(f"\nwritten to {path.name}")


def _added(path: Path, new: Row) -> Row:
    """The results that are there, with what was measured now in the place of the same before."""
    if not path.is_file():
        return new
    old = json.loads(path.read_text())
    rows = [dict(zip(old["columns"], row, strict=True)) for row in old["rows"]]
    kept = [row for row in rows if row["trace"] not in new["tokens"]]
    merged = {key: old.get(key, {}) | new[key] for key in ("environments", "page_bytes", "tokens")}
    throughput = new.get("throughput", old.get("throughput", []))
    return merged | {"throughput": throughput, "rows": kept + new["rows"]}


if __name__ == "__main__":
    main()
