"""A whole model that does not fit: Qwen3-30B-A3B's shape, 61 GB, on a machine with less memory.

Random weights (bench/checkpoints.py), so routing is nearly uniform and no policy can help; speed
is what the disk gives for the pages that are missing. Each budget runs in a process of its own, one
after the other, and between prompts the disk's roof is measured. There is no resident model to
compare tokens with: instead every budget must give the same ones.

    python bench/full_size.py               about ten minutes, 61 GB of disk in --workdir
    python bench/full_size.py --quick       a toy checkpoint: does it still run?
"""

from __future__ import annotations

import argparse
import json
import random
from dataclasses import asdict, replace
from pathlib import Path

import checkpoints
from comparison import Comparison, Isolation
from harness import (
    Row,
    environment,
    machine_name,
    median,
    pin_to_cores,
    print_table,
    save,
    workdir,
)
from report import best_disk, missing_bytes, show, summarise

NUM_CORES = 2
OURS = "moe_offload"
BUDGETS = ("14GiB", "4GiB")
# Beyond weights and budget, for libraries and activations.
ALLOWANCE_BYTES = 1_000_000_000
QUICK = replace(
    checkpoints.QWEN3_30B,
    num_layers=2,
    num_experts=16,
    hidden=128,
    inner=64,
    num_heads=4,
    num_kv_heads=2,
    head_dim=32,
    vocab=256,
    table=1 << 20,
)


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--quick", action="store_true", help="toy sizes; times mean nothing")
    parser.add_argument("--budgets", default=",".join(BUDGETS), help="device_budget of each run")
    parser.add_argument("--rounds", type=int, default=3, help="prompts that count, after one more")
    parser.add_argument("--prompt-tokens", type=int, default=128)
    parser.add_argument("--new-tokens", type=int, default=12)
    parser.add_argument("--workdir", type=Path, help="for the checkpoint; default: a cache folder")
    parser.add_argument("--isolation", choices=["auto", "group", "drop"], default="auto")
    parser.add_argument("--machine", help="name of the results folder; default: from the CPU")
    parser.add_argument("--output", type=Path, help="write the JSON here instead of bench/results")
    arguments = parser.parse_args()
    pin_to_cores(NUM_CORES)
    record = environment()
    spec = QUICK if arguments.quick else checkpoints.QWEN3_30B
    budgets = ["25%", "50%"] if arguments.quick else arguments.budgets.split(",")
    isolation: Isolation = "drop" if arguments.quick else arguments.isolation
    rng = random.Random(0)
    prompts = [
        [rng.randrange(spec.vocab) for _ in range(arguments.prompt_tokens)]
        for _ in range(1 + arguments.rounds)
    ]
    comparisons = []
    with workdir(arguments.workdir, temporary=arguments.quick) as folder:
        checkpoint = checkpoints.write(spec, folder / ("quick" if arguments.quick else "qwen3-30b"))
        for budget in budgets:
            command: list[str | Path] = [checkpoint, "--budget", budget]
            comparison = Comparison(budget, _limit(spec, budget), {OURS: command})
            comparison.run(
                *(checkpoint, prompts, arguments.new_tokens, spec.page_bytes),
                *(0.005 if arguments.quick else 0.1, 1 << 22 if arguments.quick else 1 << 29),
                isolation,
            )
            comparisons.append(comparison)

    _check_tokens(comparisons)
    rows = []
    for comparison in comparisons:
        (row,) = summarise(comparison, spec)
        show(comparison, [row])
        rows.append({"budget": comparison.budget, **row, **_beyond(comparison, row, spec)})
    headings = {
        "budget": "slots",
        "load_s": "load, s",
        "first_prompt_s": "first prompt, s",
        "decode_tokens_per_s": "decode, tok/s",
        "prefill_tokens_per_s": "prefill, tok/s",
        "times_bound": "decode / bound",
        "times_memory_bound": "of reads into memory",
        "prefill_times_bound": "prefill / bound",
        "peak_rss_mb": "peak RSS, MB",
    }
    print_table(rows, headings, f"{spec.expert_bytes / 1e9:.0f} GB of experts")
    results = {
        "environment": record,
        "spec": asdict(spec),
        "dense_bytes": spec.dense_bytes,
        "expert_bytes": spec.expert_bytes,
        "page_bytes": spec.page_bytes,
        "rows": rows,
        "comparisons": [comparison.observed() for comparison in comparisons],
    }
    if arguments.output is not None:
        arguments.output.write_text(json.dumps(results, indent=1) + "\n")
    elif not arguments.quick:
        save("full_size", results, arguments.machine or machine_name())


def _limit(spec: checkpoints.Spec, budget: str) -> int:
    from moe_offload.config import parse_budget

    return spec.dense_bytes + parse_budget(budget, spec.expert_bytes) + ALLOWANCE_BYTES


def _check_tokens(comparisons: list[Comparison]) -> None:
    """Every budget gives every prompt the same tokens."""
    first, *others = (comparison.turns[OURS] for comparison in comparisons)
    for turns in others:
        for number, (row, expected) in enumerate(zip(turns, first, strict=True)):
            if row["tokens"] != expected["tokens"]:
                raise SystemExit(
                    f"WRONG TOKENS, so no times: prompt {number}: {expected['tokens']} with "
                    f"{comparisons[0].budget} of slots, {row['tokens']} with fewer"
                )


def _beyond(comparison: Comparison, row: Row, spec: checkpoints.Spec) -> Row:
    """Times over the least that the missing bytes take at the disk's roof."""
    turns = comparison.turns[OURS][1:]
    into_cache = best_disk(comparison.roofs[1:])["gb_per_s"]["median"]
    into_memory = best_disk(comparison.roofs[1:], "disk_to_memory")["gb_per_s"]["median"]
    needed_ms = row["needed_mb_per_token"]  # MB over GB/s
    prefill = median(
        turn["prefill_s"]
        / (missing_bytes(turn["prefill"]["stats"], spec.page_bytes) / 1e9 / into_cache)
        for turn in turns
    )
    return {
        "disk_roof_gb_per_s": into_cache,
        "disk_to_memory_gb_per_s": into_memory,
        "times_bound": row["decode_ms_per_token"] / row["bound_ms_per_token"],
        "times_memory_bound": row["decode_ms_per_token"] * into_memory / needed_ms,
        "prefill_times_bound": prefill,
        "first_prompt_s": comparison.turns[OURS][0]["prefill_s"],
    }


if __name__ == "__main__":
    main()
