"""Predictors that know nothing, and the text they are asked about."""

from __future__ import annotations

import numpy as np
import tiny_models
import torch
from tiny_models import NUM_EXPERTS, TOP_K, prompt_ids

from moe_offload.predictors.base import ModelFacts, Prediction, Predictions, Predictor
from moe_offload.predictors.preattention import PreAttention
from moe_offload.predictors.pregate import PreGate, PreGates, PreGateShape
from moe_offload.predictors.rpp import RoutingPathPredictor
from moe_offload.predictors.rpp_model import RppConfig, RppModel

NEW_TOKENS = 8


def generate(model, batch: int = 1) -> torch.Tensor:
    with torch.no_grad():
        ids = prompt_ids(batch=batch)
        return model.generate(ids, max_new_tokens=NEW_TOKENS, do_sample=False)


def random_rpp(num_layers: int, **changes: int) -> RoutingPathPredictor:
    torch.manual_seed(0)
    shape = {"vocab_size": tiny_models.VOCAB, "num_layers": num_layers}
    shape |= {"num_experts": NUM_EXPERTS, "top_k": TOP_K}
    model = RppModel(RppConfig(**{**shape, "d_model": 8, "d_ff": 16, "max_decoded": 6, **changes}))
    torch.nn.init.normal_(model.head.weight)
    return RoutingPathPredictor(model)


def random_preattention(num_layers: int, hidden: int = 32) -> PreAttention:
    generator = torch.Generator().manual_seed(0)
    weight = torch.randn(num_layers, 2, NUM_EXPERTS, hidden, generator=generator)
    return PreAttention(weight, torch.zeros(num_layers, 2, NUM_EXPERTS), TOP_K)


def random_pregate(num_layers: int) -> PreGate:
    torch.manual_seed(0)
    gates = PreGates(PreGateShape(num_layers, NUM_EXPERTS, TOP_K, 32, inner_size=4))
    torch.nn.init.normal_(gates.linear)
    return PreGate(gates)


class Everything(Predictor):
    """Names every expert of every layer at every moment: the worst there can be."""

    name = "everything"

    def bind(self, model, facts: ModelFacts) -> None:
        self.facts = facts

    def _all(self, rows: int) -> Predictions:
        return [
            Prediction(layer, np.full((rows, count), 0.99, np.float32))
            for layer, count in enumerate(self.facts.num_experts)
        ]

    def token_known(self, call):
        return self._all(call.batch * call.length)

    def layer_input_known(self, layer, hidden):
        return self._all(hidden.shape[0] * hidden.shape[1])[layer:]

    def layer_routed(self, layer, topk_ids, topk_weights):
        return self._all(len(topk_ids))[layer + 1 :]
