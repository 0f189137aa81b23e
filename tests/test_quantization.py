"""moe_offload.quantization against transformers' dequantisation and the formats' definitions."""

from __future__ import annotations

import math

import pytest
import torch
from torch import Tensor

from moe_offload import quantization as q

QUANTISED = [("fp8_block", 0), ("mxfp4", 0), ("int4_group", 32), ("int4_group", 128)]


def random_bytes(*shape: int, seed: int = 0) -> Tensor:
    generator = torch.Generator().manual_seed(seed)
    return torch.randint(256, shape, generator=generator).to(torch.uint8)


def test_mxfp4_is_what_transformers_makes_of_it() -> None:
    mxfp4 = pytest.importorskip("transformers.integrations.mxfp4")
    blocks = random_bytes(3, 6, 4, 16)  # [E, N, K / 32, 16]
    scales = random_bytes(3, 6, 4, seed=1).clamp(100, 140)
    theirs = mxfp4.convert_moe_packed_tensors(blocks, scales, dtype=torch.bfloat16)  # [E, K, N]
    ours = q.dequantise_mxfp4(blocks, scales)
    assert ours.dtype == torch.bfloat16
    assert torch.equal(ours, theirs.transpose(1, 2))


def test_fp8_is_what_transformers_makes_of_it() -> None:
    fp8 = pytest.importorskip("transformers.integrations.finegrained_fp8")
    codes = random_bytes(2, 256, 384)
    codes[(codes & 127) == 127] = 0  # NaN
    codes = codes.view(torch.float8_e4m3fn)
    scales = torch.rand(2, 2, 3) * 1e-3
    for dtype in (torch.float32, torch.bfloat16):
        theirs = fp8.Fp8Dequantize(None)._dequantize_one(codes, scales, output_dtype=dtype)
        assert torch.equal(q.dequantise_fp8_block(codes, scales, dtype), theirs)


def test_int4_is_what_compressed_tensors_defines() -> None:
    """Element i of a row is bits 4i to 4i + 3 of its words, minus 8, times its group's scale."""
    packed = random_bytes(5, 64).view(torch.int32)  # [5, 16]: 128 columns
    scales = (torch.rand(5, 4) - 0.5).bfloat16()
    ours = q.dequantise_int4_group(packed, scales)
    for row in range(5):
        bits = sum((int(word) & 0xFFFFFFFF) << (32 * i) for i, word in enumerate(packed[row]))
        for i in range(128):
            value = (bits >> (4 * i) & 15) - 8
            want = torch.tensor(value * float(scales[row, i // 32])).bfloat16()  # one rounding
            assert ours[row, i] == want


def test_every_code() -> None:
    every = torch.arange(256, dtype=torch.uint8)
    e4m3 = q.dequantise_fp8_block(every.view(torch.float8_e4m3fn)[None], torch.ones(1, 2))[0]
    for code, value in enumerate(e4m3.tolist()):
        exponent, fraction = code >> 3 & 15, code & 7
        if exponent == 15 and fraction == 7:
            assert math.isnan(value)
            continue
        size = math.ldexp(8 + fraction, exponent - 10) if exponent else math.ldexp(fraction, -9)
        assert value == (-size if code & 128 else size)
        assert math.copysign(1, value) == (-1 if code & 128 else 1)

    blocks = every.view(1, 16, 16)  # each pair of nibbles once
    e2m1 = q.dequantise_mxfp4(blocks, torch.full((1, 16), 127, dtype=torch.uint8))[0]
    pairs = [value for code in range(256) for value in (q.E2M1[code & 15], q.E2M1[code >> 4])]
    assert e2m1.tolist() == pairs

    ones = torch.full((256, 1, 16), 0x22, dtype=torch.uint8)  # 1.0 in every place
    factors = q.dequantise_mxfp4(ones, every[:, None])[:, 0]
    for code, value in enumerate(factors.tolist()[:-1]):
        assert value == math.ldexp(1, code - 127)  # exact in bfloat16, also the subnormal 2^-127
    assert factors[255].isnan()
    e8m0 = every[:, None].view(torch.float8_e8m0fnu)
    assert torch.equal(q.dequantise_mxfp4(ones, e8m0)[:-1, 0], factors[:-1])


def test_the_worked_example() -> None:
    blocks = torch.zeros(1, 1, 16, dtype=torch.uint8)
    blocks[0, 0, 0] = 0x31
    got = q.dequantise_mxfp4(blocks, torch.tensor([[120]], dtype=torch.uint8))
    assert got[0, :3].tolist() == [2**-8, 3 * 2**-8, 0]


@pytest.mark.parametrize(("format", "group"), QUANTISED)
def test_quantising_is_as_near_as_the_format_allows(format: str, group: int) -> None:
    weight = torch.randn(2, 144, 256, generator=torch.Generator().manual_seed(3))
    codes, scales = q.lossy_quantise(format, weight, torch.bfloat16, group)
    assert scales is not None
    specs = q.specs(format, 144, 256, torch.bfloat16, group)
    assert specs == tuple((tensor.shape[1:], tensor.dtype) for tensor in (codes, scales))
    back = q.dequantise(format, codes, scales)
    error = float((back - weight).norm() / weight.norm())
    # e4m3 rounds at most 1/16 of a number; four bits are steps of 1/7.5 or 1/4 of the largest
    bound = {"fp8_block": 1 / 16 / math.sqrt(3), "mxfp4": 0.15, "int4_group": 0.13}[format]
    assert error < bound
    # what the format can hold exactly comes back as it was
    again, scales_again = q.lossy_quantise(format, back, torch.bfloat16, group)
    assert scales_again is not None
    assert float((q.dequantise(format, again, scales_again) - back).norm() / back.norm()) < error


def test_zeros_survive_quantising() -> None:
    for format, group in QUANTISED:
        codes, scales = q.lossy_quantise(format, torch.zeros(16, 128), torch.bfloat16, group)
        assert (q.dequantise(format, codes, scales) == 0).all()


@pytest.mark.parametrize(
    ("call", "text"),
    [
        (lambda: q.check_size("fp4", 8, 8), "one of plain, fp8_block, .* got 'fp4'"),
        (lambda: q.check_size("fp8_block", 8, 24), "multiples of 16, got a matrix of \\[8, 24\\]"),
        (lambda: q.check_size("mxfp4", 8, 48), "multiples of 32"),
        (lambda: q.check_size("int4_group", 8, 2880, 128), "multiples of 128"),
        (lambda: q.check_size("int4_group", 8, 96, 48), "multiple of 32, got 48"),
        (lambda: q.check_size("int4_group", 8, 96, 0), "multiple of 32, got 0"),
        (lambda: q.check_size("mxfp4", 8, 96, 32), "only int4_group has a group_size"),
        (
            lambda: q.dequantise_fp8_block(torch.zeros(8, 16), torch.ones(1, 1)),
            "codes e4m3 \\[N, K\\], got torch.float32 \\[8, 16\\]",
        ),
        (
            lambda: q.dequantise_fp8_block(
                torch.zeros(8, 160).to(torch.float8_e4m3fn), torch.ones(1, 1)
            ),
            "scales float32 \\[..., 1, 2\\] .* got torch.float32 \\[1, 1\\]",
        ),
        (
            lambda: q.dequantise_fp8_block(
                torch.zeros(8, 16).to(torch.float8_e4m3fn), torch.ones(1, 1).bfloat16()
            ),
            "scales float32 .* got torch.bfloat16",
        ),
        (
            lambda: q.dequantise_mxfp4(random_bytes(8, 2, 8), random_bytes(8, 2)),
            "blocks uint8 .* got torch.uint8 \\[8, 2, 8\\]",
        ),
        (
            lambda: q.dequantise_mxfp4(random_bytes(8, 2, 16), random_bytes(8, 1)),
            "scales uint8 \\[8, 2\\], got torch.uint8 \\[8, 1\\]",
        ),
        (
            lambda: q.dequantise_int4_group(random_bytes(8, 4), torch.ones(8, 1).bfloat16()),
            "packed int32 .* got torch.uint8",
        ),
        (
            lambda: q.dequantise_int4_group(
                random_bytes(8, 16).view(torch.int32), torch.ones(8, 1).int()
            ),
            "scales of a float dtype .* got torch.int32",
        ),
        (lambda: q.dequantise("mxfp4", random_bytes(1, 1, 16), None), "mxfp4 needs scales"),
    ],
)
def test_mistakes_are_named(call, text: str) -> None:
    with pytest.raises(ValueError, match=text):
        call()
