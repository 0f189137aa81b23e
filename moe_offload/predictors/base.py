"""What a predictor is: three moments at which it may speak, and what it says.

A predictor only ever names pages that may be needed. What it says starts copies and never changes
a result (but for the one that is called lossy), so it may be wrong, late or silent. It sees a
model call in this order:

    token known          the call's token ids, before anything is computed
      layer input known  for each MoE layer: the input of its decoder layer, before attention
      layer routed       for each MoE layer: what its router chose, after its misses were requested

Layers count MoE layers only, from 0, as the offloader does.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, NamedTuple

import numpy as np
from torch import Tensor, nn

from moe_offload.errors import PredictorError

if TYPE_CHECKING:
    from moe_offload.huggingface.observe import ModelCall


class Prediction(NamedTuple):
    """How likely each expert of one layer is to be used by each token of the present call.

    Attributes:
        layer: the MoE layer.
        scores: [R, E] float32 in [0, 1], R = B x T tokens. Only their order has to be right:
            the driver learns what a score is worth while it runs.
    """

    layer: int
    scores: np.ndarray


Predictions = Sequence[Prediction]


@dataclass(frozen=True)
class ModelFacts:
    """What a predictor has to fit.

    Attributes:
        num_experts: E of each MoE layer.
        top_k: A, experts per token, or None where the configuration does not say.
        vocab_size: V, or None.
        layer_names: qualified name of each experts module, for messages.
    """

    num_experts: tuple[int, ...]
    top_k: int | None
    vocab_size: int | None
    layer_names: tuple[str, ...]

    @property
    def num_layers(self) -> int:
        return len(self.num_experts)


class Predictor:
    """Override the moments you need; the others cost nothing.

    Attributes:
        name: how stats and tables call it.
        horizon: predictions given when the token is known cover many layers; the copies of a
            layer start when the layer `horizon` before it is routed.
        obeyed: every page with a score of at least 1/2 is fetched, in the order of naming, until
            no slot is left: no weighing of chances, and layers that come before the present one
            are those of the next call. For published systems that move pages by a fixed plan.
        lossy: it changes which experts are executed, so tokens change; see lossy_pregated.py.
        scored: its predictions are guesses about tokens, so their recall is of interest.
        wanted: set by the driver; False during calls of many tokens, whose predictions it does not
            use (a prompt needs nearly every expert and has a path of its own).
    """

    name = "predictor"
    horizon = 2
    obeyed = False
    lossy = False
    scored = True
    wanted = True

    def bind(self, model: nn.Module, facts: ModelFacts) -> None:
        """Called once, before the first call of `model`. Do not keep a reference to `model`.

        Raises:
            PredictorError: it cannot work for this model; says why and what to do.
        """

    def token_known(self, call: ModelCall) -> Predictions:
        """The token ids of the coming call are known: predictions for any layers."""
        return ()

    def layer_input_known(self, layer: int, hidden: Tensor) -> Predictions:
        """Input of a decoder layer, [B, T, H], before its attention."""
        return ()

    def block_input_known(self, layer: int, hidden: Tensor) -> None:
        """Input of an MoE block, which its router sees, [B, T, H]. Only to be remembered: what a
        predictor makes of it, it says in `layer_routed`, behind the layer's own misses."""

    def layer_routed(self, layer: int, topk_ids: Tensor, topk_weights: Tensor) -> Predictions:
        """A layer was routed, ids [R, A], and its own copies are under way."""
        return ()

    def report(self) -> dict[str, Any]:
        """Further entries for `stats()["predictor"]`, JSON-ready."""
        return {}

    def close(self) -> None:
        """Take down what `bind` put up. Idempotent."""


def facts_of(model: nn.Module, num_experts: Sequence[int], names: Sequence[str]) -> ModelFacts:
    """The facts of a transformers model, from its configuration where that has them."""
    config: Any = getattr(model, "config", None)
    if hasattr(config, "get_text_config"):
        config = config.get_text_config()
    top_k = None
    for name in ("num_experts_per_tok", "num_experts_per_token", "moe_topk", "top_k_experts"):
        value = getattr(config, name, None)
        if isinstance(value, int) and value > 0:
            top_k = value
            break
    vocab = getattr(config, "vocab_size", None)
    return ModelFacts(
        tuple(num_experts), top_k, vocab if isinstance(vocab, int) else None, tuple(names)
    )


def same_experts(who: str, facts: ModelFacts) -> int:
    """E, for predictors that need it to be one number for all layers."""
    sizes = set(facts.num_experts)
    if len(sizes) != 1:
        raise PredictorError(
            f"{who}: expected the same number of experts in every layer, got {sorted(sizes)}. "
            'Use predictor="lookahead" or "previous" for this model.'
        )
    return sizes.pop()
