"""Fit pre-gates to what a model's own routers choose, and judge them."""

from __future__ import annotations

from collections.abc import Callable, Sequence

import numpy as np
import torch
from torch import Tensor, nn
from torch.nn import functional as F

from moe_offload.errors import PredictorError
from moe_offload.predictors.layer_training import tokens_of, train_on_layers, watch
from moe_offload.predictors.metrics import RecallMeter
from moe_offload.predictors.pregate import PreGates, PreGateShape
from moe_offload.predictors.rpp_training import Sample, TrainingReport


def train_pregates(
    model: nn.Module,
    samples: Sequence[Sample],
    num_experts: int,
    top_k: int,
    *,
    steps: int = 400,
    batch: int = 8,
    learning_rate: float = 3e-3,
    seed: int = 0,
    minutes: float | None = None,
    log: Callable[[str], None] = lambda line: None,
) -> tuple[PreGates, TrainingReport]:
    """Fit the gates by binary cross-entropy; arguments as in `train_on_layers`.

    Raises:
        PredictorError: the model has one MoE layer only, so none comes next.
    """
    made: list[PreGates] = []

    def make(inputs: Tensor, targets: Tensor) -> list[Tensor]:
        layers, _, hidden = inputs.shape
        if layers < 2:
            raise PredictorError(
                "pregate: a gate names the experts of the next MoE layer, and this model has only "
                "one. Use preattention or rpp."
            )
        gates = PreGates(PreGateShape(layers, num_experts, top_k, hidden))
        share = targets.mean().clamp(1e-3, 1 - 1e-3)
        nn.init.constant_(gates.bias, float(torch.logit(share)))
        made.append(gates)
        return list(gates.parameters())

    def loss_of(inputs: Tensor, targets: Tensor) -> Tensor:
        losses = [
            F.binary_cross_entropy_with_logits(made[0](layer, inputs[layer]), targets[layer + 1])
            for layer in range(len(inputs) - 1)
        ]
        return torch.stack(losses).sum()

    report = train_on_layers(
        model,
        samples,
        num_experts,
        "block",
        make,
        loss_of,
        steps=steps,
        batch=batch,
        learning_rate=learning_rate,
        seed=seed,
        minutes=minutes,
        log=log,
    )
    return made[0].eval().requires_grad_(False), report


def judge_pregates(
    model: nn.Module, gates: PreGates, samples: Sequence[Sample]
) -> dict[str, object]:
    """Recall per token of the decoded part, one layer ahead ("routed+1")."""
    shape = gates.shape
    extra = max(1, shape.top_k // 2)
    meter = RecallMeter(shape.num_layers - 1, shape.num_experts, shape.top_k, extra=extra)
    for sample in samples:
        tokens = torch.from_numpy(tokens_of(sample)[None].astype(np.int64))
        inputs, targets = watch(model, tokens, shape.num_experts, "block")
        own = slice(len(sample.prompt), None)
        layers = range(shape.num_layers - 1)
        logits = torch.stack([gates(layer, inputs[layer, own]) for layer in layers], 1)
        meter.add_tokens(logits.numpy(), targets[1:, own].transpose(0, 1).bool().numpy())
    return {"routed+1": meter.summary()}
