"""SE-MoE's ring (arXiv 2205.10034): whole layers arrive in turn, whatever the routing.

When a layer has been routed, the next layers' experts are named in order, all of them, and behind
the last layer the first ones of the next call. With the policy "layer-ring", which lets layers go
in the order they were computed, the slots become the ring: as many pages ahead as there are slots.
"""

from __future__ import annotations

import numpy as np
from torch import Tensor, nn

from moe_offload.predictors.base import ModelFacts, Prediction, Predictions, Predictor


class LayerRing(Predictor):
    """Names every expert of every layer, nearest layer first."""

    name = "ring"
    obeyed = True
    scored = False

    def bind(self, model: nn.Module, facts: ModelFacts) -> None:
        self._all = [np.ones((1, count), np.float32) for count in facts.num_experts]

    def layer_routed(self, layer: int, topk_ids: Tensor, topk_weights: Tensor) -> Predictions:
        count = len(self._all)
        order = [(layer + ahead) % count for ahead in range(1, count)]
        return [Prediction(other, self._all[other]) for other in order]
