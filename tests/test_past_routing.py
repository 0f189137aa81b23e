"""Predictors that learn from past tokens only, `previous` and `recall`: what they predict."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from moe_offload.predictors.base import ModelFacts
from moe_offload.predictors.previous import PreviousToken
from moe_offload.predictors.recall import Recall


def test_previous_predicts_what_the_last_token_used() -> None:
    class Call:
        batch, length, position = 2, 1, 4

    predictor = PreviousToken()
    predictor.bind(torch.nn.Module(), ModelFacts((4,), 2, 10, ("experts",)))
    assert list(predictor.token_known(Call())) == []
    ids = torch.tensor([[0, 1], [2, 3], [1, 2], [3, 0]])  # two sequences of two tokens
    predictor.layer_routed(0, ids, ids.float())
    (prediction,) = predictor.token_known(Call())
    assert prediction.scores.tolist() == [[0, 0, 0.5, 0.5], [0.5, 0, 0, 0.5]]
    predictor.layer_routed(0, ids[:2], ids.float())
    (prediction,) = predictor.token_known(Call())
    assert prediction.scores.tolist() == [[0.5, 0.5, 0.25, 0.25], [0.25, 0, 0.5, 0.75]]


def test_recall_predicts_what_followed_when_the_routing_was_the_same() -> None:
    class Call:
        batch, length = 1, 1

    predictor = Recall()
    predictor.bind(torch.nn.Module(), ModelFacts((8, 8), 2, 10, ("a", "b")))
    assert list(predictor.token_known(Call())) == []
    text = [[[0, 1], [2, 3]], [[4, 5], [6, 7]], [[2, 6], [0, 4]]]  # three tokens, two layers
    for _ in range(20):
        for token in text:
            for layer, ids in enumerate(token):
                said = predictor.layer_routed(layer, torch.tensor([ids]), torch.ones(1, 2))
    for now, after in ((0, 1), (1, 2)):
        (prediction,) = predictor.layer_routed(0, torch.tensor([text[now][0]]), torch.ones(1, 2))
        assert prediction.layer == 1
        assert sorted(prediction.scores[0].argsort()[-2:].tolist()) == text[now][1]
        assert prediction.scores.max() > 0.5 > np.sort(prediction.scores[0])[-3]
        assert list(predictor.layer_routed(1, torch.tensor([text[now][1]]), torch.ones(1, 2))) == []
        (prediction,) = predictor.token_known(Call())
        assert prediction.layer == 0
        assert sorted(prediction.scores[0].argsort()[-2:].tolist()) == text[after][0]
    assert said == []


def test_recall_joins_the_tokens_of_a_batch() -> None:
    predictor = Recall()
    predictor.bind(torch.nn.Module(), ModelFacts((8, 8), 1, 10, ("a", "b")))
    for _ in range(20):
        for layer, ids in enumerate(([[0], [1], [0]], [[3], [4], [4]])):
            said = predictor.layer_routed(layer, torch.tensor(ids), torch.ones(3, 1))
    (prediction,) = predictor.layer_routed(0, torch.tensor([[0], [1], [0]]), torch.ones(3, 1))
    assert prediction.scores.shape == (3, 8)
    any_token = 1 - np.prod(1 - prediction.scores, axis=0)
    assert (any_token[[3, 4]] > 0.9).all()
    assert said == []
    with pytest.raises(ValueError, match=r"depth must be >= 1, got 0"):
        Recall(depth=0)
