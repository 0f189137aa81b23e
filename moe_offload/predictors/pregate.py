"""Pre-gates: a small trained gate per layer that names the next layer's experts.

Pre-gated MoE (arXiv 2308.12066) lets the gate of block l choose the experts of block l + 1, so
their copies run while block l computes. Here a pre-gate reads what layer l's router reads and only
predicts: the model's own router decides, and what was not foreseen is fetched on demand, so tokens
are the model's. `lossy_pregated.py` is the paper's way, which executes the prediction.

As in the paper everything a pre-gate names is fetched, without weighing chances.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor, nn
from torch.nn import functional as F

from moe_offload import _core
from moe_offload.errors import PredictorError
from moe_offload.predictors.artefact import check_fits, load_weights
from moe_offload.predictors.base import ModelFacts, Prediction, Predictions, Predictor
from moe_offload.predictors.preattention import INPUT_EPS
from moe_offload.predictors.routers import margins


@dataclass(frozen=True)
class PreGateShape:
    """What the gates fit: L MoE layers, E experts each, A of them per token, hidden size H.

    `inner_size` is M, the width of a gate's hidden layer.
    """

    num_layers: int
    num_experts: int
    top_k: int
    hidden_size: int
    inner_size: int = 64


class PreGates(nn.Module):
    """L - 1 gates; gate l maps the input of MoE block l to logits over the experts of l + 1.

    linear(x) + down(silu(up(x))) with x scaled to unit root mean square.
    Cost per layer and token: 2 (H E + H M + M E) FLOPs.
    """

    def __init__(self, shape: PreGateShape) -> None:
        super().__init__()
        self.shape = shape
        gates, hidden, inner = shape.num_layers - 1, shape.hidden_size, shape.inner_size
        self.linear = nn.Parameter(torch.zeros(gates, shape.num_experts, hidden))
        self.bias = nn.Parameter(torch.zeros(gates, shape.num_experts))
        self.up = nn.Parameter(torch.randn(gates, inner, hidden) * hidden**-0.5)
        self.up_bias = nn.Parameter(torch.zeros(gates, inner))
        self.down = nn.Parameter(torch.zeros(gates, shape.num_experts, inner))

    def forward(self, layer: int, hidden: Tensor) -> Tensor:
        """Input of MoE block `layer` [..., H] -> logits [R, E] float32 of layer + 1."""
        x = hidden.reshape(-1, hidden.shape[-1]).to(self.linear.device).float()
        x = x * (x.square().mean(-1, keepdim=True) + INPUT_EPS).rsqrt()
        inner = F.silu(F.linear(x, self.up[layer], self.up_bias[layer]))
        return F.linear(x, self.linear[layer], self.bias[layer]) + F.linear(inner, self.down[layer])


class _LiveGate:
    """One gate in numpy: for a single token the calls cost more than the arithmetic, and torch's
    calls cost more than numpy's."""

    def __init__(self, gates: PreGates, layer: int) -> None:
        first = torch.cat([gates.linear[layer], gates.up[layer]])  # [E + M, H]
        bias = torch.cat([gates.bias[layer], gates.up_bias[layer]])
        self._first = np.ascontiguousarray(first.T.numpy())
        self._bias = bias.numpy()
        self._down = np.ascontiguousarray(gates.down[layer].T.numpy())  # [M, E]

    def __call__(self, hidden: Tensor) -> np.ndarray:
        width = hidden.shape[-1]
        x = hidden.detach().float().cpu().numpy().reshape(-1, width)
        power = np.einsum("rh,rh->r", x, x) / width + INPUT_EPS
        both = _core.dense(x, self._first) * (power**-0.5)[:, None] + self._bias
        logits, inner = np.split(both, [self._down.shape[1]], axis=1)
        inner = inner / (1 + np.exp(np.minimum(-inner, 80)))
        found: np.ndarray = logits + _core.dense(inner, self._down)
        return found


class PreGate(Predictor):
    """Names, for each token, the A experts that the gate of layer l likes best in layer l + 1.

    Args:
        gates: trained ones.
        source: where they came from, for messages.
    """

    name = "pregate"
    obeyed = True

    def __init__(self, gates: PreGates, source: str = "pregate") -> None:
        self.gates = gates.eval().requires_grad_(False)
        self._source = source
        self._live = [_LiveGate(self.gates, i) for i in range(gates.shape.num_layers - 1)]
        self._input: Tensor | None = None

    @classmethod
    def from_tensors(
        cls, shape: dict[str, int], tensors: dict[str, Tensor], source: str
    ) -> PreGate:
        """From a file's contents; PredictorError when they do not belong together."""
        try:
            gates = PreGates(PreGateShape(**shape))
        except (TypeError, RuntimeError) as error:
            raise PredictorError(f"{source}: its shape is not one of pre-gates: {error}") from None
        load_weights(gates, tensors, source)
        return cls(gates, source)

    def bind(self, model: nn.Module, facts: ModelFacts) -> None:
        check_fits(self._source, vars(self.gates.shape), facts)

    def block_input_known(self, layer: int, hidden: Tensor) -> None:
        self._check_width(hidden)
        has_next = layer + 1 < self.gates.shape.num_layers
        self._input = hidden if self.wanted and has_next else None

    def layer_routed(self, layer: int, topk_ids: Tensor, topk_weights: Tensor) -> Predictions:
        hidden, self._input = self._input, None
        if hidden is None:
            return ()
        return self._named(layer, self._live[layer](hidden), topk_ids)

    def _named(self, layer: int, logits: np.ndarray, topk_ids: Tensor) -> Predictions:
        top_k = topk_ids.shape[1]
        everybody = top_k >= logits.shape[1]
        scores = np.ones_like(logits) if everybody else margins(logits, top_k)
        muted = (topk_ids >= self.gates.shape.num_experts).all(-1).cpu().numpy()
        scores[muted] = 0.0  # finished sequences and padding use nobody
        return [Prediction(layer + 1, scores)]

    def _check_width(self, hidden: Tensor) -> None:
        width = self.gates.shape.hidden_size
        if hidden.shape[-1] != width:
            raise PredictorError(
                f"{self._source} was trained for hidden size {width}, this model has "
                f"{hidden.shape[-1]}. Train one for this model with `moe-offload train-predictor "
                "pregate`."
            )

    def close(self) -> None:
        self._input = None
