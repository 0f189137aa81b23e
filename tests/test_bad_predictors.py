"""A predictor that does not fit is refused with its reason, and the model is left as it was."""

from __future__ import annotations

import pytest

pytest.importorskip("transformers")

from predictor_cases import generate, random_preattention, random_rpp
from tiny_models import tiny_model

import moe_offload
from moe_offload.errors import PredictorError
from moe_offload.predictors import make_predictor
from moe_offload.predictors.oracle import Oracle


@pytest.mark.parametrize(
    ("spec", "message"),
    [
        ("lookback", "expected one of none, auto, previous, recall, lookahead"),
        (3, "got 3"),
        ("tests", "there is no file tests/predictor.safetensors"),
        ("setup.py", "setup.py is not a safetensors file"),
    ],
)
def test_a_predictor_that_is_none_is_refused(spec: object, message: str) -> None:
    model = tiny_model("mixtral")
    with pytest.raises(PredictorError, match=message):
        moe_offload.offload(model, predictor=spec)
    generate(model)  # untouched


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: random_rpp(3), r"num_layers 3 \(this model: 2\)"),
        (lambda: random_rpp(2, num_experts=16), r"num_experts 16 \(this model: 8\)"),
        (lambda: random_rpp(2, vocab_size=99), r"vocab_size 99 \(this model: 128\)"),
        (lambda: random_rpp(2, top_k=1), r"top_k 1 \(this model: 2\)"),
        (lambda: random_preattention(5), r"num_layers 5 \(this model: 2\)"),
        (lambda: Oracle([]), "the recording is empty"),
        (lambda: make_predictor("lookahead-4"), "expected one of none"),
        (lambda: random_rpp(2, d_ff=0), "d_ff must be a whole number >= 1, got 0"),
    ],
)
def test_a_predictor_of_another_model_is_refused(make, message: str) -> None:
    model = tiny_model("mixtral")
    with pytest.raises(PredictorError, match=message):
        moe_offload.offload(model, predictor=make())
    assert not model.model.layers[0]._forward_pre_hooks
    generate(model)


def test_a_head_of_another_hidden_size_is_refused_at_its_first_use() -> None:
    model = tiny_model("mixtral")
    with (
        moe_offload.offload(model, predictor=random_preattention(2, hidden=16)),
        pytest.raises(PredictorError, match="trained for hidden size 16, this model has 32"),
    ):
        generate(model)
