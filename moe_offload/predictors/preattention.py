"""A linear head per layer on the layer's input, before its attention (arXiv 2511.10676).

While attention runs, the copies of this layer's experts start. The head also names experts of the
next layer (`reach` 2), which is earlier than its router could be asked.
"""

from __future__ import annotations

import numpy as np
import torch
from torch import Tensor, nn

from moe_offload import _core
from moe_offload.errors import PredictorError
from moe_offload.predictors.artefact import check_fits
from moe_offload.predictors.base import ModelFacts, Prediction, Predictions, Predictor

INPUT_EPS = 1e-6
SHAPE = ("num_layers", "num_experts", "top_k", "hidden_size", "reach")


class PreAttention(Predictor):
    """Predicts layers l to l + reach - 1 from the input of layer l.

    Args:
        weight: [L, reach, E, H] float32, applied to the input scaled to unit root mean square.
        bias: [L, reach, E].
        top_k: A of the model it was trained for.
        source: where it came from, for messages.

    Cost per layer: 2 x R x H x E x reach FLOPs, one matrix product.
    """

    name = "preattention"

    def __init__(
        self, weight: Tensor, bias: Tensor, top_k: int, source: str = "preattention"
    ) -> None:
        layers, reach, experts, hidden = weight.shape
        self.shape = dict(zip(SHAPE, (layers, experts, top_k, hidden, reach), strict=True))
        self._source = source
        flat = weight.reshape(layers, reach * experts, hidden).transpose(1, 2)
        self._weight = np.ascontiguousarray(flat.float().numpy())  # [L, H, reach * E]
        self._bias = bias.reshape(layers, reach * experts).float().numpy()

    @classmethod
    def from_tensors(
        cls, shape: dict[str, int], tensors: dict[str, Tensor], source: str
    ) -> PreAttention:
        """From a file's contents; PredictorError when they do not belong together."""
        if set(shape) != set(SHAPE) or set(tensors) != {"weight", "bias"}:
            raise PredictorError(
                f"{source}: expected tensors weight and bias and the shape {', '.join(SHAPE)}, got "
                f"{sorted(tensors)} and {sorted(shape)}"
            )
        expected = (shape["num_layers"], shape["reach"], shape["num_experts"])
        weight, bias = tensors["weight"], tensors["bias"]
        if tuple(weight.shape) != (*expected, shape["hidden_size"]) or bias.shape != expected:
            raise PredictorError(
                f"{source}: weight must be {(*expected, shape['hidden_size'])}, got "
                f"{tuple(weight.shape)}; the file is damaged"
            )
        return cls(weight, bias, shape["top_k"], source)

    def bind(self, model: nn.Module, facts: ModelFacts) -> None:
        check_fits(self._source, self.shape, facts)
        self._num_layers = facts.num_layers

    def layer_input_known(self, layer: int, hidden: Tensor) -> Predictions:
        if not self.wanted:
            return ()
        width = self.shape["hidden_size"]
        if hidden.shape[-1] != width:
            raise PredictorError(
                f"{self._source} was trained for hidden size {width}, this model has "
                f"{hidden.shape[-1]}. Train one for this model."
            )
        with torch.no_grad():
            x = hidden.float().numpy().reshape(-1, width)
        power = np.einsum("rh,rh->r", x, x) / width + INPUT_EPS
        logits = _core.dense(x, self._weight[layer]) * (power**-0.5)[:, None] + self._bias[layer]
        scores = 1 / (1 + np.exp(np.minimum(-logits, 80)))  # [R, reach * E]
        experts = self.shape["num_experts"]
        return [
            Prediction(layer + ahead, scores[:, ahead * experts : (ahead + 1) * experts])
            for ahead in range(min(self.shape["reach"], self._num_layers - layer))
        ]
