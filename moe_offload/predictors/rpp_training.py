"""Train a Routing Path Predictor from recorded routing, and judge it on sequences held out.

A sample is one sequence: the tokens of its prompt, the tokens decoded after it, and which experts
each layer used while each of these was fed. The loss is binary cross-entropy over all layers and
experts (ExpertFlow, arXiv 2410.17954), the decoder is fed the sequence's own tokens.
"""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor
from torch.nn import functional as F

from moe_offload.errors import PredictorError
from moe_offload.predictors.metrics import RecallMeter
from moe_offload.predictors.rpp_model import RppConfig, RppModel


@dataclass(frozen=True)
class Sample:
    """One sequence to learn from.

    Attributes:
        prompt: [P] token ids before the first decoded one, P >= 1.
        decoded: [N] token ids, in the order they were fed.
        experts: [N, L, A] the experts each layer chose while that token was fed.
        domain: label for the report, "" when unknown.
    """

    prompt: np.ndarray
    decoded: np.ndarray
    experts: np.ndarray
    domain: str = ""


@dataclass
class TrainingReport:
    """What a card says: how long, on what, how good."""

    steps: int
    seconds: float
    tokens_seen: int
    train_sequences: int
    train_tokens: int
    loss: float
    held_out: dict[str, object]


def split_samples(
    samples: Sequence[Sample], held_out: float, seed: int
) -> tuple[list[Sample], list[Sample]]:
    """Shuffle by sequence and keep a share (0 < held_out < 1) for judging, at least one."""
    if len(samples) < 2:
        raise PredictorError(
            f"train-predictor: expected at least 2 sequences with routing, got {len(samples)}. "
            "Record more prompts."
        )
    order = np.random.default_rng(seed).permutation(len(samples))
    count = min(max(1, round(held_out * len(samples))), len(samples) - 1)
    return [samples[i] for i in order[count:]], [samples[i] for i in order[:count]]


def batches(
    samples: Sequence[Sample], batch: int, seed: int, max_prompt: int, max_decoded: int
) -> Iterator[list[Sample]]:
    """Endless batches of sequences of like length (little padding), in random order."""
    rng = np.random.default_rng(seed)
    while True:
        noise = rng.uniform(0.9, 1.1, len(samples))
        lengths = np.array([len(s.decoded) for s in samples]) * noise
        order = np.argsort(lengths)
        groups = [order[i : i + batch] for i in range(0, len(order), batch)]
        for group in rng.permutation(len(groups)):
            yield [samples[i] for i in groups[group]]


def collate(
    batch: Sequence[Sample], config: RppConfig
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    """prompt [B, P], keep [B, P], decoded [B, N], counted [B, N], target [B, N, L, E]."""
    size = len(batch)
    prompt_len = min(max(len(s.prompt) for s in batch), config.max_prompt)
    count = min(max(len(s.decoded) for s in batch), config.max_decoded)
    prompt = torch.zeros(size, prompt_len, dtype=torch.int64)
    keep = torch.zeros(size, prompt_len, dtype=torch.bool)
    decoded = torch.zeros(size, count, dtype=torch.int64)
    counted = torch.zeros(size, count, dtype=torch.bool)
    experts = torch.zeros(size, count, config.num_layers, config.top_k, dtype=torch.int64)
    for row, sample in enumerate(batch):
        tail = sample.prompt[-prompt_len:]
        prompt[row, : len(tail)] = torch.from_numpy(tail.astype(np.int64))
        keep[row, : len(tail)] = True
        n = min(len(sample.decoded), count)
        decoded[row, :n] = torch.from_numpy(sample.decoded[:n].astype(np.int64))
        counted[row, :n] = True
        experts[row, :n] = torch.from_numpy(sample.experts[:n].astype(np.int64))
    target = torch.zeros(size, count, config.num_layers, config.num_experts)
    target.scatter_(-1, experts, 1.0)
    return prompt, keep, decoded, counted, target


def cosine(progress: float) -> float:
    """Share of the learning rate after this share of the run: 1 falling to 0.02."""
    return 0.02 + 0.98 * 0.5 * (1 + math.cos(math.pi * progress))


TOO_SHORT = "train-predictor: --minutes is too short for a single step"


def paced(steps: int, minutes: float | None) -> Iterator[tuple[int, float]]:
    """(step, share of the run) for steps 1 to `steps`, or until `minutes` have passed."""
    start = time.monotonic()
    for step in range(1, steps + 1):
        progress = step / steps
        if minutes is not None:
            progress = max(progress, (time.monotonic() - start) / (60 * minutes))
        if progress > 1:
            return
        yield step, progress


def train_rpp(
    samples: Sequence[Sample],
    config: RppConfig,
    *,
    steps: int,
    batch: int = 16,
    learning_rate: float = 3e-3,
    seed: int = 0,
    minutes: float | None = None,
    log: Callable[[str], None] = lambda line: None,
) -> tuple[RppModel, TrainingReport]:
    """Fit an RPP. Deterministic for a seed and thread count when `minutes` is not given.

    Args:
        samples: sequences to learn from; hold others out for `judge_rpp`.
        steps: optimiser steps, or the most of them when `minutes` ends the run first (the
            learning rate then follows the clock).
        batch: sequences per step.

    Raises:
        PredictorError: no samples, or not enough time for one step.
    """
    if not samples:
        raise PredictorError("train-predictor: no sequence with routing to learn from")
    torch.manual_seed(seed)
    model = RppModel(config)
    decay = [p for p in model.parameters() if p.dim() >= 2]
    other = [p for p in model.parameters() if p.dim() < 2]
    groups = [{"params": decay, "weight_decay": 1e-4}, {"params": other, "weight_decay": 0.0}]
    optimiser = torch.optim.AdamW(groups, lr=learning_rate, betas=(0.9, 0.99))
    source = batches(samples, batch, seed, config.max_prompt, config.max_decoded)
    start, seen, smoothed = time.monotonic(), 0, 0.0
    step = 0
    for step, progress in paced(steps, minutes):
        warm = min(1.0, step / 100)
        rate = learning_rate * warm * cosine(progress)
        for group in optimiser.param_groups:
            group["lr"] = rate
        prompt, keep, decoded, counted, target = collate(next(source), config)
        logits = model(prompt, decoded, keep)
        loss = F.binary_cross_entropy_with_logits(logits[counted], target[counted])
        optimiser.zero_grad(set_to_none=True)
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimiser.step()
        seen += int(counted.sum())
        smoothed = loss.item() if step == 1 else 0.98 * smoothed + 0.02 * loss.item()
        if step == 1 or step % 50 == 0:
            seconds = time.monotonic() - start
            log(f"step {step} loss {smoothed:.4f} tokens {seen} {seconds:.0f} s")
    if step == 0:
        raise PredictorError(TOO_SHORT)
    tokens = sum(len(s.decoded) for s in samples)
    report = TrainingReport(
        steps=step,
        seconds=time.monotonic() - start,
        tokens_seen=seen,
        train_sequences=len(samples),
        train_tokens=tokens,
        loss=smoothed,
        held_out={},
    )
    return model.eval(), report


def judge_rpp(
    model: RppModel, samples: Sequence[Sample], *, extra: int = 2, batch: int = 16
) -> dict[str, object]:
    """Recall per token and per batch on sequences, see `metrics.RecallMeter.summary`."""
    config = model.config
    meter = RecallMeter(config.num_layers, config.num_experts, config.top_k, extra=extra)
    ordered = sorted(samples, key=lambda s: len(s.decoded))
    with torch.inference_mode():
        for begin in range(0, len(ordered), batch):
            group = ordered[begin : begin + batch]
            prompt, keep, decoded, counted, target = collate(group, config)
            logits = model(prompt, decoded, keep)
            for position in range(decoded.shape[1]):
                rows = counted[:, position]
                if bool(rows.any()):
                    truth = target[rows, position].bool().numpy()
                    meter.add_step(logits[rows, position].numpy(), truth)
    return meter.summary()
