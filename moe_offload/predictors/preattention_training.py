"""Train the pre-attention heads: the model reads sequences again, the heads watch its layers.

Layer inputs are large and easily made again, so no trace holds them: the tokens of recorded
sequences are fed to the model, and each layer's input and choice are seen as they happen.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn
from torch.nn import functional as F

from moe_offload.errors import PredictorError
from moe_offload.huggingface.observe import Observer, observe
from moe_offload.predictors.metrics import RecallMeter
from moe_offload.predictors.preattention import _EPS
from moe_offload.predictors.rpp_training import Sample, TrainingReport

_INNER_STEPS = 4  # optimiser steps per forward of the model, on disjoint rows of it


class _Watcher(Observer):
    """Scaled layer inputs [R, H] and chosen experts [R, A] of the latest call, per layer."""

    def __init__(self) -> None:
        self.inputs: dict[int, Tensor] = {}
        self.ids: dict[int, Tensor] = {}

    def layer_begins(self, layer: int, hidden: Tensor) -> None:
        x = hidden.detach().float().reshape(-1, hidden.shape[-1])
        self.inputs[layer] = x * (x.square().mean(-1, keepdim=True) + _EPS).rsqrt()

    def layer_routed(self, layer: int, topk_ids: Tensor, topk_weights: Tensor) -> None:
        self.ids[layer] = topk_ids.detach()


def train_preattention(
    model: nn.Module,
    samples: Sequence[Sample],
    num_experts: int,
    *,
    reach: int = 2,
    steps: int = 400,
    batch: int = 8,
    learning_rate: float = 3e-3,
    seed: int = 0,
    minutes: float | None = None,
    log: Callable[[str], None] = lambda line: None,
) -> tuple[Tensor, Tensor, TrainingReport]:
    """Fit the heads by binary cross-entropy.

    Args:
        model: the MoE model, resident or offloaded.
        samples: sequences; only their tokens are used.
        num_experts: E of every layer.
        reach: layers each head names, its own first.
        steps: forwards of the model, at most; `minutes` may end the run first.
        batch: sequences per forward.

    Returns:
        weight [L, reach, E, H], bias [L, reach, E], and the report.
    """
    if not samples:
        raise PredictorError("train-predictor: no sequence with routing to learn from")
    torch.manual_seed(seed)
    weight = bias = None
    start, seen, smoothed, done = time.monotonic(), 0, 0.0, 0
    source = _token_batches(samples, batch, seed)
    optimiser: Any = None
    for step in range(1, steps + 1):
        progress = step / steps
        if minutes is not None:
            progress = max(progress, (time.monotonic() - start) / (60 * minutes))
        if progress > 1:
            break
        inputs, targets = _watch(model, next(source), num_experts)  # [L, R, H], [L, R, E]
        if weight is None or bias is None:
            layers, _, hidden = inputs.shape
            share = targets.mean().clamp(1e-3, 1 - 1e-3)
            weight = torch.zeros(layers, reach, num_experts, hidden, requires_grad=True)
            bias = torch.full((layers, reach, num_experts), float(torch.logit(share)))
            bias.requires_grad_()
            optimiser = torch.optim.AdamW([weight, bias], lr=learning_rate, weight_decay=1e-3)
        rate = learning_rate * (0.02 + 0.98 * 0.5 * (1 + np.cos(np.pi * progress)))
        optimiser.param_groups[0]["lr"] = float(rate)
        for part in torch.randperm(inputs.shape[1]).chunk(_INNER_STEPS):
            loss = _loss(weight, bias, inputs[:, part], targets[:, part])
            optimiser.zero_grad(set_to_none=True)
            loss.backward()
            optimiser.step()
        seen += inputs.shape[1]
        done = step
        smoothed = loss.item() if step == 1 else 0.95 * smoothed + 0.05 * loss.item()
        if step == 1 or step % 20 == 0:
            log(f"step {step} loss {smoothed:.4f} tokens {seen} {time.monotonic() - start:.0f} s")
    if weight is None or bias is None:
        raise PredictorError("train-predictor: --minutes is too short for a single step")
    report = TrainingReport(
        steps=done,
        seconds=time.monotonic() - start,
        tokens_seen=seen,
        train_sequences=len(samples),
        train_tokens=sum(len(s.prompt) + len(s.decoded) for s in samples),
        loss=smoothed,
        held_out={},
    )
    return weight.detach(), bias.detach(), report


def judge_preattention(
    model: nn.Module, weight: Tensor, bias: Tensor, samples: Sequence[Sample], top_k: int
) -> dict[str, object]:
    """Recall per token of the decoded part, for each layer ahead ("input+0", "input+1", ...)."""
    layers, reach, experts, _ = weight.shape
    meters = {
        ahead: RecallMeter(layers - ahead, experts, top_k, extra=max(1, top_k // 2))
        for ahead in range(min(reach, layers))
    }
    for sample in samples:
        tokens = torch.from_numpy(_tokens(sample)[None].astype(np.int64))
        inputs, targets = _watch(model, tokens, experts)
        own = slice(len(sample.prompt), None)
        logits = torch.einsum("lrh,ldeh->ldre", inputs[:, own], weight) + bias[:, :, None]
        for ahead, meter in meters.items():
            scores = logits[: layers - ahead, ahead].transpose(0, 1)  # [R, L - ahead, E]
            truth = targets[ahead:, own].transpose(0, 1).bool()
            meter.add_tokens(scores.numpy(), truth.numpy())
    return {f"input+{ahead}": meter.summary() for ahead, meter in meters.items()}


def _loss(weight: Tensor, bias: Tensor, inputs: Tensor, targets: Tensor) -> Tensor:
    logits = torch.einsum("lrh,ldeh->dlre", inputs, weight) + bias.transpose(0, 1)[:, :, None]
    layers = len(inputs)
    total = logits.new_zeros(())
    for ahead in range(min(len(logits), layers)):
        own = logits[ahead, : layers - ahead]
        total = total + F.binary_cross_entropy_with_logits(own, targets[ahead:])
    return total


def _watch(model: nn.Module, tokens: Tensor, num_experts: int) -> tuple[Tensor, Tensor]:
    watcher = _Watcher()
    with torch.no_grad(), observe(model, watcher):
        model(tokens, use_cache=False)
    layers = range(len(watcher.ids))
    targets = torch.zeros(len(watcher.ids), watcher.ids[0].shape[0], num_experts)
    for layer in layers:
        targets[layer].scatter_(1, watcher.ids[layer].long(), 1.0)
    return torch.stack([watcher.inputs[layer] for layer in layers]), targets


def _tokens(sample: Sample) -> np.ndarray:
    return np.concatenate([sample.prompt, sample.decoded])


def _token_batches(samples: Sequence[Sample], batch: int, seed: int) -> Iterator[Tensor]:
    """Endless [B, T] batches of sequences of like length, cut to the shortest: no padding."""
    rng = np.random.default_rng(seed)
    tokens = sorted((_tokens(sample) for sample in samples), key=len)
    groups = [tokens[i : i + batch] for i in range(0, len(tokens), batch)]
    while True:
        for index in rng.permutation(len(groups)):
            group = groups[index]
            rows = np.stack([row[: len(group[0])] for row in group])
            yield torch.from_numpy(rows.astype(np.int64))
