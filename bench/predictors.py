"""Measures what each predictor is worth on the packaged model, paged from disk.

    python bench/predictors.py [--checkpoint FOLDER] [--trained FOLDER ...]

At a budget of 25 %, batches of 1 and 4 sequences: no predictor, each predictor and an oracle,
interleaved, tokens compared first. Beside the rows stands the bound they work under: how
long a layer takes without stalls, what a missed page costs, how many pages fit behind one layer.
`--checkpoint` adds a model whose pages are large, so that reading them rules everything.
`--trained` names folders of predictors of other models (a gpt-oss-20b trace, say): their recall on
held-out sequences, which needs no model, is copied from their headers.
"""

from __future__ import annotations

import argparse
import json
import time
from pathlib import Path
from typing import Any

from harness import environment, machine_name, pin_to_cores, print_table, save

BUDGETS, BATCHES = ("25%",), (1, 4)
NEW_TOKENS, REPEATS = 48, 3
COLUMNS = {
    "predictor": "predictor",
    "recall_at_top_k": "recall@A",
    "recall_at_candidates": "@A+m",
    "hit_rate": "hit rate",
    "prefetch_bytes_used": "used",
    "prefetch_bytes_wasted": "wasted",
    "net_bytes_saved": "net saved",
    "stall_seconds": "stall s",
    "predictor_ms_per_token": "ms/token",
    "predictor_share_of_step": "share of step",
    "tokens_per_second": "tokens/s",
}


def prompts_of(tokenizer: Any, batch: int) -> list[dict[str, Any]]:
    """The packaged prompts, one of each domain, `batch` at a time (left padded)."""
    from moe_offload.models import tiny_moe_path

    first: dict[str, str] = {}
    for entry in json.loads((tiny_moe_path().parent / "prompts.json").read_text()):
        first.setdefault(entry["domain"], entry["text"])
    texts = list(first.values())
    tokenizer.padding_side = "left"
    return [
        dict(
            tokenizer(
                texts[i : i + batch], return_tensors="pt", padding=True, return_token_type_ids=False
            )
        )
        for i in range(0, len(texts) - batch + 1, batch)
    ]


def rpp_step_us(folder: Path, batch: int = 1, context: int = 128) -> float:
    """Median microseconds of one RPP decoder step."""
    import torch

    from moe_offload.predictors.artefact import load_predictor
    from moe_offload.predictors.rpp_session import RppDecoder, RppSession

    model = load_predictor(folder).model  # type: ignore[attr-defined]
    session = RppSession(RppDecoder(model), torch.zeros(batch, 64, dtype=torch.int64))
    token = torch.zeros(batch, dtype=torch.int64)
    for _ in range(context):
        session.step(token)
    times = []
    for _ in range(200):
        begin = time.perf_counter_ns()
        session.step(token)
        times.append(time.perf_counter_ns() - begin)
    return sorted(times)[100] / 1e3


def seeded(torch: Any) -> Any:
    return torch.Generator().manual_seed(0)


def measure(
    case: dict[str, Any],
    model: Any,
    prompts: list[dict[str, Any]],
    makers: dict[str, Any],
    new_tokens: int,
    repeats: int,
) -> dict[str, Any]:
    """One table: the case, its bound and its rows; closes the model's offloader."""
    import moe_offload
    from moe_offload.ablation import ablate, bound

    rows = ablate(model, prompts, makers, max_new_tokens=new_tokens, repeats=repeats)
    offloader = moe_offload.get_offloader(model)
    page_bytes = offloader.pools[0].layout.payload_bytes
    limits = bound(rows, len(offloader.layers), page_bytes)
    offloader.close()
    title = "{model}, {budget} of the experts, batch {batch}".format(**case)
    print_table(rows, COLUMNS, title)
    print(f"  bound: {json.dumps(limits)}")
    return {**case, "page_bytes": page_bytes, "bound": limits, "rows": rows}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--trained", action="append", default=[], type=Path, metavar="FOLDER")
    parser.add_argument("--checkpoint", type=Path, help="a large one, e.g. of end_to_end.py")
    parser.add_argument("--repeats", type=int, default=REPEATS)
    parser.add_argument("--cores", type=int, default=2)
    args = parser.parse_args()
    pin_to_cores(args.cores)
    import torch
    from transformers import AutoTokenizer

    import moe_offload
    from moe_offload.ablation import DEFAULT
    from moe_offload.models import tiny_moe_path
    from moe_offload.predictors import make_predictor
    from moe_offload.predictors.artefact import read_predictor

    torch.set_num_threads(1)  # the other core reads; matrices this small gain nothing from two
    path = tiny_moe_path()
    tokenizer = AutoTokenizer.from_pretrained(path)
    folders = sorted(folder for folder in (path / "predictors").iterdir() if folder.is_dir())
    packaged = [folder for folder in folders if not folder.name.startswith("lossy")]
    makers = {name: (lambda name=name: make_predictor(name)) for name in DEFAULT}
    makers |= {f.name: (lambda f=f: make_predictor(f)) for f in packaged}
    cases = []
    for budget in BUDGETS:
        for batch in BATCHES:
            # Under one policy that learns nothing, so that predictors differ and nothing else.
            model = moe_offload.from_pretrained(path, device_budget=budget, policy="lru")
            case = {"model": "tiny", "budget": budget, "batch": batch}
            prompts = prompts_of(tokenizer, batch)
            cases.append(measure(case, model, prompts, makers, NEW_TOKENS, args.repeats))
    if args.checkpoint is not None:
        model = moe_offload.from_pretrained(args.checkpoint, device_budget="25%", policy="lru")
        case = {"model": args.checkpoint.name, "budget": "25%", "batch": 1}
        ids = torch.randint(3, model.config.vocab_size, (2, 1, 16), generator=seeded(torch))
        prompts = [{"input_ids": row, "attention_mask": torch.ones_like(row)} for row in ids]
        own = {name: makers[name] for name in ("previous", "lookahead")}
        torch.set_num_threads(args.cores)
        cases.append(measure(case, model, prompts, own, 12, 1))
        torch.set_num_threads(1)
    trained = {}
    for folder in [*packaged, *args.trained]:
        about, _ = read_predictor(folder)
        trained[folder.name] = {"kind": about["kind"], "shape": about["shape"], **about["training"]}
        if about["kind"] == "rpp":
            trained[folder.name]["step_us"] = rpp_step_us(folder)
    results = {"environment": environment(), "cases": cases, "trained": trained}
    print(f"\nwrote {save('predictors', results, machine_name())}")


if __name__ == "__main__":
    main()
