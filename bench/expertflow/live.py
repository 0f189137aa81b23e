"""The study's live part: every preset on the packaged model, paged from disk.

One process per preset would hide drift of the machine behind the order, so all presets of a setting
run in one process, in turn, in alternating order; the first round warms the caches up and does not
count, rates are medians over the others and bytes are their sums. Before any time counts, the
tokens of every preset are compared with those of the resident model.

    python bench/expertflow/live.py --data FOLDER        about eight minutes
    python bench/expertflow/live.py --data FOLDER --quick
"""

from __future__ import annotations

import argparse
import gc
import json
import sys
from dataclasses import dataclass
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

from harness import Row, environment, machine_name, median, pin_to_cores, print_table, save
from workloads import WORKLOADS, prompts

PRESETS = ("cache-moe", "se-moe", "expertflow", "auto")


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
    caps, batches = (0.125, 0.25, 0.5, 0.75), (1, 4, 16, 32)
    grid = [Setting("mixed", cap, batch) for cap in caps for batch in batches]
    tasks = [Setting(task, 0.25, 16) for task in WORKLOADS]
    return Plan(grid + tasks, 16, 2, 3)


QUICK = Plan([Setting("mixed", 0.25, 4), Setting("alpaca", 0.5, 2)], 4, 2, 1)


def run(plan: Plan, data: Path, presets: tuple[str, ...]) -> list[Row]:
    """One row per setting and preset."""
    from transformers import AutoModelForCausalLM, AutoTokenizer, logging

    import moe_offload
    import moe_offload.huggingface  # the resident model computes with the kernels the slots use
    from moe_offload.models import tiny_moe_path

    logging.disable_progress_bar()
    path = tiny_moe_path()
    tokenizer = AutoTokenizer.from_pretrained(path)
    resident = _aligned(
        AutoModelForCausalLM.from_pretrained(
            path, dtype="auto", experts_implementation="moe_offload"
        ).eval()
    )
    rows: list[Row] = []
    for number, setting in enumerate(plan.settings):
        print(f"{number + 1}/{len(plan.settings)} {setting}", file=sys.stderr, flush=True)
        given = prompts(setting.workload, setting.batch * plan.num_running, data)
        options: dict[str, Any] = {
            "batch_size": setting.batch,
            "tokenizer": tokenizer,
            "max_new_tokens": plan.new_tokens,
            "eos_token_id": None,
            "num_running": plan.num_running,
        }
        expected = moe_offload.batch_generate(resident, given, schedule="fifo", **options)
        models = {
            preset: moe_offload.from_pretrained(
                path, device_budget=f"{100 * setting.cap}%", preset=preset
            )
            for preset in presets
        }
        reports: dict[str, list[Any]] = {preset: [] for preset in presets}
        for turn in range(1 + plan.rounds):
            for preset in presets if turn % 2 == 0 else reversed(presets):
                report = moe_offload.batch_generate(models[preset], given, **options)
                if report.tokens != expected.tokens:
                    raise SystemExit(f"WRONG TOKENS, so no times: {preset} at {setting}")
                reports[preset].append(report)
        for preset in presets:
            offloader = moe_offload.get_offloader(models[preset])
            rows.append(_row(setting, preset, reports[preset][1:], expected, offloader))
            offloader.close()
        del models
        gc.collect()
    return rows


def _aligned(model: Any) -> Any:
    """Weights on aligned memory, as in moe_offload.verification."""
    for tensor in [*model.parameters(), *model.buffers()]:
        tensor.data = tensor.data.clone()
    return model


def _row(setting: Setting, preset: str, reports: list[Any], expected: Any, offloader: Any) -> Row:
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
        "stall_ms_per_token": 1e3 * counters["stall_seconds"] / tokens,
        "distinct_per_step": sum(r.distinct_experts for r in reports) / steps,
        "distinct_per_step_in_order": expected.distinct_experts_per_step,
        "grouping_ms_per_step": 1e3 * sum(r.grouping_seconds for r in reports) / steps,
        "kv_move_ms_per_step": 1e3 * sum(r.kv_move_seconds for r in reports) / steps,
        "expert_memory_saved": 1 - slots / every,
        "slots": offloader.stats()["num_slots"],
        "resident_tokens_per_s": expected.decode_tokens / expected.decode_seconds,
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
    "stall_ms_per_token": "stall ms/tok",
    "distinct_per_step": "distinct/step",
}


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--data", type=Path, required=True, help="folder with the texts")
    parser.add_argument("--quick", action="store_true", help="two small settings")
    parser.add_argument("--presets", default=",".join(PRESETS))
    parser.add_argument("--machine", help="name of the results folder; default: from the CPU")
    parser.add_argument("--output", type=Path, help="write the JSON here instead")
    arguments = parser.parse_args()
    pin_to_cores(2)
    record = environment()
    plan = QUICK if arguments.quick else standard()
    rows = run(plan, arguments.data, tuple(arguments.presets.split(",")))
    print_table(rows, COLUMNS, "Live on the packaged model; decoding only, tokens checked")
    results = {
        "environment": record,
        "new_tokens": plan.new_tokens,
        "num_running": plan.num_running,
        "rounds": plan.rounds,
        "rows": rows,
    }
    if arguments.output is not None:
        arguments.output.write_text(json.dumps(results, indent=1) + "\n")
        print(f"written to {arguments.output}")
    else:
        print(f"written to {save('expertflow_live', results, arguments.machine or machine_name())}")


if __name__ == "__main__":
    main()
