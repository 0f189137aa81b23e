"""The previous token's routing, the simplest predictor there is: what was used will be used.

ExpertFlow calls it TLP and finds it weak; a cache already holds those pages, so what it can add
is protection and the pages used a little longer ago. Scores halve per token since the last use.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

import numpy as np
from torch import Tensor, nn

from moe_offload.predictors.base import ModelFacts, Prediction, Predictions, Predictor

if TYPE_CHECKING:
    from moe_offload.huggingface.observe import ModelCall


class PreviousToken(Predictor):
    """Scores [B, E] per layer: 0.5 per expert of the previous token, 0.25 of the one before, ..."""

    name = "previous"

    def bind(self, model: nn.Module, facts: ModelFacts) -> None:
        self._facts = facts
        self._batch = 0
        self._scores: dict[int, np.ndarray] = {}

    def token_known(self, call: ModelCall) -> Predictions:
        if call.position == 0 or call.batch != self._batch:  # other sequences: nothing is known
            self._batch = call.batch
            self._scores.clear()
        if call.length != 1:
            return ()
        return [Prediction(layer, scores) for layer, scores in self._scores.items()]

    def layer_routed(self, layer: int, topk_ids: Tensor, topk_weights: Tensor) -> Predictions:
        num_experts = self._facts.num_experts[layer]
        batch = self._batch
        if batch < 1 or len(topk_ids) % batch:
            return ()
        last = topk_ids.view(batch, -1, topk_ids.shape[-1])[:, -1].numpy()  # [B, A]
        used = np.zeros((batch, num_experts), np.float32)
        rows = np.arange(batch)[:, None]
        known = (last >= 0) & (last < num_experts)
        used[np.broadcast_to(rows, last.shape)[known], last[known]] = 1.0
        before = self._scores.get(layer)
        self._scores[layer] = used * 0.5 if before is None else 0.5 * (before + used)
        return ()
