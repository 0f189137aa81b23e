"""A predictor that knows: the routing of the same run, recorded before.

The bound on what any predictor of that reach can bring. It replays calls in order and is silent
as soon as the tokens differ from the recorded ones.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING

import numpy as np
import torch
from torch import Tensor, nn

from moe_offload.errors import PredictorError
from moe_offload.huggingface.observe import Observer
from moe_offload.predictors.base import ModelFacts, Prediction, Predictions, Predictor

if TYPE_CHECKING:
    from moe_offload.huggingface.observe import ModelCall


@dataclass
class RecordedCall:
    """One model call: its tokens [B, T], and per MoE layer the chosen experts [R, A]."""

    input_ids: np.ndarray | None
    experts: dict[int, np.ndarray] = field(default_factory=dict)


class CallRecorder(Observer):
    """Records calls for an `Oracle`: `with observe(model, recorder): model.generate(...)`."""

    def __init__(self) -> None:
        self.calls: list[RecordedCall] = []

    def call_begins(self, call: ModelCall) -> None:
        ids = None if call.input_ids is None else call.input_ids.numpy().copy()
        self.calls.append(RecordedCall(ids))

    def layer_routed(self, layer: int, topk_ids: Tensor, topk_weights: Tensor) -> None:
        self.calls[-1].experts[layer] = topk_ids.to(torch.int64).numpy().copy()


class Oracle(Predictor):
    """Perfect advice, `depth` layers ahead.

    Args:
        calls: from a `CallRecorder`, in the order the same calls will come again.
        depth: layers known beyond the one just routed, at least 1.

    Raises:
        PredictorError: nothing was recorded.
    """

    name = "oracle"

    def __init__(self, calls: Sequence[RecordedCall], depth: int = 1) -> None:
        if not calls:
            raise PredictorError("oracle: the recording is empty; record a run of the model first")
        if depth < 1:
            raise PredictorError(f"oracle: depth must be at least 1, got {depth}")
        self._calls, self._depth = calls, depth
        self._next = 0
        self._now: RecordedCall | None = None
        self._off_path = 0

    def bind(self, model: nn.Module, facts: ModelFacts) -> None:
        layers = max((max(call.experts, default=-1) for call in self._calls), default=-1) + 1
        if layers > facts.num_layers:
            raise PredictorError(
                f"oracle: the recording has {layers} MoE layers, this model {facts.num_layers}"
            )
        self._facts = facts

    def rewind(self) -> None:
        """Begin again at the first recorded call."""
        self._next = 0

    def token_known(self, call: ModelCall) -> Predictions:
        self._now = None
        if self._next < len(self._calls):
            recorded = self._calls[self._next]
            same = (
                recorded.input_ids is None
                if call.input_ids is None
                else recorded.input_ids is not None
                and np.array_equal(recorded.input_ids, call.input_ids.numpy())
            )
            if same:
                self._now = recorded
                self._next += 1
        if self._now is None:
            self._off_path += 1
        return self._ahead(-1)

    def layer_routed(self, layer: int, topk_ids: Tensor, topk_weights: Tensor) -> Predictions:
        return self._ahead(layer)

    def report(self) -> dict[str, int]:
        return {"calls_off_the_recorded_path": self._off_path}

    def _ahead(self, layer: int) -> Predictions:
        if self._now is None:
            return ()
        found = []
        for ahead in range(layer + 1, min(layer + 1 + self._depth, self._facts.num_layers)):
            ids = self._now.experts.get(ahead)
            if ids is not None:
                scores = np.zeros((len(ids), self._facts.num_experts[ahead]), np.float32)
                np.put_along_axis(scores, ids, 1.0, axis=-1)
                found.append(Prediction(ahead, scores))
        return found
