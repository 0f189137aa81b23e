"""The CPU kernels on quantised weights: the bits of the same weights dequantised, on every
instruction set, for every code and scale.

`quantization.dequantise` in torch is the oracle for the weights, and the kernels on its bfloat16
result are what the quantised call must equal; those are tested against fp64 in test_expert_ffn.py.
"""

from __future__ import annotations

import math

import pytest
import torch
from expert_cases import GPT_OSS, Case, Inputs
from torch import Tensor

from moe_offload import _core, quantization
from moe_offload.backends.native import BoundLayer
from moe_offload.quantization import SCALES

torch.set_num_threads(1)
ISAS = _core.cpu_isas("bfloat16")


def quantised_twin(
    inputs: Inputs,
    form: str,
    bf16_scales: bool = False,
    group: int = 0,
    int4_scales: torch.dtype = torch.bfloat16,
) -> dict[str, Tensor]:
    """Replace the matrices of `inputs` by what a quantised copy of them means; returns the copy.

    fp8's gate and up have a grid of blocks each, as checkpoints store them. group: of int4_group,
    -1 for whole rows.
    """
    stored = dict(inputs.weights)
    for name in [n for n in stored if n.endswith("_proj")]:
        matrix = inputs.weights[name]
        gated = name == "gate_up_proj" and form == "fp8_block"
        parts = []
        for part in matrix.split(inputs.case.inner, dim=1) if gated else [matrix]:
            columns = part.shape[-1] if group < 0 else group
            codes, scales = quantization.lossy_quantise(form, part, int4_scales, columns)
            assert scales is not None
            if bf16_scales:
                scales = scales.bfloat16()
            wide = scales.float() if form == "fp8_block" else scales
            parts.append((codes, scales, quantization.dequantise(form, codes, wide, matrix.dtype)))
        stored[name], stored[name + SCALES], inputs.weights[name] = (
            torch.cat(tensors, dim=1) for tensors in zip(*parts, strict=True)
        )
    return stored


def quantised(inputs: Inputs, stored: dict[str, Tensor], form: str, isa: str, threads: int = 1,
              concatenated: bool = True) -> Tensor:  # fmt: skip
    case = inputs.case
    layer = BoundLayer(
        *(case.activation, case.hidden, case.inner, case.experts, torch.bfloat16),
        concatenated=concatenated,
        weight_format=form,
        isa=isa,
    )
    run = inputs.start(layer, threads)
    run.compute_all(layer.weights(stored))
    return inputs.finish(run)


CASES = [
    Case("one-token", 1, 2, 4, 64, 32, bias=True),
    Case("few-rows", 6, 2, 4, 96, 160, bias=True),
    Case("eight-rows", 8, 1, 1, 288, 64),
    Case("many-rows", 70, 2, 3, 160, 96, GPT_OSS, bias=True),
    Case("several-blocks", 20, 2, 2, 320, 288),
]


@pytest.mark.parametrize("isa", ISAS)
@pytest.mark.parametrize("form", ["mxfp4", "fp8_block", "fp8_block_bf16"])
@pytest.mark.parametrize("case", CASES, ids=lambda case: case.name)
def test_bits_are_those_of_dequantised_weights(case: Case, form: str, isa: str) -> None:
    inputs = Inputs.make(case, torch.bfloat16)
    in_bf16, form = form.endswith("_bf16"), form.removesuffix("_bf16")
    stored = quantised_twin(inputs, form, in_bf16)
    got = quantised(inputs, stored, form, isa)
    assert torch.equal(got, inputs.native(isa))
    assert torch.equal(quantised(inputs, stored, form, isa, threads=3), got)
    for name in [n for n in stored if n.endswith(SCALES)]:  # each scale counts
        changed = {**stored, name: stored[name].view(torch.uint8).flip(0).view(stored[name].dtype)}
        if not torch.equal(changed[name], stored[name]):
            assert not torch.equal(quantised(inputs, changed, form, isa), got)


def special_scales(form: str, shape: torch.Size) -> Tensor:
    """Ordinary scales, and in some rows or blocks those that overflow, vanish or are NaN."""
    generator = torch.Generator().manual_seed(3)
    if form == "mxfp4":
        scales = torch.randint(118, 124, shape, generator=generator, dtype=torch.uint8)
        special = torch.tensor([0, 1, 2, 3, 251, 252, 253, 254, 255], dtype=torch.uint8)
    else:
        dtype = torch.float32 if form == "fp8_block" else torch.bfloat16
        scales = torch.rand(shape, generator=generator).add(0.5).mul(0.01).to(dtype)
        special = torch.tensor(
            [1e-40, -1e-38, 2.0**99, 2.0**101, 2.0**121, -3e38, math.inf, -math.inf, math.nan]
        ).to(dtype)
    rows = scales.view(-1, shape[-1])  # one special scale in each second row
    for row in range(0, rows.shape[0], 2):
        column = int(torch.randint(shape[-1], (), generator=generator))
        rows[row, column] = special[row // 2 % len(special)]
    return scales


@pytest.mark.parametrize("isa", ISAS)
@pytest.mark.parametrize("tokens", [1, 2, 5, 8, 12, 30])
@pytest.mark.parametrize("form", ["mxfp4", "fp8_block", "int4_group"])
def test_every_code_under_special_scales(form: str, tokens: int, isa: str) -> None:
    """In `down` each row of weights is an output of its own, so that one NaN is not all of them."""
    hidden, inner = (9 * 2 * 128, 288) if form == "fp8_block" else (160, 288)
    inputs = Inputs.make(Case("", tokens, 1, 1, hidden, inner), torch.bfloat16)
    stored = quantised_twin(inputs, form, group=32)
    codes, scales = stored["down_proj"], stored["down_proj" + SCALES]
    generator = torch.Generator().manual_seed(4)
    shape = codes.view(torch.uint8).shape
    numbers = torch.randint(256, shape, generator=generator, dtype=torch.uint8)
    if form == "fp8_block":  # NaN in one row of sixteen, and rows so small that nothing overflows
        row = torch.arange(hidden)[:, None] % 16
        ordinary = torch.where(numbers & 127 == 127, numbers & 128, numbers)
        numbers = torch.where(row == 7, numbers, torch.where(row == 3, numbers & 0x83, ordinary))
    stored["down_proj"] = numbers.view(codes.dtype)
    stored["down_proj" + SCALES] = special_scales(form, scales.shape)
    inputs.weights["down_proj"] = quantization.dequantise(
        form, stored["down_proj"], stored["down_proj" + SCALES], torch.bfloat16
    )
    got = quantised(inputs, stored, form, isa)
    expected = inputs.native(isa)
    same = (got.view(torch.int16) == expected.view(torch.int16)) | (got.isnan() & expected.isnan())
    assert same.all()
    assert got.isnan().any()
    assert got.isfinite().all(dim=0).sum() > hidden // 8


@pytest.mark.parametrize("isa", ISAS)
@pytest.mark.parametrize("tokens", [1, 12, 30])
def test_rows_of_one_fp8_code_each(tokens: int, isa: str) -> None:
    """Codes that kernels treat by themselves (zero, subnormal, NaN) fill whole vectors here."""
    hidden, inner = 256, 160
    inputs = Inputs.make(Case("", tokens, 1, 1, hidden, inner), torch.bfloat16)
    stored = quantised_twin(inputs, "fp8_block")
    code = torch.arange(256, dtype=torch.uint8)[None, :, None].repeat(1, 1, inner)
    stored["down_proj"] = code.view(torch.float8_e4m3fn)
    for scale in (0.0, -0.0, 1e-40, -1e-38, 2.0**-101, 2.0**-99, -0.37, 1.0, 3e4, 2.0**99, 2.0**101,
                  -(2.0**120), 3e38, math.inf, -math.inf, math.nan):  # fmt: skip
        stored["down_proj" + SCALES].fill_(scale)
        inputs.weights["down_proj"] = quantization.dequantise(
            "fp8_block", stored["down_proj"], stored["down_proj" + SCALES], torch.bfloat16
        )
        got = quantised(inputs, stored, "fp8_block", isa)
        expected = inputs.native(isa)
        same = got.view(torch.int16) == expected.view(torch.int16)
        assert (same | (got.isnan() & expected.isnan())).all(), scale


@pytest.mark.parametrize("isa", ISAS)
@pytest.mark.parametrize("tokens", [1, 30])
def test_fp8_columns_that_are_not_there_count_as_zero(tokens: int, isa: str) -> None:
    """Even where the last block's scale is infinite, and zero times it is NaN."""
    inputs = Inputs.make(Case("", tokens, 1, 1, 48, 144, bias=True), torch.bfloat16)
    inputs.weights["gate_up_proj_bias"].fill_(9.0)  # so h is positive
    stored = quantised_twin(inputs, "fp8_block")
    stored["down_proj"].view(torch.uint8).fill_(0x38)  # one
    stored["down_proj" + SCALES][..., -1] = math.inf
    got = quantised(inputs, stored, "fp8_block", isa)
    assert torch.equal(got, torch.full_like(got, math.inf))


@pytest.mark.parametrize("isa", ISAS)
@pytest.mark.parametrize("tokens", range(1, 26))
@pytest.mark.parametrize("form", ["mxfp4", "fp8_block", "int4_group"])
def test_few_rows_of_any_number(form: str, tokens: int, isa: str) -> None:
    """Tiles of weight rows end within a block, at its end, at a task's and at the matrix's."""
    inputs = Inputs.make(Case("", tokens, 1, 1, 352, 416, bias=True), torch.bfloat16)
    stored = quantised_twin(inputs, form, group=32)
    expected = inputs.native(isa)
    for threads in (1, 2):
        assert torch.equal(quantised(inputs, stored, form, isa, threads=threads), expected)


@pytest.mark.parametrize("isa", ISAS)
@pytest.mark.parametrize("rows", [1, 30])
def test_fp8_sizes_off_the_blocks(isa: str, rows: int) -> None:
    """A grid rounds up: neither F nor H need be multiples of 128, nor of a vector's width."""
    for hidden, inner in ((16, 48), (144, 208), (272, 144), (4208, 16)):
        inputs = Inputs.make(Case("", rows, 1, 2, hidden, inner), torch.bfloat16)
        stored = quantised_twin(inputs, "fp8_block")
        assert torch.equal(quantised(inputs, stored, "fp8_block", isa), inputs.native(isa))


@pytest.mark.parametrize("isa", ISAS)
@pytest.mark.parametrize("scales", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("group", [32, 64, 96, 128, -1])
@pytest.mark.parametrize("tokens", [1, 8, 70])
def test_int4_bits_are_those_of_dequantised_weights(
    tokens: int, group: int, scales: torch.dtype, isa: str
) -> None:
    hidden, inner = (192, 96) if group == 96 else (128, 256)
    inputs = Inputs.make(Case("", tokens, 2, 3, hidden, inner, bias=True), torch.bfloat16)
    stored = quantised_twin(inputs, "int4_group", group=group, int4_scales=scales)
    got = quantised(inputs, stored, "int4_group", isa)
    assert torch.equal(got, inputs.native(isa))
    assert torch.equal(quantised(inputs, stored, "int4_group", isa, threads=3), got)
    for name in stored:  # each section counts
        if name.endswith(("_proj", SCALES)):
            changed = {**stored, name: stored[name].flip(0)}
            assert not torch.equal(quantised(inputs, changed, "int4_group", isa), got)


@pytest.mark.parametrize("isa", ISAS)
@pytest.mark.parametrize("tokens", [2, 40])
def test_int4_alternating_rows_of_gate_and_up(isa: str, tokens: int) -> None:
    inputs = Inputs.make(Case("", tokens, 2, 3, 96, 160, GPT_OSS, bias=True), torch.bfloat16)
    stored = quantised_twin(inputs, "int4_group", group=32)
    layer = inputs.layer(isa, concatenated=False)
    run = inputs.start(layer, 1)
    run.compute_all(layer.weights(inputs.weights))
    expected = inputs.finish(run)
    assert torch.equal(quantised(inputs, stored, "int4_group", isa, concatenated=False), expected)


@pytest.mark.parametrize("isa", ISAS)
@pytest.mark.parametrize("tokens", [2, 40])
def test_alternating_rows_of_gate_and_up(isa: str, tokens: int) -> None:
    """gpt-oss: codes are [2F, H], gate and up in turn; the resident twin is [H, 2F]."""
    inputs = Inputs.make(Case("", tokens, 2, 3, 96, 160, GPT_OSS, bias=True), torch.bfloat16)
    stored = quantised_twin(inputs, "mxfp4")
    layer = inputs.layer(isa, concatenated=False, transposed=True)
    run = inputs.start(layer, 1)
    columns = {
        name: tensor.transpose(1, 2).contiguous() if tensor.dim() == 3 else tensor
        for name, tensor in inputs.weights.items()
    }
    run.compute_all(layer.weights(columns))
    expected = inputs.finish(run)
    assert torch.equal(quantised(inputs, stored, "mxfp4", isa, concatenated=False), expected)


def test_what_the_kernels_refuse() -> None:
    inputs = Inputs.make(Case("", 2, 1, 2, 64, 64), torch.bfloat16)
    layer = inputs.layer()
    view = (0, 0, 32, 1)
    run = inputs.start(layer, 1)
    with pytest.raises(ValueError, match="needs scales"):
        run.compute_all(_core.FfnWeights(up=view, down=view, gate=view, format="mxfp4"))
    with pytest.raises(ValueError, match="do not know nf4"):
        _core.FfnWeights(up=view, down=view, format="nf4")
    odd = Inputs.make(Case("", 2, 1, 2, 48, 64), torch.bfloat16)
    with pytest.raises(ValueError, match="multiples of 32"):
        odd.start(odd.layer(), 1).compute_all(
            _core.FfnWeights(up=view, down=view, gate=view, format="mxfp4")
        )
    for up_group, down_group in ((0, 32), (48, 32), (32, 128), (-32, 32)):
        weights = _core.FfnWeights(
            up=view, down=view, gate=view, format="int4_group", up_group=up_group,
            down_group=down_group, up_scales=(1, 0), down_scales=(1, 0), gate_scales=(1, 0),
        )  # fmt: skip
        with pytest.raises(ValueError, match="multiples of 32 that divide 64 columns, got"):
            run.compute_all(weights)
    wide = Inputs.make(Case("", 2, 1, 2, 64, 64), torch.float32)
    scales = (1, 0)
    weights = _core.FfnWeights(
        up=view, down=view, gate=view, format="mxfp4",
        up_scales=scales, down_scales=scales, gate_scales=scales,
    )  # fmt: skip
    with pytest.raises(ValueError, match="bfloat16 only"):
        wide.start(wide.layer(), 1).compute_all(weights)
