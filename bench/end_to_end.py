"""Does paging keep its promises on a whole model? The numbers the README's table comes from.

Two comparisons on one random-weight OLMoE checkpoint (bench/checkpoints.py), on two cores, on the
same prompts: at a 25 % budget, with and without fetching ahead, against transformers + accelerate
with the experts on disk, and at 100 % against plain transformers. bench/comparison.py says how they
are run. What each target means is written where it is computed, in bench/report.py. No time is
printed unless all contenders produced the same tokens.

    python bench/end_to_end.py               about ten minutes, 7 GB of disk in --workdir
    python bench/end_to_end.py --quick       a toy checkpoint: does it still run?
"""

from __future__ import annotations

import argparse
import json
import random
import tempfile
from dataclasses import asdict, dataclass
from pathlib import Path

import checkpoints
from checkpoints import Spec
from comparison import Comparison, Isolation
from harness import Row, environment, machine_name, pin_to_cores, print_table, save, workdir
from report import (
    ACCELERATE,
    ALLOWANCE_BYTES,
    DEMAND,
    FULL,
    PAGED,
    RESIDENT,
    check_targets,
    check_tokens,
    show,
    summarise,
)

NUM_CORES = 2
# Plain transformers does not survive 512-token prompts within its weights + 400 MB, and where all
# weights fit, the limit decides nothing.
WHOLE_ALLOWANCE_BYTES = 1_000_000_000


@dataclass(frozen=True)
class Plan:
    """How much to run. A round is one prompt; round 0, a short one, warms up and does not count."""

    spec: Spec
    first_prompt_tokens: int
    prompt_tokens: int
    rounds: int
    new_tokens: int
    resident_rounds: int
    resident_new_tokens: int
    disk_seconds: float  # per chunk size and depth and round
    memory_bytes: int  # read per memory roof sample


STANDARD = Plan(Spec(), 32, 512, 9, 12, 15, 24, 0.1, 1 << 29)
QUICK = Plan(checkpoints.QUICK, 6, 12, 2, 4, 2, 4, 0.005, 1 << 22)


def run(
    plan: Plan, checkpoint: Path, offload_folder: Path, isolation: Isolation
) -> list[Comparison]:
    """Both comparisons, on the same prompts."""
    spec = plan.spec
    rng = random.Random(0)
    prompts = [
        [
            rng.randrange(spec.vocab)
            for _ in range(plan.prompt_tokens if number else plan.first_prompt_tokens)
        ]
        for number in range(max(plan.rounds, plan.resident_rounds))
    ]
    quarter = Comparison(
        "25%",
        spec.dense_bytes + spec.expert_bytes // 4 + ALLOWANCE_BYTES,
        {
            PAGED: [checkpoint, "--budget", "25%"],
            DEMAND: [checkpoint, "--budget", "25%", "--predictor", "none"],
            ACCELERATE: [checkpoint, "--offload-folder", offload_folder],
        },
    )
    whole = Comparison(
        "100%",
        spec.dense_bytes + spec.expert_bytes + WHOLE_ALLOWANCE_BYTES,
        {
            FULL: [checkpoint, "--budget", "100%"],
            RESIDENT: [checkpoint],
        },
    )
    for comparison, rounds, new_tokens in (
        (quarter, plan.rounds, plan.new_tokens),
        (whole, plan.resident_rounds, plan.resident_new_tokens),
    ):
        comparison.run(
            checkpoint,
            prompts[:rounds],
            new_tokens,
            spec.page_bytes,
            plan.disk_seconds,
            plan.memory_bytes,
            isolation,
        )
    return [quarter, whole]


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--quick", action="store_true", help="toy sizes; times mean nothing")
    parser.add_argument("--workdir", type=Path, help="for checkpoints; default: a cache folder")
    parser.add_argument("--isolation", choices=["auto", "group", "drop"], default="auto")
    parser.add_argument("--machine", help="name of the results folder; default: from the CPU")
    parser.add_argument("--output", type=Path, help="write the JSON here instead of bench/results")
    arguments = parser.parse_args()
    plan = QUICK if arguments.quick else STANDARD
    pin_to_cores(NUM_CORES)
    record = environment()  # before anything runs: it notes how busy the machine was
    # A toy model would only measure how much Python and torch fit in its limit.
    isolation: Isolation = "drop" if arguments.quick else arguments.isolation
    with workdir(arguments.workdir, temporary=arguments.quick) as folder:
        checkpoint = checkpoints.write(
            plan.spec, folder / ("quick" if arguments.quick else "olmoe")
        )
        with tempfile.TemporaryDirectory(prefix="accelerate-", dir=folder) as offload_folder:
            quarter, whole = run(plan, checkpoint, Path(offload_folder), isolation)

    compared = check_tokens([quarter, whole])
    print(f"{compared} tokens equal to the resident model's")
    rows: dict[str, Row] = {}
    for comparison in (quarter, whole):
        found = summarise(comparison, plan.spec)
        rows.update({row["contender"]: row for row in found})
        show(comparison, found)
    targets = check_targets(quarter, whole, rows, plan.spec)
    headings = {
        "target": "target",
        "value": "measured",
        "bound": "bound",
        "kept": "kept",
        "note": "",
    }
    print_table(targets, headings, "Targets")
    results = {
        "environment": record,
        "plan": asdict(plan),
        "dense_bytes": plan.spec.dense_bytes,
        "expert_bytes": plan.spec.expert_bytes,
        "page_bytes": plan.spec.page_bytes,
        "tokens_equal_to_resident": compared,
        "targets": targets,
        "rows": list(rows.values()),
        "comparisons": [comparison.observed() for comparison in (quarter, whole)],
    }
    if arguments.output is not None:
        arguments.output.write_text(json.dumps(results, indent=1) + "\n")
        path = arguments.output
    else:
        name = "end_to_end_quick" if arguments.quick else "end_to_end"
        path = save(name, results, arguments.machine or machine_name())
    print(f"\nwritten to {path}")


if __name__ == "__main__":
    main()
