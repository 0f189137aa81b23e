"""Weights stored as [E, K, N], as gpt-oss has them: the bits of the same weights as rows."""

from __future__ import annotations

import pytest
import torch
from expert_cases import GPT_OSS, PATHS, SILU, Case, Inputs, check
from torch import Tensor

from moe_offload import _core
from moe_offload.activations import Activation


def transposed(weights: dict[str, Tensor], alternate: bool) -> dict[str, Tensor]:
    """The same weights as [E, K, N], gate and up in halves or in turn."""
    stored = {}
    for name, tensor in weights.items():
        if alternate and name.startswith("gate_up"):
            tensor = torch.stack(tensor.chunk(2, dim=1), dim=2).flatten(1, 2)
        stored[name] = tensor.transpose(1, 2).contiguous() if tensor.dim() == 3 else tensor
    return stored


TRANSPOSED = [
    Case("gpt-oss", 5, 4, 6, 96, 64, GPT_OSS, bias=True),
    Case("gpt-oss-many-rows", 60, 2, 3, 96, 160, GPT_OSS, bias=True),
    Case("off-every-block", 5, 2, 3, 67, 53, SILU, bias=True),
    Case("off-every-block-many-rows", 55, 2, 3, 67, 53, SILU, bias=True),
    Case("sums-in-pieces", 40, 2, 3, 261, 530, SILU, bias=True),
    Case("no-gate", 30, 2, 3, 130, 70, Activation("relu2", gated=False)),
    Case("smallest", 1, 1, 1, 1, 1),
    Case("one-row-of-long-sums", 2, 1, 2, 1093, 540, GPT_OSS, bias=True),
    Case("two-rows-of-many-columns", 2, 1, 1, 70, 1301, GPT_OSS, bias=True),
    Case("eight-rows", 8, 1, 1, 600, 300, SILU, bias=True),
]


@pytest.mark.parametrize("case", TRANSPOSED, ids=lambda case: case.name)
@pytest.mark.parametrize(("isa", "dtype"), PATHS)
def test_transposed_weights_give_the_same_bits(isa: str, dtype: torch.dtype, case: Case) -> None:
    """As rows, on every instruction set, for any number of threads; and those are right."""
    inputs = Inputs.make(case, dtype)
    outputs = []
    for alternate in (True, False) if case.activation.gated else (False,):
        layer = inputs.layer(isa, concatenated=not alternate, transposed=True)
        stored = transposed(inputs.weights, alternate)
        for num_threads in (1, 3):
            run = inputs.start(layer, num_threads)
            run.compute_all(layer.weights(stored))
            outputs.append(inputs.finish(run))
    expected = inputs.native(isa)
    for got in outputs:
        assert torch.equal(got, expected)
    check(inputs, expected)


def test_transposed_weights_shared_by_threads_give_the_same_bits() -> None:
    for tokens in (2, 100):
        inputs = Inputs.make(Case("", tokens, 2, 4, 512, 384, GPT_OSS, True), torch.bfloat16)
        layer = inputs.layer(concatenated=False, transposed=True)
        stored = transposed(inputs.weights, alternate=True)  # weights() keeps addresses only
        weights = layer.weights(stored)
        outputs = []
        for num_threads in (1, 2, 5):
            run = inputs.start(layer, num_threads)
            run.compute_all(weights)
            outputs.append(inputs.finish(run))
        assert all(torch.equal(got, inputs.native()) for got in outputs)


def test_strides_that_no_kernel_reads_are_refused() -> None:
    inputs = Inputs.make(Case("", 2, 1, 2, 32, 32), torch.float32)
    first, down = inputs.weights["gate_up_proj"], inputs.weights["down_proj"]
    wide = torch.zeros(2, 32, 96)[..., ::3]
    for change in ({"gate_up_proj": torch.zeros(2, 64, 96)[..., ::3]}, {"down_proj": wide}):
        layer = inputs.layer()
        weights = layer.weights({"gate_up_proj": first, "down_proj": down, **change})
        with pytest.raises(ValueError, match="FfnRun: a transposed matrix must have its columns"):
            inputs.start(layer, 1).compute_all(weights)
    view = (down.data_ptr(), 4096, 128, 4)
    uneven = _core.FfnWeights(up=view, down=view, gate=(down.data_ptr(), 4096, 256, 4))
    with pytest.raises(ValueError, match="FfnRun: gate and up must have the same strides"):
        inputs.start(inputs.layer(), 1).compute_all(uneven)
