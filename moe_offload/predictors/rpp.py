"""The Routing Path Predictor at work: one decoder step per generated token, all layers at once.

It knows the token before anything is computed, so it alone can name experts of the first layers
and of all layers far ahead; it sees no hidden state, so it is less sure than a look-ahead.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from moe_offload.errors import PredictorError
from moe_offload.predictors.artefact import check_fits, load_weights
from moe_offload.predictors.base import ModelFacts, Prediction, Predictions, Predictor
from moe_offload.predictors.rpp_model import RppConfig, RppModel
from moe_offload.predictors.rpp_session import RppDecoder, RppSession

if TYPE_CHECKING:
    from moe_offload.huggingface.observe import ModelCall


class RoutingPathPredictor(Predictor):
    """Predictions for every layer when the token is known.

    A prompt is read by the encoder; whatever comes as several tokens on top of a cache (chunked
    prompts, further turns) is read again together with what came before.

    Args:
        model: a trained network.
        source: where it came from, for messages.
    """

    name = "rpp"

    def __init__(self, model: RppModel, source: str = "rpp") -> None:
        self.model = model.eval()
        self._decoder = RppDecoder(model)
        self._source = source
        self._session: RppSession | None = None
        self._history: list[Tensor] = []  # [B, T] of each call since position 0
        self._keep: Tensor | None = None
        self._position = 0
        self._lost = 0

    @classmethod
    def from_tensors(
        cls, shape: dict[str, int], tensors: dict[str, Tensor], source: str
    ) -> RoutingPathPredictor:
        """From a file's contents; PredictorError when they do not belong together."""
        try:
            config = RppConfig(**shape)
        except TypeError as error:
            raise PredictorError(f"{source}: its shape is not one of an rpp: {error}") from None
        model = RppModel(config)
        load_weights(model, tensors, source)
        return cls(model, source)

    def bind(self, model: nn.Module, facts: ModelFacts) -> None:
        check_fits(self._source, vars(self.model.config), facts)

    def token_known(self, call: ModelCall) -> Predictions:
        ids = call.input_ids
        begins = call.position == 0
        if ids is None or (not begins and not self._follows(call)):
            self._lost += not begins
            self._session, self._history = None, []
            return ()
        if begins:
            self._history, self._keep = [], _padding(call)
        self._history.append(ids)
        self._position = call.position + call.length
        if call.length > 1 or begins:
            tokens = torch.cat(self._history, 1)
            self._history = [tokens]
            keep = self._keep
            if keep is not None and keep.shape[1] < tokens.shape[1]:
                keep = nn.functional.pad(keep, (0, tokens.shape[1] - keep.shape[1]), value=True)
            self._session = RppSession(self._decoder, tokens, keep)
            return ()
        assert self._session is not None, "a sequence begins with a prompt"
        chances = self._session.chances(ids[:, 0])  # [B, L, E]
        return [Prediction(layer, chances[:, layer]) for layer in range(chances.shape[1])]

    def follow(self, prompts: Tensor, keep: Tensor | None) -> RppSession:
        """A session of its own over prompts [B, P], of which `keep` [B, P] marks the tokens."""
        return RppSession(self._decoder, prompts, keep)

    def _follows(self, call: ModelCall) -> bool:
        """Is this call the continuation of the sequences we have read?"""
        return (
            self._session is not None
            and call.position == self._position
            and call.batch == self._session.batch
        )

    def report(self) -> dict[str, Any]:
        parameters = sum(p.numel() for p in self.model.parameters())
        return {"parameters": parameters, "calls_without_history": self._lost}

    def close(self) -> None:
        self._session, self._history = None, []


def _padding(call: ModelCall) -> Tensor | None:
    """[B, T] bool of a prompt, False for padding; None when there is none."""
    mask = call.attention_mask
    if mask is None or mask.dim() != 2 or mask.shape[1] != call.length or bool(mask.all()):
        return None
    return mask.bool()
