"""Gate look-ahead: routers asked before their turn, about the present hidden state.

Training-free. A residual stream changes little from layer to layer, so the router of layer l + d,
applied to the stream before layer l's experts were added, already points at most of what layer
l + d will use (Eliseev & Mazur, arXiv 2312.17238; Speculating Experts, arXiv 2603.19289). The
state goes through the norm of layer l + d, not of layer l.

`OwnLookahead` asks a layer's own router before the layer's attention: the state lacks what that
attention adds and nothing else, and the disk, which has read the layer before, is idle then.
"""

from __future__ import annotations

import warnings
from typing import Any

import torch
from torch import Tensor, nn

from moe_offload.errors import PredictorError
from moe_offload.huggingface.observe import routed_layers
from moe_offload.predictors.base import ModelFacts, Prediction, Predictions, Predictor
from moe_offload.predictors.routers import RouterProbe


class GateLookahead(Predictor):
    """Predicts layers l + 1 to l + depth when layer l was routed.

    Args:
        depth: 1 to 3 layers.

    Raises:
        PredictorError: another depth; or, from `bind`, a layer without a recognisable router.
    """

    name = "lookahead"

    def __init__(self, depth: int = 1) -> None:
        if isinstance(depth, bool) or depth not in (1, 2, 3):
            raise PredictorError(f"lookahead: depth must be 1, 2 or 3, got {depth!r}")
        self.depth = depth
        self._probes: list[RouterProbe] = []
        self._warned = False
        self._top_k = 0  # A, known from the first call on

    def bind(self, model: nn.Module, facts: ModelFacts) -> None:
        try:
            for layer, num_experts in zip(routed_layers(model), facts.num_experts, strict=True):
                self._probes.append(RouterProbe(layer, num_experts))
        except BaseException:
            self.close()
            raise

    def layer_routed(self, layer: int, topk_ids: Tensor, topk_weights: Tensor) -> Predictions:
        self._top_k = topk_ids.shape[1]
        with torch.no_grad():
            here = self._probes[layer]
            if not here.ready:
                here.routed(topk_ids)
                self._warn(here)
            state, before_norm = here.state
            here.forget()
            if state is None or here.refused is not None or not self.wanted:
                return ()
            found = []
            for ahead in range(layer + 1, min(layer + 1 + self.depth, len(self._probes))):
                probe = self._probes[ahead]
                if probe.ready:
                    scores = probe.ask(state, before_norm, topk_ids.shape[1])
                    self._warn(probe)
                    if scores is not None:
                        found.append(Prediction(ahead, scores))
            return found

    def _warn(self, probe: RouterProbe) -> None:
        if probe.refused is not None and not self._warned:
            self._warned = True
            warnings.warn(
                f"lookahead: no predictions for {probe.refused}. Tokens are unaffected; "
                'predictor="none" or "previous" avoids this message.',
                stacklevel=2,
            )

    def report(self) -> dict[str, Any]:
        refused = [probe.refused for probe in self._probes if probe.refused is not None]
        through_norm = sum(probe.norm is not None for probe in self._probes)
        return {"depth": self.depth, "refused": refused, "layers_through_norm": through_norm}

    def close(self) -> None:
        for probe in self._probes:
            probe.close()
        self._probes = []


class OwnLookahead(GateLookahead):
    """Predicts layer l from its own input, before its attention."""

    name = "lookahead-0"

    def __init__(self) -> None:
        super().__init__()
        self.depth = 0

    def layer_routed(self, layer: int, topk_ids: Tensor, topk_weights: Tensor) -> Predictions:
        predictions = super().layer_routed(layer, topk_ids, topk_weights)
        self._probes[layer].stop_watching()  # two hooks less for each layer of each token
        return predictions

    def layer_input_known(self, layer: int, hidden: Tensor) -> Predictions:
        probe = self._probes[layer]
        if not (probe.ready and self.wanted and self._top_k):
            return ()
        if hidden.dim() > 3 or hidden.shape[-1] != probe.width:
            probe.ready = False  # hyper-connections: several streams, mixed inside the layer
            probe.refused = (
                f"{probe.name}: its layer's input, {tuple(hidden.shape)}, is more than one state "
                f"[{probe.width}] per token, which is what its router sees"
            )
            self._warn(probe)
            return ()
        with torch.no_grad():
            scores = probe.ask(hidden, True, self._top_k)
        self._warn(probe)
        return () if scores is None else (Prediction(layer, scores),)
