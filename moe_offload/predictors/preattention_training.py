"""Fit the pre-attention heads to the inputs of a model's layers, and judge them."""

from __future__ import annotations

from collections.abc import Callable, Sequence

import numpy as np
import torch
from torch import Tensor, nn
from torch.nn import functional as F

from moe_offload.predictors.layer_training import tokens_of, train_on_layers, watch
from moe_offload.predictors.metrics import RecallMeter
from moe_offload.predictors.rpp_training import Sample, TrainingReport


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
    """Fit the heads by binary cross-entropy; arguments as in `train_on_layers`.

    Args:
        reach: layers each head names, its own first.

    Returns:
        weight [L, reach, E, H], bias [L, reach, E], and the report.
    """
    heads: list[Tensor] = []

    def make(inputs: Tensor, targets: Tensor) -> list[Tensor]:
        layers, _, hidden = inputs.shape
        share = targets.mean().clamp(1e-3, 1 - 1e-3)
        weight = torch.zeros(layers, reach, num_experts, hidden, requires_grad=True)
        bias = torch.full((layers, reach, num_experts), float(torch.logit(share)))
        heads.extend((weight, bias.requires_grad_()))
        return heads

    report = train_on_layers(
        model,
        samples,
        num_experts,
        "layer",
        make,
        lambda inputs, targets: _loss(heads[0], heads[1], inputs, targets),
        steps=steps,
        batch=batch,
        learning_rate=learning_rate,
        seed=seed,
        minutes=minutes,
        log=log,
    )
    weight, bias = heads
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
        tokens = torch.from_numpy(tokens_of(sample)[None].astype(np.int64))
        inputs, targets = watch(model, tokens, experts, "layer")
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
