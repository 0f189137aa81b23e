"""Training on what a model's layers see: the model reads sequences again, somebody watches.

Layer inputs are large and easily made again, so no trace holds them: the tokens of recorded
sequences are fed to the model, and each layer's input and choice are seen as they happen. The
pre-attention heads and the pre-gates differ in which input they see, and in their loss.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator, Sequence
from typing import Any, Literal

import numpy as np
import torch
from torch import Tensor, nn

from moe_offload.errors import PredictorError
from moe_offload.huggingface.observe import Observer, observe
from moe_offload.predictors.preattention import INPUT_EPS
from moe_offload.predictors.rpp_training import TOO_SHORT, Sample, TrainingReport, cosine, paced

Moment = Literal["layer", "block"]  # before attention; what the router sees
_INNER_STEPS = 4  # optimiser steps per forward of the model, on disjoint rows of it


class _Watcher(Observer):
    """Scaled inputs [R, H] and chosen experts [R, A] of the latest call, per layer."""

    def __init__(self) -> None:
        self.inputs: dict[int, Tensor] = {}
        self.ids: dict[int, Tensor] = {}

    def keep(self, layer: int, hidden: Tensor) -> None:
        x = hidden.detach().float().reshape(-1, hidden.shape[-1])
        self.inputs[layer] = x * (x.square().mean(-1, keepdim=True) + INPUT_EPS).rsqrt()

    def layer_routed(self, layer: int, topk_ids: Tensor, topk_weights: Tensor) -> None:
        self.ids[layer] = topk_ids.detach()


class _LayerInputs(_Watcher):
    layer_begins = _Watcher.keep


class _BlockInputs(_Watcher):
    block_begins = _Watcher.keep


def watch(
    model: nn.Module, tokens: Tensor, num_experts: int, moment: Moment
) -> tuple[Tensor, Tensor]:
    """Feed tokens [B, T] to the model.

    Returns:
        inputs [L, R, H] scaled to unit root mean square, and targets [L, R, E]: 1 where chosen.
    """
    watcher = _LayerInputs() if moment == "layer" else _BlockInputs()
    with torch.no_grad(), observe(model, watcher):
        model(tokens, use_cache=False)
    layers = range(len(watcher.ids))
    targets = torch.zeros(len(watcher.ids), watcher.ids[0].shape[0], num_experts)
    for layer in layers:
        targets[layer].scatter_(1, watcher.ids[layer].long(), 1.0)
    return torch.stack([watcher.inputs[layer] for layer in layers]), targets


def train_on_layers(
    model: nn.Module,
    samples: Sequence[Sample],
    num_experts: int,
    moment: Moment,
    make: Callable[[Tensor, Tensor], Sequence[Tensor]],
    loss_of: Callable[[Tensor, Tensor], Tensor],
    *,
    steps: int,
    batch: int,
    learning_rate: float = 3e-3,
    seed: int = 0,
    minutes: float | None = None,
    log: Callable[[str], None] = lambda line: None,
) -> TrainingReport:
    """Fit parameters to what the layers of a model see and choose.

    Args:
        model: the MoE model, resident or offloaded.
        samples: sequences; only their tokens are used.
        num_experts: E of every layer.
        moment: which input of a layer is seen.
        make: called with the first inputs and targets; returns the parameters to fit.
        loss_of: a scalar from inputs [L, r, H] and targets [L, r, E] of some rows.
        steps: forwards of the model, at most; `minutes` may end the run first.
        batch: sequences per forward.

    Raises:
        PredictorError: no samples, or not enough time for one step.
    """
    if not samples:
        raise PredictorError("train-predictor: no sequence with routing to learn from")
    torch.manual_seed(seed)
    start, seen, smoothed, done = time.monotonic(), 0, 0.0, 0
    source = _token_batches(samples, batch, seed)
    optimiser: Any = None
    for step, progress in paced(steps, minutes):
        inputs, targets = watch(model, next(source), num_experts, moment)
        if optimiser is None:
            parameters = make(inputs, targets)
            optimiser = torch.optim.AdamW(parameters, lr=learning_rate, weight_decay=1e-3)
        optimiser.param_groups[0]["lr"] = learning_rate * cosine(progress)
        for part in torch.randperm(inputs.shape[1]).chunk(_INNER_STEPS):
            loss = loss_of(inputs[:, part], targets[:, part])
            optimiser.zero_grad(set_to_none=True)
            loss.backward()
            optimiser.step()
        seen += inputs.shape[1]
        done = step
        smoothed = loss.item() if step == 1 else 0.95 * smoothed + 0.05 * loss.item()
        if step == 1 or step % 20 == 0:
            log(f"step {step} loss {smoothed:.4f} tokens {seen} {time.monotonic() - start:.0f} s")
    if optimiser is None:
        raise PredictorError(TOO_SHORT)
    return TrainingReport(
        steps=done,
        seconds=time.monotonic() - start,
        tokens_seen=seen,
        train_sequences=len(samples),
        train_tokens=sum(len(s.prompt) + len(s.decoded) for s in samples),
        loss=smoothed,
        held_out={},
    )


def tokens_of(sample: Sample) -> np.ndarray:
    """[P + N] ids of a sequence."""
    return np.concatenate([sample.prompt, sample.decoded])


def _token_batches(samples: Sequence[Sample], batch: int, seed: int) -> Iterator[Tensor]:
    """Endless [B, T] batches of sequences of like length, cut to the shortest: no padding."""
    rng = np.random.default_rng(seed)
    tokens = sorted((tokens_of(sample) for sample in samples), key=len)
    groups = [tokens[i : i + batch] for i in range(0, len(tokens), batch)]
    while True:
        for index in rng.permutation(len(groups)):
            group = groups[index]
            rows = np.stack([row[: len(group[0])] for row in group])
            yield torch.from_numpy(rows.astype(np.int64))
