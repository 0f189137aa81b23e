"""Predicted routing paths of sequences that are generated together, for the batch scheduler.

One Routing Path Predictor follows all sequences of a window at once, so its state need not move
when sequences change batches; each batch is then told the rows that are its own.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING

import numpy as np
import torch

from moe_offload.predictors.base import Prediction, Predictions, Predictor
from moe_offload.predictors.rpp import RoutingPathPredictor

if TYPE_CHECKING:
    from moe_offload.huggingface.observe import ModelCall


class WindowPaths:
    """The routing path predictor over all sequences of a window.

    Args:
        predictor: trained for the model that generates.
        prompts: token ids of each sequence.
    """

    def __init__(self, predictor: RoutingPathPredictor, prompts: Sequence[Sequence[int]]) -> None:
        length = max(map(len, prompts))
        tokens = torch.zeros((len(prompts), length), dtype=torch.long)
        keep = torch.zeros((len(prompts), length), dtype=torch.bool)
        for row, prompt in enumerate(prompts):
            tokens[row, length - len(prompt) :] = torch.tensor(prompt)
            keep[row, length - len(prompt) :] = True
        self._session = predictor.follow(tokens, keep)

    def step(self, newest: Sequence[int]) -> np.ndarray:
        """[n] tokens just generated -> [n, L, E], the chance that feeding one uses an expert."""
        return self._session.chances(torch.tensor(list(newest)))


class GivenPaths(Predictor):
    """Says what it was given: `rows` [B, L, E] for the coming call, None for no prediction."""

    name = "rpp"

    def __init__(self) -> None:
        self.rows: np.ndarray | None = None

    def token_known(self, call: ModelCall) -> Predictions:
        rows, self.rows = self.rows, None
        if rows is None or len(rows) != call.batch or call.length != 1:
            return ()
        return [Prediction(layer, rows[:, layer]) for layer in range(rows.shape[1])]
