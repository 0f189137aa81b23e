"""A model that does not fit, beside llama.cpp: pages fetched by expert, and a mapped file.

The checkpoint of end_to_end.py and the same numbers as a GGUF file (bench/gguf_checkpoint.py), on
the same prompts, each process in a memory control group of dense weights + 25 % of the experts +
400 MB, and then with room for everything. llama.cpp maps the file, as it does by default, and the
kernel evicts; bench/comparison.py says how turns are taken.

llama.cpp rounds activations elsewhere (f16 KV cache, its own order of sums), and random weights
turn that into other tokens sooner or later. What is checked is that most prompts give the same
first token as our run, which a wrong conversion would not: the vocabulary has thousands.

    pip install --no-deps llama-cpp-python==0.3.36 gguf==0.19.0 diskcache  # compiles: ten minutes
    python bench/beside_llama_cpp.py [--workdir DIR]   # as root: about six minutes, 7 GB
"""

from __future__ import annotations

import argparse
import random
from dataclasses import asdict
from pathlib import Path

import checkpoints
import gguf_checkpoint
from comparison import Comparison
from end_to_end import NUM_CORES, WHOLE_ALLOWANCE_BYTES
from harness import Row, environment, machine_name, pin_to_cores, save
from report import ALLOWANCE_BYTES, FULL, PAGED, show, summarise

LLAMA_PAGED, LLAMA_FULL = "llama.cpp mmap, 25%", "llama.cpp mmap, 100%"
ROUNDS, PROMPT_TOKENS, NEW_TOKENS = 6, 512, 12  # the first round warms up and does not count


def run(spec: checkpoints.Spec, checkpoint: Path, gguf: Path, rounds: int) -> list[Comparison]:
    """Both comparisons, tokens checked."""
    rng = random.Random(1)
    prompts = [[rng.randrange(spec.vocab) for _ in range(PROMPT_TOKENS)] for _ in range(rounds)]
    quarter = Comparison(
        "25%",
        spec.dense_bytes + spec.expert_bytes // 4 + ALLOWANCE_BYTES,
        {
            PAGED: [checkpoint, "--budget", "25%"],
            LLAMA_PAGED: [checkpoint, "--llama-cpp", gguf],
        },
    )
    whole = Comparison(
        "100%",
        spec.dense_bytes + spec.expert_bytes + WHOLE_ALLOWANCE_BYTES,
        {
            FULL: [checkpoint, "--budget", "100%"],
            LLAMA_FULL: [checkpoint, "--llama-cpp", gguf],
        },
    )
    for comparison in (quarter, whole):
        comparison.run(
            checkpoint, prompts, NEW_TOKENS, spec.page_bytes, 0.1, 1 << 29, isolation="group"
        )
        first, second = comparison.turns.values()
        same = sum(a["tokens"][0] == b["tokens"][0] for a, b in zip(first, second, strict=True))
        if 2 * same <= rounds:
            raise SystemExit(
                f"llama.cpp's first token is ours in {same} of {rounds} prompts: another model, "
                "so no times"
            )
        print(f"first token equal in {same} of {rounds} prompts")
    return [quarter, whole]


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--workdir", type=Path, help="for both files; default: a cache folder")
    parser.add_argument("--rounds", type=int, default=ROUNDS)
    parser.add_argument("--machine", help="name of the results folder; default: from the CPU")
    arguments = parser.parse_args()
    pin_to_cores(NUM_CORES)
    record = environment()
    workdir = arguments.workdir or Path.home() / ".cache" / "moe_offload_bench"
    spec = checkpoints.Spec()
    checkpoint = checkpoints.write(spec, workdir / "olmoe")
    gguf = gguf_checkpoint.write(spec, checkpoint, workdir / "olmoe.gguf")
    comparisons = run(spec, checkpoint, gguf, arguments.rounds)
    rows: list[Row] = []
    for comparison in comparisons:
        found = summarise(comparison, spec)
        show(comparison, found)
        rows += found
    results = {
        "environment": record,
        "rows": rows,
        "comparisons": [
            {key: value for key, value in asdict(comparison).items() if key != "commands"}
            for comparison in comparisons
        ],
    }
    print(f"\nwritten to {save('llama_cpp', results, arguments.machine or machine_name())}")


if __name__ == "__main__":
    main()
