"""Quantised expert weights exactly as checkpoints hold them: layouts, and their numbers in PyTorch.

Each format is a matrix of codes and a matrix of scales. The CUDA kernels read them as they are
(`csrc/expert_gemm/cuda/weight_formats.h`); here is the same meaning in a few lines of torch: twin,
oracle, and what a backend without such kernels can compute with.

    fp8_block   codes  float8_e4m3fn [N, K]
                scales float32 [ceil(N / 128), ceil(K / 128)], "weight_scale_inv"
                DeepSeek-V3 and Qwen3 FP8 checkpoints; a weight is code * scale
    mxfp4       codes  uint8 [N, K / 32, 16], "blocks": two e2m1 a byte, the lower nibble first
                scales uint8 [N, K / 32] (or float8_e8m0fnu): 2 ** (byte - 127), 255 is NaN
                gpt-oss checkpoints; OCP Microscaling Formats 1.0, transformers.integrations.mxfp4
    int4_group  codes  int32 [N, K / 8], "weight_packed": eight codes of four bits from the lowest
                bits up, a code is the value + 8
                scales bfloat16 or float16 [N, K / group], "weight_scale"
                compressed-tensors "pack-quantized", symmetric; one group is a whole row where its
                strategy is "channel". Chosen among the int4 layouts:
                its packing is one documented function (pack_to_int32), and rows stay rows (GPTQ
                packs along K of a transposed matrix, AWQ permutes the nibbles).

Leading dimensions (experts, slots) are allowed everywhere. Worked example, mxfp4: the byte 0x31 is
0.5 then 1.5; under the scale byte 120 it is 2**-8, 3 * 2**-8.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor

FORMATS = ("plain", "fp8_block", "mxfp4", "int4_group")  # in the order of the C++ enum
FP8_BLOCK = 128
MXFP4_GROUP = 32
INT4_PER_WORD = 8
E2M1 = (0.0, 0.5, 1.0, 1.5, 2.0, 3.0, 4.0, 6.0, -0.0, -0.5, -1.0, -1.5, -2.0, -3.0, -4.0, -6.0)
E4M3_MAX = 448.0

Spec = tuple[tuple[int, ...], torch.dtype]

SCALES = "_scales"  # a page's section "down_proj" holds codes, "down_proj_scales" their scales
_FORMAT_OF_CODES = {
    torch.float8_e4m3fn: "fp8_block",
    torch.uint8: "mxfp4",
    torch.int32: "int4_group",
}


def format_of(dtype: torch.dtype) -> str:
    """The format whose codes have this dtype; "plain" for numbers to compute with."""
    return _FORMAT_OF_CODES.get(dtype, "plain")


def check_size(format: str, rows: int, columns: int, group_size: int = 0) -> None:
    """Raise ValueError unless a [rows, columns] matrix can be stored in this format."""
    if format not in FORMATS:
        known = ", ".join(FORMATS)
        raise ValueError(f"quantization: format must be one of {known}, got {format!r}")
    if format != "int4_group" and group_size:
        raise ValueError(f"quantization: only int4_group has a group_size, got one for {format}")
    if format == "int4_group" and (group_size < 32 or group_size % 32):
        raise ValueError(f"quantization: group_size must be a multiple of 32, got {group_size}")
    multiple = {"plain": 8, "fp8_block": 16, "mxfp4": MXFP4_GROUP, "int4_group": group_size}[format]
    if rows <= 0 or columns <= 0 or columns % multiple:
        raise ValueError(
            f"quantization: {format} needs columns in multiples of {multiple}, "
            f"got a matrix of [{rows}, {columns}]"
        )


def specs(
    format: str, rows: int, columns: int, dtype: torch.dtype, group_size: int = 0
) -> tuple[Spec, Spec | None]:
    """(shape, dtype) of the codes and of the scales of one [rows, columns] matrix.

    Args:
        format: of `FORMATS`; "plain" is the matrix itself and has no scales.
        dtype: of plain weights and of int4_group's scales.
        group_size: of int4_group, columns that share a scale.

    Raises:
        ValueError: `check_size`.
    """
    check_size(format, rows, columns, group_size)
    if format == "fp8_block":
        grid = (math.ceil(rows / FP8_BLOCK), math.ceil(columns / FP8_BLOCK))
        return ((rows, columns), torch.float8_e4m3fn), (grid, torch.float32)
    if format == "mxfp4":
        groups = columns // MXFP4_GROUP
        return ((rows, groups, 16), torch.uint8), ((rows, groups), torch.uint8)
    if format == "int4_group":
        return ((rows, columns // 8), torch.int32), ((rows, columns // group_size), dtype)
    return ((rows, columns), dtype), None


def _expect(ok: bool, who: str, what: str, got: Tensor) -> None:
    if not ok:
        raise ValueError(f"{who}: expected {what}, got {got.dtype} {list(got.shape)}")


def dequantise_fp8_block(
    codes: Tensor, scales: Tensor, dtype: torch.dtype = torch.float32
) -> Tensor:
    """[..., N, K] of `dtype`: code * scale of its 128 x 128 block, multiplied in at least float32.

    Args:
        codes: float8_e4m3fn [..., N, K].
        scales: float32 [..., ceil(N / 128), ceil(K / 128)].

    Raises:
        ValueError: a wrong dtype or shape.
    """
    who = "dequantise_fp8_block"
    _expect(
        codes.dtype == torch.float8_e4m3fn and codes.dim() >= 2, who, "codes e4m3 [N, K]", codes
    )
    rows, columns = codes.shape[-2:]
    grid = (math.ceil(rows / FP8_BLOCK), math.ceil(columns / FP8_BLOCK))
    fits = scales.dtype == torch.float32 and scales.shape == (*codes.shape[:-2], *grid)
    _expect(fits, who, f"scales float32 [..., {grid[0]}, {grid[1]}] for those codes", scales)
    wide = torch.float64 if dtype == torch.float64 else torch.float32
    each = scales.to(wide).repeat_interleave(FP8_BLOCK, -2).repeat_interleave(FP8_BLOCK, -1)
    return (codes.to(wide) * each[..., :rows, :columns]).to(dtype)


def dequantise_mxfp4(blocks: Tensor, scales: Tensor, dtype: torch.dtype = torch.bfloat16) -> Tensor:
    """[..., N, K] of `dtype`, exact in bfloat16 and wider but for results that these cannot hold.

    Args:
        blocks: uint8 [..., N, K / 32, 16].
        scales: uint8 or float8_e8m0fnu [..., N, K / 32].

    Raises:
        ValueError: a wrong dtype or shape.
    """
    who = "dequantise_mxfp4"
    fits = blocks.dtype == torch.uint8 and blocks.dim() >= 3 and blocks.shape[-1] == 16
    _expect(fits, who, "blocks uint8 [..., N, K / 32, 16]", blocks)
    one_byte = scales.dtype in (torch.uint8, torch.float8_e8m0fnu)
    shape = list(blocks.shape[:-1])
    _expect(one_byte and list(scales.shape) == shape, who, f"scales uint8 {shape}", scales)
    table = torch.tensor(E2M1, dtype=torch.float64, device=blocks.device)
    values = table[torch.stack([blocks & 15, blocks >> 4], -1).int()].flatten(-2)  # [..., N, g, 32]
    exponents = scales.view(torch.uint8).double() - 127
    factors = exponents.exp2().masked_fill(exponents == 128, float("nan"))
    return (values * factors[..., None]).flatten(-2).to(dtype)


def dequantise_int4_group(
    packed: Tensor, scales: Tensor, dtype: torch.dtype | None = None
) -> Tensor:
    """[..., N, K]: value * scale, rounded to the scales' dtype, as compressed-tensors does.

    Args:
        packed: int32 [..., N, K / 8].
        scales: bfloat16, float16 or float32 [..., N, K / group].
        dtype: of the result, after that rounding; None: the scales'.

    Raises:
        ValueError: a wrong dtype or shape.
    """
    who = "dequantise_int4_group"
    fits = packed.dtype == torch.int32 and packed.dim() >= 2
    _expect(fits, who, "packed int32 [..., N, K / 8]", packed)
    columns = packed.shape[-1] * 8
    fits = (
        scales.dtype in (torch.bfloat16, torch.float16, torch.float32)
        and scales.shape[:-1] == packed.shape[:-1]
        and columns % max(scales.shape[-1], 1) == 0
        and columns // max(scales.shape[-1], 1) >= 8
    )
    lead = list(packed.shape[:-1])
    _expect(fits, who, f"scales of a float dtype {[*lead, f'{columns} / group']}", scales)
    shifts = torch.arange(0, 32, 4, device=packed.device, dtype=torch.int32)
    values = ((packed[..., None] >> shifts) & 15).flatten(-2) - 8
    each = scales.repeat_interleave(columns // scales.shape[-1], -1)
    return (values.to(scales.dtype) * each).to(dtype or scales.dtype)


def dequantise(
    format: str, codes: Tensor, scales: Tensor | None, dtype: torch.dtype = torch.float64
) -> Tensor:
    """[..., N, K] of `dtype` in any format, by the functions above; plain codes are converted."""
    if format == "plain":
        return codes.to(dtype)
    if scales is None:
        raise ValueError(f"dequantise: {format} needs scales")
    known = {
        "fp8_block": dequantise_fp8_block,
        "mxfp4": dequantise_mxfp4,
        "int4_group": dequantise_int4_group,
    }
    if format not in known:
        raise ValueError(f"dequantise: format must be of {', '.join(FORMATS)}, got {format!r}")
    return known[format](codes, scales, dtype)


# ---- the other way: for tests, benchmarks and experiments --------------------------------------


def lossy_fp8_block(weight: Tensor) -> tuple[Tensor, Tensor]:
    """(codes, scales) of the nearest fp8_block matrix whose blocks' largest number is 448."""
    rows, columns = weight.shape[-2:]
    check_size("fp8_block", rows, columns)
    pad = (0, -columns % FP8_BLOCK, 0, -rows % FP8_BLOCK)
    wide = torch.nn.functional.pad(weight.float(), pad)
    blocks = wide.unflatten(-1, (-1, FP8_BLOCK)).unflatten(-3, (-1, FP8_BLOCK))
    scales = blocks.abs().amax((-3, -1)) / E4M3_MAX  # [..., N / 128, K / 128]
    scales = torch.where(scales > 0, scales, 1.0)
    each = scales.repeat_interleave(FP8_BLOCK, -2).repeat_interleave(FP8_BLOCK, -1)
    codes = (wide / each).clamp(-E4M3_MAX, E4M3_MAX).to(torch.float8_e4m3fn)
    return codes[..., :rows, :columns].contiguous(), scales


def lossy_mxfp4(weight: Tensor) -> tuple[Tensor, Tensor]:
    """(blocks, scales), the scale that of OCP Microscaling: its largest number between 4 and 8."""
    rows, columns = weight.shape[-2:]
    check_size("mxfp4", rows, columns)
    groups = weight.float().unflatten(-1, (-1, MXFP4_GROUP))
    largest = groups.abs().amax(-1)
    exponents = torch.where(largest > 0, largest, 1.0).log2().floor() - 2
    scales = (exponents + 127).clamp(0, 254)
    values = groups / (scales - 127).exp2()[..., None]
    magnitudes = torch.tensor(E2M1[:8], device=weight.device)
    middles = (magnitudes[1:] + magnitudes[:-1]) / 2
    codes = torch.bucketize(values.abs().contiguous(), middles).byte() | (
        values.signbit().byte() << 3
    )
    return codes[..., ::2] | (codes[..., 1::2] << 4), scales.byte()


def lossy_int4_group(
    weight: Tensor, group_size: int, dtype: torch.dtype = torch.bfloat16
) -> tuple[Tensor, Tensor]:
    """(packed, scales of `dtype`), each group's largest number at 7.5 steps."""
    rows, columns = weight.shape[-2:]
    check_size("int4_group", rows, columns, group_size)
    groups = weight.float().unflatten(-1, (-1, group_size))
    scales = (groups.abs().amax(-1) / 7.5).to(dtype)
    scales = torch.where(scales > 0, scales, torch.ones_like(scales))
    codes = (groups / scales.float()[..., None]).round().clamp(-8, 7).flatten(-2).long() + 8
    shifts = torch.arange(0, 32, 4, device=weight.device)
    words = (codes.unflatten(-1, (-1, 8)) << shifts).sum(-1)  # each below 2 ** 32
    return torch.where(words >= 1 << 31, words - (1 << 32), words).int(), scales


def lossy_quantise(
    format: str, weight: Tensor, dtype: torch.dtype, group_size: int = 0
) -> tuple[Tensor, Tensor | None]:
    """(codes, scales) of [..., N, K] in any format; plain is a conversion to `dtype`."""
    if format == "fp8_block":
        return lossy_fp8_block(weight)
    if format == "mxfp4":
        return lossy_mxfp4(weight)
    if format == "int4_group":
        return lossy_int4_group(weight, group_size, dtype)
    check_size(format, *weight.shape[-2:])
    return weight.to(dtype), None
