"""The study's live part: every preset on the packaged model, paged from disk.

One process per preset would hide drift of the machine behind the order, so all presets of a setting
run in one process, in turn, in alternating order. Each round has prompts of its own, because
policies that learn would know a repeated text by heart; the first round fills the caches and does
not count, rates are medians over the others and bytes are their sums. Before any time counts, the
tokens of every preset are compared with those of the resident model. The resident model's requests,
replayed under Belady with bypass, give the bytes no cache of that size can go below without
prefetching, in first-come order.

    python bench/expertflow/live.py --data FOLDER               about ten minutes
    python bench/expertflow/live.py --data FOLDER --part 1/5    a fifth of the settings, beside what
                                                                the file has from other parts
    python bench/expertflow/live.py --data FOLDER --part smallest   two slots, and a sixteenth
    python bench/expertflow/live.py --data FOLDER --quick

Another model, here one of the Switch Transformer's shape (one expert of 32 works on a token), which
does not travel with the package (an hour on a core, then a quarter for its predictor; what came out
is in switch_model.json). NAME@T is a preset with prefetch_threshold T.

    python bench/tiny_moe/train.py --top-k 1 --inner 128 --minutes 50 --threads 1 --run RUN
    python bench/tiny_moe/evaluate.py --run RUN --models RUN
    python bench/tiny_moe/predictors.py --model RUN/tiny_moe --corpus CORPUS --kinds rpp \
        --share 0.7 --minutes 13
    python bench/expertflow/live.py --data FOLDER --part paper --model RUN/tiny_moe --name switch \
        --presets cache-moe,se-moe,expertflow,expertflow@0.2,expertflow@0.1,auto
"""

from __future__ import annotations

import argparse
import gc
import json
import sys
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

import numpy as np
from harness import RESULTS, Row, environment, machine_name, median, pin_to_cores, print_table
from workloads import WORKLOADS, prompts

from moe_offload.models import tiny_moe_path

PRESETS = ("cache-moe", "cache-moe-swap-back", "se-moe", "pregated-moe", "expertflow", "auto")


@dataclass(frozen=True)
class Setting:
    """One cell of the study: what runs, how much of it is cached, how many sequences at once."""

    workload: str
    cap: float
    batch: int


@dataclass(frozen=True)
class Plan:
    settings: list[Setting]
    new_tokens: int
    num_running: int
    rounds: int


def standard() -> Plan:
    caps, batches = (0.25, 0.5, 0.125, 0.75), (1, 4, 16, 32)
    grid = [Setting("mixed", cap, batch) for cap in caps for batch in batches]
    tasks = [Setting(task, 0.25, 16) for task in WORKLOADS]
    return Plan(grid + tasks, 16, 2, 2)


# Two slots of 192 are what the pager needs; a sixteenth is the first below the 93 % of the paper.
SMALLEST = Plan(
    [Setting("mixed", cap, batch) for cap in (2.02 / 192, 1 / 16) for batch in (1, 16)], 16, 2, 2
)
# What the paper gives hit ratios for, in twice the rounds: they are compared to the point.
PAPER = Plan([Setting("mixed", cap, batch) for cap in (0.25, 0.5) for batch in (4, 16)], 16, 2, 4)
QUICK = Plan([Setting("mixed", 0.25, 4), Setting("alpaca", 0.5, 2)], 4, 2, 1)


def run(plan: Plan, data: Path, presets: tuple[str, ...], path: Path) -> list[Row]:
    """One row per setting and preset, on the model in the folder `path`."""
    from transformers import AutoModelForCausalLM, AutoTokenizer, logging

    import moe_offload
    import moe_offload.huggingface  # the resident model computes with the kernels the slots use
    from moe_offload.verification import to_aligned_memory

    logging.disable_progress_bar()
    tokenizer = AutoTokenizer.from_pretrained(path)
    resident = AutoModelForCausalLM.from_pretrained(
        path, dtype="auto", experts_implementation="moe_offload"
    ).eval()
    moe_offload.use_dense_kernels(resident)
    to_aligned_memory(resident)
    rows: list[Row] = []
    for number, setting in enumerate(plan.settings):
        print(f"{number + 1}/{len(plan.settings)} {setting}", file=sys.stderr, flush=True)
        options: dict[str, Any] = {
            "batch_size": setting.batch,
            "tokenizer": tokenizer,
            "max_new_tokens": plan.new_tokens,
            "eos_token_id": None,
            "num_running": plan.num_running,
        }
        rounds = _rounds(setting, plan, data)
        resident_runs = [
            moe_offload.batch_generate(resident, given, schedule="fifo", **options)
            for given in rounds
        ]
        models = {
            preset: moe_offload.from_pretrained(
                path, device_budget=f"{100 * setting.cap}%", **preset_options(preset)
            )
            for preset in presets
        }
        reports: dict[str, list[Any]] = {preset: [] for preset in presets}
        for turn, given in enumerate(rounds):
            for preset in presets if turn % 2 == 0 else reversed(presets):
                report = moe_offload.batch_generate(models[preset], given, **options)
                if report.tokens != resident_runs[turn].tokens:
                    raise SystemExit(f"WRONG TOKENS, so no times: {preset} at {setting}")
                reports[preset].append(report)
        first = moe_offload.get_offloader(models[presets[0]])
        page_bytes = first.pools[0].layout.page_bytes
        misses = _belady_misses_per_token(resident, rounds, options, first.stats()["num_slots"])
        bound = misses * page_bytes / 1e3
        for preset in presets:
            offloader = moe_offload.get_offloader(models[preset])
            row = _row(setting, preset, reports[preset][1:], resident_runs[1:], offloader)
            rows.append(row | {"belady_kb_per_token": bound})
            offloader.close()
        del models
        gc.collect()
    return rows


def preset_options(preset: str) -> dict[str, Any]:
    """ "expertflow@0.1" is expertflow with that prefetch_threshold."""
    name, at, threshold = preset.partition("@")
    return {"preset": name} | ({"prefetch_threshold": float(threshold)} if at else {})


def _rounds(setting: Setting, plan: Plan, data: Path) -> list[list[str]]:
    """Prompts of each round; where a workload is too short (AIME has 30) they begin anew."""
    each = setting.batch * plan.num_running
    every = prompts(setting.workload, each * (1 + plan.rounds), data)
    return [every[i * each : (i + 1) * each] for i in range(1 + plan.rounds)]


def _belady_misses_per_token(
    resident: Any, rounds: list[list[str]], options: dict[str, Any], slots: int
) -> float:
    """What decoding must fetch at least in the rounds that count, prompts before it included."""
    import moe_offload
    from moe_offload.replay import replay_events, requests
    from moe_offload.replay_events import REQUEST
    from moe_offload.traces import DECODE

    calls_before = tokens = 0
    with moe_offload.record(resident) as trace:
        for number, given in enumerate(rounds):
            report = moe_offload.batch_generate(resident, given, schedule="fifo", **options)
            tokens += report.decode_tokens if number > 0 else 0
            if number == 0:
                calls_before = report.decode_steps
    events = requests(trace, "recorded")
    result = replay_events(events, trace.num_experts, "belady-bypass", num_slots=slots)
    misses = result.misses[events.kinds == REQUEST].reshape(-1, trace.num_layers).sum(axis=1)
    first_rows = np.unique(trace.call, return_index=True)[1]
    decoding = np.flatnonzero(trace.phase[first_rows] == DECODE)[calls_before:]
    return float(misses[decoding].sum() / tokens)


def _row(
    setting: Setting, preset: str, reports: list[Any], resident: list[Any], offloader: Any
) -> Row:
    tokens = sum(report.decode_tokens for report in reports)
    steps = sum(report.decode_steps for report in reports)
    counters = {
        name: sum(report.decode_counters[name] for report in reports)
        for name in reports[0].decode_counters
    }
    lookups = counters["lookups"]
    moved = counters["prefetch_bytes_used"] + counters["prefetch_bytes_wasted"]
    slots, every = offloader.device_budget_bytes, offloader.total_expert_bytes
    return {
        "workload": setting.workload,
        "cap": setting.cap,
        "batch": setting.batch,
        "preset": preset,
        "policy": offloader.config.policy,
        "schedule": reports[0].schedule,
        "tokens_per_s": median(r.decode_tokens / r.decode_seconds for r in reports),
        "tokens_per_s_all": [r.decode_tokens / r.decode_seconds for r in reports],
        "hit_rate": (counters["hits"] + counters["joined_prefetches"]) / lookups,
        "hit_rate_without_prefetch": (counters["hits"] - counters["prefetch_hits"]) / lookups,
        "demand_kb_per_token": counters["demand_bytes"] / tokens / 1e3,
        "wasted_kb_per_token": counters["prefetch_bytes_wasted"] / tokens / 1e3,
        "total_kb_per_token": (counters["demand_bytes"] + moved) / tokens / 1e3,
        "swap_back_kb_per_token": counters["swap_back_bytes"] / tokens / 1e3,
        "stall_ms_per_token": 1e3 * counters["stall_seconds"] / tokens,
        "distinct_per_step": sum(r.distinct_experts for r in reports) / steps,
        "distinct_per_step_in_order": sum(r.distinct_experts for r in resident)
        / sum(r.decode_steps for r in resident),
        "grouping_ms_per_step": 1e3 * sum(r.grouping_seconds for r in reports) / steps,
        "kv_move_ms_per_step": 1e3 * sum(r.kv_move_seconds for r in reports) / steps,
        "expert_memory_saved": 1 - slots / every,
        "slots": offloader.stats()["num_slots"],
        "resident_tokens_per_s": median(r.decode_tokens / r.decode_seconds for r in resident),
    }


COLUMNS = {
    "workload": "workload",
    "cap": "cap",
    "batch": "batch",
    "preset": "preset",
    "tokens_per_s": "tok/s",
    "hit_rate": "hit",
    "hit_rate_without_prefetch": "hit w/o prefetch",
    "demand_kb_per_token": "demand kB/tok",
    "wasted_kb_per_token": "wasted kB/tok",
    "total_kb_per_token": "total kB/tok",
    "swap_back_kb_per_token": "back kB/tok",
    "stall_ms_per_token": "stall ms/tok",
    "belady_kb_per_token": "Belady kB/tok",
    "distinct_per_step": "distinct/step",
}


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--data", type=Path, required=True, help="folder with the texts")
    parser.add_argument("--quick", action="store_true", help="two small settings")
    parser.add_argument("--part", default="1/1", help="k/n of the settings, smallest or paper")
    parser.add_argument("--model", type=Path, help="folder of another model than the packaged one")
    parser.add_argument("--name", help="write to expertflow_live_NAME.json (needed with --model)")
    parser.add_argument(
        "--presets", default=",".join(PRESETS), help="NAME, or NAME@prefetch_threshold"
    )
    parser.add_argument("--machine", help="name of the results folder; default: from the CPU")
    parser.add_argument("--output", type=Path, help="write the JSON here instead")
    arguments = parser.parse_args()
    if arguments.model is not None and arguments.name is None:
        parser.error("--model needs --name: the rows of two models never share a file")
    pin_to_cores(2)
    record = environment()
    record["command"] = f"python bench/expertflow/live.py --data FOLDER --part {arguments.part}"
    record["command"] += " --model MODEL" if arguments.model is not None else ""
    record["command"] += f" --name {arguments.name}" if arguments.name is not None else ""
    if arguments.presets != ",".join(PRESETS):
        record["command"] += f" --presets {arguments.presets}"
    named = {"smallest": SMALLEST, "paper": PAPER}
    plan = named.get(arguments.part) or (QUICK if arguments.quick else standard())
    part, parts = (1, 1) if arguments.part in named else map(int, arguments.part.split("/"))
    first, last = (len(plan.settings) * k // parts for k in (part - 1, part))
    some = replace(plan, settings=plan.settings[first:last])
    model = arguments.model or tiny_moe_path()
    rows = run(some, arguments.data, tuple(arguments.presets.split(",")), model)
    print_table(rows, COLUMNS, f"Live on {model.name}; decoding only, tokens checked")
    path = arguments.output
    if path is None:
        suffix = f"_{arguments.name}" if arguments.name is not None else ""
        path = RESULTS / (arguments.machine or machine_name()) / f"expertflow_live{suffix}.json"
    environments = {arguments.part: record}
    beside = arguments.part == "smallest" or parts > 1
    if beside and path.is_file():  # what other parts measured stays
        before = json.loads(path.read_text())
        done = {(row["workload"], row["cap"], row["batch"]) for row in rows}
        rows = [
            row for row in before["rows"] if (row["workload"], row["cap"], row["batch"]) not in done
        ] + rows
        environments = before["environments"] | environments
    results = {
        "environments": environments,
        "new_tokens": plan.new_tokens,
        "num_running": plan.num_running,
        "rounds": plan.rounds,
        "rows": rows,
    }
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(json.dumps(results, indent=1) + "\n")
    print(f"written to {path.name}")


if __name__ == "__main__":
    main()
