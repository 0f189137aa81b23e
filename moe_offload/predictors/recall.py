"""What was routed after the most similar moments of the past will be routed again.

A memory of the last 4 096 tokens, one bit per expert, is searched for those that resemble the
layers routed so far; the experts the coming layers used then are the prediction. Each sequence of a
batch of up to 32 is recognised by itself. It needs no weights, no training and no hidden states,
and it keeps across prompts what it has seen: the longer a model runs on similar text, the more it
recognises. docs/policies.md has the measurements.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

import numpy as np
from torch import Tensor, nn

from moe_offload import _core
from moe_offload.pager import MAX_ROUTED_TOKENS
from moe_offload.predictors.base import ModelFacts, Prediction, Predictions, Predictor

if TYPE_CHECKING:
    from moe_offload.huggingface.observe import ModelCall


class Recall(Predictor):
    """Scores [R, E] of the next `depth` layers, at each routed layer and before the first.

    One search of the memory per layer and sequence, about 10 us, and one per predicted layer.

    Args:
        depth: how many layers ahead, >= 1.
    """

    name = "recall"

    def __init__(self, depth: int = 1) -> None:
        if depth < 1:
            raise ValueError(f"Recall: depth must be >= 1, got {depth}")
        self.depth = depth
        self.horizon = depth

    def bind(self, model: nn.Module, facts: ModelFacts) -> None:
        self._facts = facts
        self._memory = _core.PathPredictor(list(facts.num_experts))
        self._began = False

    def token_known(self, call: ModelCall) -> Predictions:
        if not self._began or not self.wanted:
            return ()
        return self._predictions(0, call.batch * call.length)

    def layer_routed(self, layer: int, topk_ids: Tensor, topk_weights: Tensor) -> Predictions:
        experts = np.unique(topk_ids.numpy())
        known = (experts >= 0) & (experts < self._facts.num_experts[layer])
        rows, told = len(topk_ids), 1 < len(topk_ids) <= MAX_ROUTED_TOKENS
        routes = topk_ids.reshape(-1).tolist() if told else []
        self._memory.observe(layer, experts[known].tolist(), rows, routes)
        self._began = True
        if not self.wanted:
            return ()
        return self._predictions(layer + 1, rows)

    def _predictions(self, first: int, rows: int) -> Predictions:
        predictions = []
        for layer in range(first, min(first + self.depth, self._facts.num_layers)):
            used = np.array(self._memory.predict(layer), np.float32)  # [E], by any token
            # The driver joins rows as independent tokens: these join to `used` again.
            score = 1 - (1 - used) ** (1 / rows)
            predictions.append(Prediction(layer, np.repeat(score[None], rows, axis=0)))
        return predictions
