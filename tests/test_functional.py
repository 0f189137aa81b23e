"""`functional.expert_ffn` and the operator behind it: backends, names, and arguments refused."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from expert_cases import Case, Inputs, check
from torch import Tensor

from moe_offload import functional
from moe_offload.activations import Activation
from moe_offload.backends.native import DTYPES


def call(inputs: Inputs, **options: Any) -> Tensor:
    hidden, first, down, ids, topk, act, first_bias, down_bias = inputs.arguments
    biases = {"gate_up_bias": first_bias, "down_bias": down_bias}
    return functional.expert_ffn(hidden, first, down, ids, topk, act, **biases, **options)


@pytest.mark.parametrize("dtype", list(DTYPES))
def test_functional_backends_agree_with_the_reference(dtype: torch.dtype) -> None:
    inputs = Inputs.make(Case("", 12, 2, 4, 48, 32, bias=True), dtype)
    native = call(inputs)
    assert torch.equal(native, call(inputs, backend="native"))
    check(inputs, native)
    check(inputs, call(inputs, backend="torch"))


def test_functional_takes_names_and_experts_without_a_gate() -> None:
    for gated in (True, False):
        inputs = Inputs.make(Case("", 5, 2, 4, 48, 32, Activation("relu2", gated)), torch.float32)
        got = functional.expert_ffn(*inputs.arguments[:5], "relu2")
        assert torch.equal(got, call(inputs))


def test_the_operator_passes_opcheck() -> None:
    inputs = Inputs.make(Case("", 6, 2, 4, 48, 32, bias=True), torch.bfloat16)
    hidden, first, down, ids, topk, act, first_bias, down_bias = inputs.arguments
    arguments = (
        *(hidden, first, down, ids, topk, first_bias, down_bias),
        *(act.name, act.gated, act.alpha, act.limit, act.offset, "auto"),
    )
    torch.library.opcheck(
        torch.ops.moe_offload.expert_ffn.default,
        arguments,
        test_utils=("test_schema", "test_faketensor", "test_autograd_registration"),
    )
    assert torch.equal(torch.ops.moe_offload.expert_ffn(*arguments), call(inputs))


BAD = [
    ({"hidden": torch.zeros(5)}, "expected hidden \\[T, H\\]"),
    ({"hidden": torch.zeros(5, 47)}, r"hidden must be \[T, 48\]"),
    ({"gate_up": torch.zeros(4, 63, 48)}, r"gate_up \[4, 64 or 32, 48\]"),
    ({"topk_ids": torch.zeros(4, 2, dtype=torch.long)}, r"must both be \[5, A\]"),
    ({"topk_ids": torch.zeros(5, 2)}, "topk_ids must be integers"),
    ({"topk_weights": torch.zeros(5, 2, dtype=torch.long)}, "topk_weights floating point"),
    ({"down": torch.zeros(4, 48, 32, dtype=torch.bfloat16)}, "share one dtype"),
    ({"down": torch.zeros(4, 32, 48).transpose(1, 2)}, "contiguous in memory"),
    ({"down_bias": torch.zeros(4, 48)}, "biases for both projections"),
    ({"down_bias": torch.zeros(4, 9), "gate_up_bias": torch.zeros(4, 64)}, r"must be \(4, 48\)"),
    ({"topk_weights": torch.zeros(5, 2, device="meta")}, "on one device"),
    ({"activation": "swish"}, "activation must be one of silu"),
    ({"activation": Activation("silu", gated=False)}, "does not fit gate_up of 64 rows"),
    ({"backend": "cublas"}, "backend must be of auto, native, cuda, triton, torch, got"),
]


@pytest.mark.parametrize(("change", "message"), BAD)
def test_arguments_that_do_not_fit_are_refused(change: dict[str, Any], message: str) -> None:
    good = {
        "hidden": torch.zeros(5, 48),
        "gate_up": torch.zeros(4, 64, 48),
        "down": torch.zeros(4, 48, 32),
        "topk_ids": torch.zeros(5, 2, dtype=torch.long),
        "topk_weights": torch.zeros(5, 2),
    }
    assert functional.expert_ffn(**good).shape == (5, 48)
    with pytest.raises(ValueError, match=message):
        functional.expert_ffn(**{**good, **change})


def test_native_is_refused_off_the_cpu() -> None:
    meta = [torch.zeros(shape, device="meta") for shape in ((5, 48), (4, 64, 48), (4, 48, 32))]
    ids = torch.zeros(5, 2, dtype=torch.long, device="meta")
    with pytest.raises(ValueError, match="hidden is on meta"):
        functional.expert_ffn(*meta, ids, torch.zeros(5, 2, device="meta"), backend="native")


def test_a_resident_transformers_model_uses_the_same_kernels() -> None:
    pytest.importorskip("transformers")
    from tiny_models import experts_modules, prompt_ids, tiny_model

    model = tiny_model("mixtral", torch.bfloat16)
    assert set(model.get_experts_implementation().values()) == {"moe_offload"}
    _, experts = experts_modules(model)[0]
    calls = []

    def record(_: Any, args: tuple[Any, ...], out: Tensor) -> None:
        calls.append((args, out))

    handle = experts.register_forward_hook(record)
    with torch.no_grad():
        model(prompt_ids())
    handle.remove()
    (hidden, ids, topk), out = calls[0]
    expected = functional.expert_ffn(
        hidden, experts.gate_up_proj.detach(), experts.down_proj.detach(), ids, topk
    )
    assert torch.equal(out, expected)
    model.set_experts_implementation("grouped_mm")
    with torch.no_grad():
        theirs = experts(hidden, ids, topk)
    assert not torch.equal(theirs, out), "grouped_mm rounds more often"
    torch.testing.assert_close(theirs, out, rtol=0.02, atol=0.02)


def test_the_operator_takes_backends_of_gpus_for_backends_on_the_cpu_too() -> None:
    """What torch.compile calls refuses as eager code does, not as an unknown instruction set."""
    inputs = Inputs.make(Case("", 3, 2, 4, 48, 32), torch.float32)
    hidden, gate_up, down, ids, topk = inputs.arguments[:5]
    for call in (
        lambda: functional.expert_ffn(hidden, gate_up, down, ids, topk, backend="cuda"),
        lambda: torch.ops.moe_offload.expert_ffn(
            *(hidden, gate_up, down, ids, topk, None, None, "silu", True, 1.0, 0.0, 0.0, "cuda")
        ),
    ):
        with pytest.raises(ValueError, match="backend='cuda' cannot compute these experts"):
            call()
