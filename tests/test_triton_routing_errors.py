"""What route_predict_permute, permute and Scoring refuse, and what they say."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import pytest
import torch

from moe_offload.triton_kernels.launch import interpreting, require_device
from moe_offload.triton_kernels.next_layer import NextLayerPredictor
from moe_offload.triton_kernels.permute import permute
from moe_offload.triton_kernels.route_predict_permute import (
    route_predict_permute,
)
from moe_offload.triton_kernels.scoring import Scoring


def _broken() -> list[tuple[str, type[Exception], str, dict[str, Any]]]:
    logits = torch.zeros(4, 8)
    hidden, head = torch.zeros(4, 16), torch.zeros(2, 8, 16)
    predictor = NextLayerPredictor(head, 2)
    slot_of = torch.zeros(4, 8, dtype=torch.int32)
    both = {"hidden": hidden, "predictor": predictor}
    return [
        ("list", TypeError, "logits must be a tensor, got list", {"logits": [1.0]}),
        ("1-D", ValueError, r"logits must have shape \[any, any\]", {"logits": logits[0]}),
        ("integers", TypeError, "logits must be float32 or", {"logits": logits.int()}),
        ("columns", ValueError, "dense in its last dimension", {"logits": torch.zeros(8, 4).t()}),
        ("too wide", ValueError, "must lie in 1 to 4096", {"logits": torch.zeros(1, 5000)}),
        ("k = 0", ValueError, "top_k must lie in 1 to 8, got 0", {"top_k": 0}),
        ("k > E", ValueError, "top_k must lie in 1 to 8, got 9", {"top_k": 9}),
        ("k = 2.0", TypeError, "top_k must be an int", {"top_k": 2.0}),
        ("groups", ValueError, "3 groups of 8 experts", {"scoring": Scoring(num_groups=3)}),
        (
            "group of one",
            ValueError,
            "8 groups of 8 experts",
            {"scoring": Scoring(num_groups=8, top_groups=4)},
        ),
        (
            "k > groups",
            ValueError,
            "1 of 4 groups hold only 2",
            {"scoring": Scoring(num_groups=4, top_groups=1), "top_k": 3},
        ),
        ("weights", TypeError, "weights_dtype must be", {"weights_dtype": torch.int32}),
        (
            "correction",
            ValueError,
            'needs scoring "sigmoid"',
            {"correction_bias": torch.zeros(8)},
        ),
        (
            "correction shape",
            ValueError,
            r"correction_bias must have shape \[8\], got \[7\]",
            {"correction_bias": torch.zeros(7), "scoring": Scoring("sigmoid")},
        ),
        ("hidden alone", ValueError, "got only hidden", {"hidden": hidden}),
        ("predictor alone", ValueError, "got only predictor", {"predictor": predictor}),
        (
            "tokens",
            ValueError,
            r"hidden must have shape \[4, any\]",
            {**both, "hidden": hidden[:3]},
        ),
        (
            "head dtype",
            TypeError,
            "predictor.weight must be bfloat16, got float32",
            {**both, "hidden": hidden.bfloat16()},
        ),
        (
            "head shape",
            ValueError,
            r"predictor.weight must have shape \[any, any, 16\]",
            {**both, "predictor": NextLayerPredictor(torch.zeros(2, 8, 15), 2)},
        ),
        (
            "top_m",
            ValueError,
            "top_k must lie in 1 to 8, got 9",
            {**both, "predictor": replace(predictor, top_m=9)},
        ),
        (
            "head bias",
            ValueError,
            r"predictor.bias must have shape \[2, 8\]",
            {**both, "predictor": replace(predictor, bias=torch.zeros(8, 2))},
        ),
        (
            "head correction",
            ValueError,
            "a bias of the logits is predictor.bias",
            {**both, "predictor": replace(predictor, correction_bias=torch.zeros(2, 8))},
        ),
        ("slots dtype", TypeError, "slot_of must be int32", {"slot_of": slot_of.long()}),
        ("slots shape", ValueError, "slot_of must have shape", {"slot_of": slot_of[:, :7]}),
        ("layer", ValueError, "layer must lie in 0 to 3, got 4", {"slot_of": slot_of, "layer": 4}),
        ("next layers", ValueError, "after layer 2", {**both, "slot_of": slot_of, "layer": 2}),
        (
            "workspace",
            ValueError,
            "must hold 19 counters",
            {**both, "workspace": torch.zeros(3, dtype=torch.int32)},
        ),
    ]


@pytest.mark.parametrize(
    ("error", "message", "changes"),
    [pytest.param(*rest, id=name) for name, *rest in _broken()],
)
def test_errors_of_route(error: type[Exception], message: str, changes: dict[str, Any]) -> None:
    arguments: dict[str, Any] = {"logits": torch.zeros(4, 8), "top_k": 2, **changes}
    with pytest.raises(error, match=message):
        route_predict_permute(**arguments)


def test_errors_of_permute_and_scoring() -> None:
    with pytest.raises(TypeError, match="topk_ids must be int32 or int64"):
        permute(torch.zeros(2, 2), 4)
    with pytest.raises(ValueError, match="contiguous"):
        permute(torch.zeros(4, 8, dtype=torch.int64)[:, ::2], 4)
    with pytest.raises(ValueError, match="num_experts must lie in 1 to 4096"):
        permute(torch.zeros(2, 2, dtype=torch.int64), 0)
    with pytest.raises(ValueError, match="top_k must lie in 1 to 64"):
        permute(torch.zeros(2, 65, dtype=torch.int64), 100)
    with pytest.raises(ValueError, match="kind must be"):
        Scoring("argmax")  # type: ignore[arg-type]
    with pytest.raises(ValueError, match="top_groups must lie in 1 to 2"):
        Scoring(num_groups=2, top_groups=3)


def test_wrong_device() -> None:
    with pytest.raises(RuntimeError, match="need CUDA tensors, got a tensor on meta"):
        require_device("permute", torch.zeros(1, device="meta"))
    with pytest.raises(ValueError, match="is on meta and the first input on cpu"):
        route_predict_permute(
            torch.zeros(4, 8),
            2,
            Scoring("sigmoid"),
            correction_bias=torch.zeros(8, device="meta"),
        )


def test_compiled_kernels_refuse_cpu_tensors(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("moe_offload.triton_kernels.launch.interpreting", lambda: False)
    assert interpreting() in (True, False)
    with pytest.raises(RuntimeError, match="set TRITON_INTERPRET=1 before triton is imported"):
        permute(torch.zeros(2, 2, dtype=torch.int64), 4)
