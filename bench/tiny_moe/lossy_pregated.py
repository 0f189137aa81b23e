"""Fine-tunes pre-gates to be executed (preset `lossy_pregated`) and prints what quality they leave.

    python bench/tiny_moe/lossy_pregated.py --corpus CORPUS --minutes 12

Pre-gated MoE (arXiv 2308.12066) lets the gate of block l choose the experts of block l + 1, and
fine-tunes the whole model for it, 2048 steps of 65 536 tokens. Here only the gates learn, by the
language model's own loss, from those that `train-predictor pregate` taught to predict: the rest of
the packaged model stays as it is, so one checkpoint serves exactly and lossily. Judged on held-out
text, through the offloaded model as users run it. Quality here is that of a small model after
minutes on CPU cores; it says how far the recipe goes in that time, not how far the idea goes.
"""

from __future__ import annotations

import argparse
import math
import os
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from data import Domain, MixedBatches, load_corpus
from fast_forward import forward, rope_table, token_loss
from safetensors.torch import load_file
from tokenizers import Tokenizer
from torch.nn.functional import cross_entropy

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

from harness import Row, environment, machine_name, print_table, save

import moe_offload
from moe_offload.models import tiny_moe_path
from moe_offload.predictors import make_predictor
from moe_offload.predictors.artefact import save_predictor
from moe_offload.predictors.lossy_pregated import LossyPregated
from moe_offload.predictors.pregate import PreGates
from moe_offload.predictors.rpp_training import cosine
from moe_offload.predictors.training import round_to_bf16

WINDOW, ROWS = 256, 8  # of a training batch
JUDGED_WINDOWS = 24  # per domain


def fine_tune(gates: PreGates, domains: list[Domain], config: Any, minutes: float) -> Row:
    """Changes `gates`; returns what was done. Learning rates follow the clock."""
    weights = load_file(tiny_moe_path() / "model.safetensors")
    w = {name: tensor.to(torch.bfloat16) for name, tensor in fused(weights, config).items()}
    batches, rope = MixedBatches(domains, ROWS, WINDOW, seed=11), rope_table(config, WINDOW)
    optimiser = torch.optim.AdamW(gates.parameters(), lr=1e-3, betas=(0.9, 0.98), weight_decay=1e-3)
    start, steps, first, smoothed = time.monotonic(), 0, 0.0, 0.0
    while (progress := (time.monotonic() - start) / (60 * minutes)) < 1:
        optimiser.param_groups[0]["lr"] = 1e-3 * cosine(progress)
        batch = batches.next()
        hidden, _ = forward(w, config, batch[:, :-1], rope, pregates=gates)
        loss = token_loss(w, hidden, batch[:, 1:])
        optimiser.zero_grad(set_to_none=True)
        loss.backward()
        torch.nn.utils.clip_grad_norm_(gates.parameters(), 1.0)
        optimiser.step()
        steps += 1
        smoothed = loss.item() if steps == 1 else 0.95 * smoothed + 0.05 * loss.item()
        first = first or smoothed
        if steps % 20 == 0:
            print(f"step {steps} loss {smoothed:.4f} {time.monotonic() - start:.0f} s", flush=True)
    done = {"steps": steps, "tokens": steps * ROWS * WINDOW, "minutes": minutes}
    return {**done, "first_loss": first, "last_loss": smoothed}


def fused(weights: dict[str, torch.Tensor], config: Any) -> dict[str, torch.Tensor]:
    """The checkpoint's tensors under the names `fast_forward` reads."""
    found = dict(weights)
    for layer in range(config.num_hidden_layers):
        prefix = f"model.layers.{layer}.mlp.experts."
        if prefix + "gate_up_proj" in found:
            continue
        parts: dict[str, list[torch.Tensor]] = {"gate": [], "up": [], "down": []}
        for expert in range(config.num_experts):
            for name, rows in parts.items():
                rows.append(found.pop(f"{prefix}{expert}.{name}_proj.weight"))
        gate_up = [torch.cat(pair) for pair in zip(parts["gate"], parts["up"], strict=True)]
        found[prefix + "gate_up_proj"] = torch.stack(gate_up)
        found[prefix + "down_proj"] = torch.stack(parts["down"])
    return found


@contextmanager
def offloaded(gates: PreGates | None) -> Iterator[Any]:
    """The packaged model at 25 %, its routers replaced by these gates, or not."""
    model = moe_offload.from_pretrained(tiny_moe_path(), device_budget="25%")
    offloader = moe_offload.get_offloader(model)
    if gates is not None:
        offloader.predict_with(model, LossyPregated(gates))
    try:
        yield model
    finally:
        offloader.close()


@torch.no_grad()
def judge(gates: PreGates | None, domains: list[Domain], exact: dict[str, Any]) -> Row:
    """Loss per held-out token (nats) and the share of tokens whose best guess stays the same.

    `exact` keeps the exact model's guesses, and is filled when `gates` is None.
    """
    losses: dict[str, float] = {}
    total, same, tokens = 0.0, 0, 0
    with offloaded(gates) as model:
        for domain in domains:
            count = min(JUDGED_WINDOWS, (len(domain.held_out) - 1) // WINDOW)
            text = domain.held_out[: count * WINDOW + 1]
            inputs, targets = text[:-1].view(count, WINDOW), text[1:].view(count, WINDOW)
            loss, guesses = 0.0, []
            for i, t in zip(inputs.split(8), targets.split(8), strict=True):
                logits = model(i, use_cache=False).logits.float()
                loss += cross_entropy(logits.flatten(0, 1), t.flatten(), reduction="sum").item()
                guesses.append(logits.argmax(-1))
            guess = torch.cat(guesses)
            if gates is None:
                exact[domain.name] = guess
            same += int((guess == exact[domain.name]).sum())
            losses[domain.name] = loss / targets.numel()
            total, tokens = total + loss, tokens + targets.numel()
    return {
        "loss": total / tokens,
        "perplexity": math.exp(total / tokens),
        "same_best_token": same / tokens,
        "held_out_tokens": tokens,
        "loss_by_domain": losses,
    }


COLUMNS = {
    "variant": "variant",
    "loss": "loss, nats",
    "perplexity": "perplexity",
    "same_best_token": "same best token",
}


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--corpus", type=Path, default=os.environ.get("MOE_OFFLOAD_CORPUS"))
    parser.add_argument("--minutes", type=float, default=12, help="of fine-tuning (12)")
    parser.add_argument("--gates", type=Path, default=tiny_moe_path() / "predictors" / "pregate")
    parser.add_argument("--out", type=Path, help="folder for the fine-tuned gates")
    parser.add_argument("--machine", help="name of the results folder; default: from the CPU")
    args = parser.parse_args()
    if args.corpus is None:
        parser.error("give --corpus, the folder of domain files")
    torch.set_num_threads(1)
    torch.manual_seed(0)
    from transformers import AutoConfig

    record = environment()
    config = AutoConfig.from_pretrained(tiny_moe_path())
    domains = load_corpus(args.corpus, Tokenizer.from_file(str(tiny_moe_path() / "tokenizer.json")))
    exact: dict[str, Any] = {}
    rows = [{"variant": "exact: the model's routers", **judge(None, domains, exact)}]
    gates = make_predictor(str(args.gates)).gates
    lossy = "lossy, gates trained to predict"
    rows.append({"variant": lossy, **judge(gates, domains, exact)})
    print_table(rows, COLUMNS)
    gates.requires_grad_(True)
    done = fine_tune(gates, domains, config, args.minutes)
    round_to_bf16(gates)
    rows.append({"variant": "lossy, gates fine-tuned", **judge(gates, domains, exact)})
    print_table(rows, COLUMNS, "Held-out text, the packaged model offloaded at 25 %")
    results = {"environment": record, "fine_tuning": done, "rows": rows}
    path = save("lossy_pregated", results, args.machine or machine_name())
    print(f"written to {path}")
    if args.out is not None:
        card = CARD.format(
            **done, before=rows[1]["loss"], after=rows[2]["loss"], exact=rows[0]["loss"]
        )
        shape = dict(vars(gates.shape))
        save_predictor(args.out, "pregate", gates.state_dict(), shape, done, card)


CARD = """# Pre-gates to be executed

For `preset="lossy_pregated"`, which changes tokens: gate l chooses the experts of layer l + 1. Made
by `bench/tiny_moe/lossy_pregated.py` from the gates in `../pregate`: {steps} steps, {tokens} tokens
of the training part of the packaged model's corpus (sources and licences in the model's card),
{minutes} minutes, the language model's loss, all other weights frozen.

Loss per held-out token, nats: {exact:.3f} exact, {before:.3f} with the gates before,
{after:.3f} after.
"""


if __name__ == "__main__":
    main()
