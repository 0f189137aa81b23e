"""Matrix products of rows sorted by expert with weights that lie in slots.

One kernel serves both projections. For the first it gathers token rows through the permutation,
multiplies gate and up columns side by side and applies the activation before anything is written;
for the second it reads sorted rows as they are. A program computes one tile of one expert's rows;
it finds its expert from the offsets, so the grid depends on shapes only and can be captured. The
expert's slot comes from a table: -1 means "not here yet", its rows are left alone and a later call
computes them. A tile is computed the same way whichever call computes it, so results do not depend
on what arrives when.

Few rows per expert (decode): the weight tile is the left operand of the product and the rows are
its 8 or 16 columns ("swapped"), so no tensor core tile is filled with padding. Tile sizes come from
the table `choose_tiles`, by rows per expert; nothing is tuned at run time.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor

from moe_offload.activations import ACTIVATIONS
from moe_offload.triton_kernels.launch import (
    FLOATS,
    block,
    check_count,
    check_tensor,
    require_device,
)
from moe_offload.triton_kernels.numerics import activate, dot, gated_activation, round_to
from moe_offload.triton_kernels.permute import MAX_EXPERTS, Permutation


class Epilogue(NamedTuple):
    """What happens to a projection's fp32 result before it is rounded and stored.

    Attributes:
        activation: a name of moe_offload.activations.ACTIVATIONS, "clamped_swiglu", or "none".
        gate: where gate and up columns lie in the weight: "halves" (gate first), "interleaved"
            (gate 0, up 0, gate 1, ...), or "none": no gate, the activation applies to the result.
        alpha, limit, offset: of clamped_swiglu, see moe_offload.activations.Activation.
    """

    activation: str = "none"
    gate: str = "none"
    alpha: float = 1.0
    limit: float = 0.0
    offset: float = 0.0


class Tiles(NamedTuple):
    """BLOCK_M rows x BLOCK_N result columns x BLOCK_K; SWAPPED puts the weights on the left."""

    BLOCK_M: int
    BLOCK_N: int
    BLOCK_K: int
    SWAPPED: bool
    num_warps: int
    num_stages: int


# (rows per expert up to, tiles for 2-byte weights without a gate; with one, half as many columns).
# Decode: 64 columns x 128 x 2 bytes = 16 KB of weights a stage, 48 KB in flight per program; an SM
# needs about 32 KB (docs/triton_kernels.md). Prefill: two stages of 32 KB of the 99 KB of shared
# memory that sm_86 and sm_89 have. From arithmetic, not from measurements.
_TILES = (
    (4, Tiles(8, 64, 128, True, 4, 4)),
    (16, Tiles(16, 128, 64, True, 4, 4)),
    (32, Tiles(32, 128, 64, False, 4, 4)),
    (64, Tiles(64, 128, 64, False, 4, 3)),
    (1 << 62, Tiles(128, 128, 64, False, 8, 3)),
)


def choose_tiles(num_rows: int, num_experts: int, gated: bool, dtype: torch.dtype) -> Tiles:
    """Tiles for R rows over E experts; by shapes alone, so that every call agrees."""
    per_expert = num_rows / max(1, min(num_rows, num_experts))
    tiles = next(tiles for limit, tiles in _TILES if per_expert <= limit)
    if gated:
        tiles = tiles._replace(BLOCK_N=tiles.BLOCK_N // 2)
    return tiles._replace(BLOCK_K=tiles.BLOCK_K // 2) if dtype == torch.float32 else tiles


@triton.jit
def _find_tile(offsets_ptr, num_experts, BLOCK_M: tl.constexpr, BLOCK_E: tl.constexpr):
    """Expert, first row and end row of this program's tile; expert = num_experts beyond the last.

    Experts take as many programs as they have tiles, in order: the expert is the number of experts
    whose tiles all lie before this program.
    """
    pid = tl.program_id(0)
    expert = tl.arange(0, BLOCK_E)
    exists = expert < num_experts
    starts = tl.load(offsets_ptr + expert, mask=exists, other=0)
    ends = tl.load(offsets_ptr + expert + 1, mask=exists, other=0)
    tiles = (ends - starts + BLOCK_M - 1) // BLOCK_M
    tiles_end = tl.cumsum(tiles, axis=0)
    found = tl.sum(((tiles_end <= pid) & exists).to(tl.int32), axis=0)
    is_it = expert == found
    first_tile = tl.sum(tl.where(is_it, tiles_end - tiles, 0), axis=0)
    start = tl.sum(tl.where(is_it, starts, 0), axis=0)
    end = tl.sum(tl.where(is_it, ends, 0), axis=0)
    return found, start + (pid - first_tile) * BLOCK_M, end


@triton.jit
def grouped_gemm_kernel(
    x_ptr,  # [T, K] when GATHER, else [R, K]; row stride x_stride
    weight_ptr,  # [S, N, K] seen through its strides
    bias_ptr,  # [S, N] with slot stride bias_slot, dense in N; or None
    offsets_ptr,  # int32 [E + 1]
    slots_ptr,  # int32 [E], -1: leave the expert's rows alone
    row_route_ptr,  # int32 [R], read when GATHER
    out_ptr,  # out: [R, F], row stride out_stride
    num_experts,
    x_stride,
    weight_slot,  # strides of the weight, in elements
    weight_n,
    weight_k,
    bias_slot,
    out_stride,
    alpha,
    limit,
    offset,
    K: tl.constexpr,
    F: tl.constexpr,  # result columns: N, or N / 2 with a gate
    TOP_K: tl.constexpr,
    GATHER: tl.constexpr,
    GATE: tl.constexpr,
    ACTIVATION: tl.constexpr,
    BLOCK_E: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_K: tl.constexpr,
    SWAPPED: tl.constexpr,
):
    expert, first_row, end_row = _find_tile(offsets_ptr, num_experts, BLOCK_M, BLOCK_E)
    slot = tl.load(slots_ptr + expert, mask=expert < num_experts, other=-1)
    if slot >= 0:
        row = first_row + tl.arange(0, BLOCK_M)
        in_rows = row < end_row
        source = row
        if GATHER:
            source = tl.load(row_route_ptr + row, mask=in_rows, other=0) // TOP_K
        # Interleaved gate and up are loaded as neighbours and parted at the end: whole lines.
        COLUMNS: tl.constexpr = 2 * BLOCK_N if GATE == "interleaved" else BLOCK_N
        NUM_COLUMNS: tl.constexpr = 2 * F if GATE == "interleaved" else F
        column = tl.program_id(1) * COLUMNS + tl.arange(0, COLUMNS)
        in_columns = column < NUM_COLUMNS

        # Slots of large pools lie beyond 2^31 elements.
        weight = weight_ptr + slot.to(tl.int64) * weight_slot
        weight += column.to(tl.int64)[:, None] * weight_n
        x = x_ptr + source.to(tl.int64)[:, None] * x_stride
        if SWAPPED:
            total = tl.zeros([COLUMNS, BLOCK_M], dtype=tl.float32)
        else:
            total = tl.zeros([BLOCK_M, COLUMNS], dtype=tl.float32)
        total_up = total
        for start in range(0, K, BLOCK_K):
            k = start + tl.arange(0, BLOCK_K)
            at_weight = weight + k.to(tl.int64)[None, :] * weight_k
            if K % BLOCK_K == 0:
                weight_mask = in_columns[:, None]
                x_mask = in_rows[:, None]
            else:
                weight_mask = in_columns[:, None] & (k < K)[None, :]
                x_mask = in_rows[:, None] & (k < K)[None, :]
            values = tl.load(x + k[None, :], mask=x_mask, other=0.0)
            w = tl.load(at_weight, mask=weight_mask, other=0.0)
            total = _multiply(w, values, total, SWAPPED)
            if GATE == "halves":
                w = tl.load(at_weight + weight_n * F, mask=weight_mask, other=0.0)
                total_up = _multiply(w, values, total_up, SWAPPED)

        if SWAPPED:
            total = tl.trans(total)
            total_up = tl.trans(total_up)
        if bias_ptr is not None:
            bias = bias_ptr + slot.to(tl.int64) * bias_slot + column
            total += tl.load(bias, mask=in_columns, other=0.0).to(tl.float32)[None, :]
            if GATE == "halves":
                total_up += tl.load(bias + F, mask=in_columns, other=0.0).to(tl.float32)[None, :]
        if GATE == "interleaved":
            total, total_up = tl.split(tl.reshape(total, [BLOCK_M, BLOCK_N, 2]))
        if GATE != "none":
            total = gated_activation(total, total_up, ACTIVATION, alpha, limit, offset)
        elif ACTIVATION != "none":
            total = activate(total, ACTIVATION)

        feature = tl.program_id(1) * BLOCK_N + tl.arange(0, BLOCK_N)
        at_out = out_ptr + row.to(tl.int64)[:, None] * out_stride + feature[None, :]
        result = round_to(total, out_ptr.dtype.element_ty)
        tl.store(at_out, result, mask=in_rows[:, None] & (feature < F)[None, :])


@triton.jit
def _multiply(weights, rows, total, SWAPPED: tl.constexpr):  # [N, K], [M, K]
    if SWAPPED:
        return dot(weights, tl.trans(rows), total)
    else:
        return dot(rows, tl.trans(weights), total)


def grouped_gemm(
    x: Tensor,
    weight: Tensor,
    rows: Permutation,
    slots: Tensor,
    *,
    gather: bool = False,
    bias: Tensor | None = None,
    epilogue: Epilogue | None = None,
    transposed: bool = False,
    out: Tensor | None = None,
) -> Tensor:
    """out[r] = epilogue(x[r] @ weight[slots[e]].T + bias[slots[e]]) for the rows r of each expert.

    Args:
        x: [T, K] with gather, where row r reads token rows.row_route[r] // A; else [R, K] sorted.
            float32, float16 or bfloat16, dense rows, on a CUDA device.
        weight: [S, N, K] of x's dtype, or [S, K, N] when transposed; the last dimension dense, any
            distance between slots (views into a slab of pages).
        rows: from `permute` or `route_predict_permute`.
        slots: int32 [E], the slot of each expert with rows; below 0, the expert's rows of out are
            not written. Values are not checked: that would read them back from the device.
        gather: x is in token order.
        bias: [S, N] of x's dtype, dense in N, or None.
        epilogue: activation and gate, default none. With a gate out has F = N / 2 columns.
        transposed: layout of weight (gpt-oss).
        out: [R, F] of x's dtype, dense rows, to complete an earlier call; default new memory, in
            which rows that no expert here has are undefined.

    Returns:
        out. One launch on the current stream; does not block the host.

    Raises:
        TypeError, ValueError, RuntimeError: arguments that do not fit, or tensors on the CPU.

    Cost: 2 R N K FLOPs; reads each present expert's N K weights (again for every BLOCK_M rows, then
    mostly from L2) and R K elements of x per BLOCK_N columns, writes R F elements.
    Twin: reference.grouped_gemm.

    Example:
        >>> inner = grouped_gemm(hidden, gate_up, order, slots, gather=True,
        ...                      epilogue=Epilogue("silu", "halves"))        # [R, F]
        >>> out = combine(grouped_gemm(inner, down, order, slots), order.route_row, weights)
    """
    op = "grouped_gemm"
    epilogue = epilogue or Epilogue()
    num_rows, top_k = rows.row_route.numel(), rows.route_row.shape[1]
    num_experts = rows.expert_offsets.numel() - 1
    _check_epilogue(op, epilogue)
    check_count(op, "experts (of rows)", num_experts, 1, MAX_EXPERTS)
    x_rows = rows.route_row.shape[0] if gather else num_rows
    check_tensor(op, "x", x, (x_rows, None), FLOATS, contiguous=False)
    inner = x.shape[1]
    shape = (None, inner, None) if transposed else (None, None, inner)
    check_tensor(op, "weight", weight, shape, (x.dtype,), x, contiguous=False)
    num_columns = weight.shape[2 if transposed else 1]
    if epilogue.gate != "none" and num_columns % 2:
        raise ValueError(f"{op}: weight must have gate and up columns in pairs, got {num_columns}")
    features = num_columns if epilogue.gate == "none" else num_columns // 2
    check_tensor(op, "slots", slots, (num_experts,), (torch.int32,), x)
    check_tensor(op, "rows.expert_offsets", rows.expert_offsets, (None,), (torch.int32,), x)
    if bias is not None:
        wanted = (weight.shape[0], num_columns)
        check_tensor(op, "bias", bias, wanted, (x.dtype,), x, contiguous=False)
    if out is None:
        out = torch.empty(num_rows, features, dtype=x.dtype, device=x.device)
    else:
        check_tensor(op, "out", out, (num_rows, features), (x.dtype,), x, contiguous=False)

    with require_device(op, x):
        if out.numel() == 0:
            return out
        tiles = choose_tiles(num_rows, num_experts, epilogue.gate != "none", x.dtype)
        # Every expert with rows may end in a partial tile.
        num_tiles = num_rows // tiles.BLOCK_M + min(num_rows, num_experts)
        stride_n, stride_k = weight.stride(1), weight.stride(2)
        if transposed:
            stride_n, stride_k = stride_k, stride_n
        grouped_gemm_kernel[(num_tiles, triton.cdiv(features, tiles.BLOCK_N))](
            x,
            weight,
            bias,
            rows.expert_offsets,
            slots,
            rows.row_route,
            out,
            num_experts,
            x.stride(0),
            weight.stride(0),
            stride_n,
            stride_k,
            0 if bias is None else bias.stride(0),
            out.stride(0),
            epilogue.alpha,
            epilogue.limit,
            epilogue.offset,
            K=inner,
            F=features,
            TOP_K=top_k,
            GATHER=gather,
            GATE=epilogue.gate,
            ACTIVATION=epilogue.activation,
            BLOCK_E=block(num_experts),
            BLOCK_M=tiles.BLOCK_M,
            BLOCK_N=tiles.BLOCK_N,
            BLOCK_K=tiles.BLOCK_K,
            SWAPPED=tiles.SWAPPED,
            num_warps=tiles.num_warps,
            num_stages=tiles.num_stages,
        )
    return out


def _check_epilogue(op: str, epilogue: Epilogue) -> None:
    if epilogue.gate not in ("none", "halves", "interleaved"):
        raise ValueError(
            f"{op}: epilogue.gate must be none, halves or interleaved, got {epilogue.gate!r}"
        )
    known = [*ACTIVATIONS] + (["none"] if epilogue.gate == "none" else ["clamped_swiglu"])
    if epilogue.activation not in known:
        raise ValueError(
            f"{op}: epilogue.activation must be one of {', '.join(known)} with gate "
            f"{epilogue.gate!r}, got {epilogue.activation!r}"
        )
