"""Trains the predictors that ship with the packaged model, from the training part of its corpus.

    python bench/tiny_moe/predictors.py --corpus CORPUS --minutes 30
    python bench/tiny_moe/predictors.py --corpus CORPUS --model FOLDER   another one of train.py's

Two kinds of sequences: windows of the text itself, and what the model writes after the first 48
tokens of other windows (half greedy, half sampled), because that is what it will be asked to
predict. Only the training part of each domain is read, so the held-out documents, the demo's
prompts and the four evaluation workloads are unseen; a share of the sequences is kept to judge.
"""

from __future__ import annotations

import argparse
import os
from pathlib import Path

import numpy as np
import torch
from data import MixedBatches, load_corpus
from tokenizers import Tokenizer
from torch import Tensor
from transformers import AutoModelForCausalLM

from moe_offload.huggingface.observe import Observer, observe
from moe_offload.models import tiny_moe_path
from moe_offload.predictors.rpp_model import RppConfig
from moe_offload.predictors.rpp_training import Sample
from moe_offload.predictors.training import train_preattention_to, train_pregate_to, train_rpp_to

TEXT_BATCHES, TEXT_ROWS, TEXT_TOKENS = 40, 64, 256
WRITTEN_BATCHES, WRITTEN_ROWS, PROMPT_TOKENS, NEW_TOKENS = 20, 96, 48, 144
DATA = (
    "windows of the training part of the packaged model's corpus (seven domains, sources and "
    "licences in the model's card) and what the model writes after the first 48 tokens of others"
)


class _Routing(Observer):
    """Chosen experts of the latest call."""

    def __init__(self) -> None:
        self.ids: dict[int, Tensor] = {}

    def layer_routed(self, layer: int, topk_ids: Tensor, topk_weights: Tensor) -> None:
        self.ids[layer] = topk_ids


def route(model: torch.nn.Module, tokens: Tensor) -> np.ndarray:
    """[B, T] -> chosen experts [B, T, L, A]."""
    seen = _Routing()
    with torch.no_grad(), observe(model, seen):
        model(tokens, use_cache=False, logits_to_keep=1)
    layers = [seen.ids[layer].view(*tokens.shape, -1) for layer in sorted(seen.ids)]
    return torch.stack(layers, 2).to(torch.uint8).numpy()


def write(model: torch.nn.Module, prompt: Tensor, seed: int) -> Tensor:
    """Let the model continue; every second batch is sampled."""
    torch.manual_seed(seed)
    sampling = {"do_sample": False}
    if seed % 2:
        sampling = {"do_sample": True, "temperature": 0.8, "top_p": 0.95}
    with torch.no_grad():
        return model.generate(
            prompt,
            attention_mask=torch.ones_like(prompt),
            max_new_tokens=NEW_TOKENS,
            min_new_tokens=NEW_TOKENS,
            pad_token_id=1,
            **sampling,
        )


def gather(
    model: torch.nn.Module, tokenizer: Tokenizer, corpus: Path, share: float, seed: int = 0
) -> list[Sample]:
    """A share of all sequences, routed; prompts of the text windows are 16 to 64 tokens."""
    domains = load_corpus(corpus, tokenizer)
    rng = np.random.default_rng(seed)
    samples = []

    def keep(tokens: Tensor, kind: str, low: int, high: int) -> None:
        for row, experts in zip(tokens.numpy(), route(model, tokens), strict=True):
            cut = int(rng.integers(low, high))
            samples.append(Sample(row[:cut], row[cut:], experts[cut:], kind))

    windows = MixedBatches(domains, TEXT_ROWS, TEXT_TOKENS, seed=7)
    for _ in range(round(share * TEXT_BATCHES)):
        keep(windows.next()[:, :TEXT_TOKENS], "text", 16, 65)
    windows = MixedBatches(domains, WRITTEN_ROWS, 64, seed=8)
    for batch in range(round(share * WRITTEN_BATCHES)):
        written = write(model, windows.next()[:, :PROMPT_TOKENS], batch)
        keep(written, "written", PROMPT_TOKENS, PROMPT_TOKENS + 1)
    return samples


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--corpus", type=Path, default=os.environ.get("MOE_OFFLOAD_CORPUS"))
    parser.add_argument("--model", type=Path, default=tiny_moe_path(), help="(the packaged one)")
    parser.add_argument("--out", type=Path, help="(the model's folder predictors)")
    parser.add_argument("--minutes", type=float, default=30, help="of training the RPP (30)")
    parser.add_argument("--steps", type=int, default=3000, help="of the RPP at most (3000)")
    parser.add_argument("--share", type=float, default=1.0, help="of the sequences (1)")
    parser.add_argument("--kinds", default="rpp,preattention,pregate", help="(all)")
    args = parser.parse_args()
    if args.corpus is None:
        parser.error("give --corpus, the folder of domain files")
    torch.set_num_threads(1)
    out = args.out or args.model / "predictors"
    model = AutoModelForCausalLM.from_pretrained(args.model, dtype=torch.float32).eval()
    model.set_experts_implementation("grouped_mm")
    tokenizer = Tokenizer.from_file(str(args.model / "tokenizer.json"))
    samples = gather(model, tokenizer, args.corpus, args.share)
    experts, top_k = model.config.num_experts, model.config.num_experts_per_tok
    config = RppConfig(model.config.vocab_size, model.config.num_hidden_layers, experts, top_k)
    shared = {"data": DATA, "held_out": 0.06, "log": print}
    kinds = args.kinds.split(",")
    if "rpp" in kinds:
        train_rpp_to(
            out / "rpp", samples, config, steps=args.steps, minutes=args.minutes, batch=12, **shared
        )
    on_layers = {"preattention": train_preattention_to, "pregate": train_pregate_to}
    for kind, train_to in on_layers.items():
        if kind in kinds:
            train_to(
                out / kind,
                model,
                samples,
                num_experts=experts,
                top_k=top_k,
                steps=400,
                minutes=args.minutes / 3,
                **shared,
            )


if __name__ == "__main__":
    main()
