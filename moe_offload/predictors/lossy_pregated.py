"""LOSSY: executes the experts that the pre-gates named, instead of the router's choice.

This is what Pre-gated MoE (arXiv 2308.12066) does: the gate of block l *is* the router of block
l + 1. So from the second MoE layer on nothing is fetched in vain, and the model computes something
else: tokens change. Everything else in this package is exact; this runs only under its own name,
and `stats()["lossy"]` says that it does.

Layer l + 1 gets the A experts its pre-gate likes best, weighted by the softmax of their logits,
scaled to the sum of the weights its router gave (1 for most families). The first MoE layer keeps
its router. `bench/tiny_moe/lossy_pregated.py` fine-tunes gates for this.
"""

from __future__ import annotations

import inspect
import threading
from typing import Any

import torch
from torch import Tensor, nn

from moe_offload.huggingface.observe import RoutedLayer, routed_layers
from moe_offload.predictors.base import ModelFacts, Predictions, Predictor
from moe_offload.predictors.pregate import PreGate


def execute(logits: Tensor, topk_ids: Tensor, topk_weights: Tensor) -> tuple[Tensor, Tensor]:
    """What a pre-gate makes of a router's choice.

    Args:
        logits: [T, E] of the pre-gate. topk_ids, topk_weights: [T, A] of the router.

    Returns:
        ids [T, A] and weights [T, A] in the router's dtypes.
    """
    top = logits.to(topk_ids.device).topk(topk_ids.shape[1])
    weights = top.values.softmax(-1) * topk_weights.float().sum(-1, keepdim=True)
    return top.indices.to(topk_ids.dtype), weights.to(topk_weights.dtype)


class LossyPregated(PreGate):
    """Pre-gates that decide.

    Binding hooks the MoE blocks (to ask the gates) and the experts (to replace what they are
    given), before every observer, so traces and counters hold what was executed.
    """

    name = "lossy_pregated"
    lossy = True
    _handles: list[Any] = []  # noqa: RUF012  (before bind; bind makes its own)
    block_input_known = Predictor.block_input_known  # its own hook asks the gates

    def bind(self, model: nn.Module, facts: ModelFacts) -> None:
        super().bind(model, facts)
        self._ahead = threading.local()  # .logits: by layer, of the call this thread is in
        self._handles = []
        for index, layer in enumerate(routed_layers(model)):
            hooks = [(layer.block, self._look_ahead(index))] if index + 1 < facts.num_layers else []
            if index > 0:
                hooks.append((layer.experts, self._replace(index, layer)))
            for module, hook in hooks:
                handle = module.register_forward_pre_hook(hook, prepend=True, with_kwargs=True)
                self._handles.append(handle)

    def _logits(self) -> dict[int, Tensor]:
        found: dict[int, Tensor] = vars(self._ahead).setdefault("logits", {})
        return found

    def _look_ahead(self, index: int) -> Any:
        def hook(module: nn.Module, args: tuple, kwargs: dict[str, Any]) -> None:
            hidden = args[0] if args else next(iter(kwargs.values()))
            self._check_width(hidden)
            with torch.no_grad():
                self._logits()[index + 1] = self.gates(index, hidden)

        return hook

    def _replace(self, index: int, layer: RoutedLayer) -> Any:
        original = getattr(type(layer.experts), "_moe_offload_original", type(layer.experts))
        names = list(inspect.signature(original.forward).parameters)[1:]

        def hook(module: nn.Module, args: tuple, kwargs: dict[str, Any]) -> Any:
            hidden, ids, weights = [*args, *(kwargs[name] for name in names[len(args) :])]
            return (hidden, *execute(self._logits().pop(index), ids, weights)), {}

        return hook

    def layer_routed(self, layer: int, topk_ids: Tensor, topk_weights: Tensor) -> Predictions:
        logits = self._logits().get(layer + 1)
        if logits is None or not self.wanted:
            return ()
        return self._named(layer, logits.cpu().numpy(), topk_ids)

    def report(self) -> dict[str, Any]:
        return {"gates": self._source, "changes_tokens": True}

    def close(self) -> None:
        super().close()
        for handle in self._handles:
            handle.remove()
        self._handles = []
