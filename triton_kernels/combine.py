"""Rows back to tokens: the weighted sum over a token's experts, in the order of its choices.

The order is fixed (rank of the choice), so the sum does not depend on which expert's rows were
computed first, and there are no atomics. A program owns some columns of one token.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from moe_offload.triton_kernels.launch import FLOATS, check_tensor, require_device
from moe_offload.triton_kernels.numerics import round_to


@triton.jit
def combine_kernel(
    rows_ptr,  # [R, H], row stride rows_stride
    route_row_ptr,  # int32 [T, A], -1 for a choice that has no row
    weights_ptr,  # [T, A]
    out_ptr,  # out: [T, H]
    H,
    rows_stride,
    TOP_K: tl.constexpr,
    BLOCK_H: tl.constexpr,
):
    token = tl.program_id(0).to(tl.int64)
    column = tl.program_id(1) * BLOCK_H + tl.arange(0, BLOCK_H)
    total = tl.zeros([BLOCK_H], dtype=tl.float32)
    for rank in range(TOP_K):
        row = tl.load(route_row_ptr + token * TOP_K + rank)
        weight = tl.load(weights_ptr + token * TOP_K + rank).to(tl.float32)
        at = rows_ptr + row.to(tl.int64) * rows_stride + column
        value = tl.load(at, mask=(column < H) & (row >= 0), other=0.0).to(tl.float32)
        # A choice without a row adds nothing, even if its weight is infinite or NaN.
        total += tl.where(row >= 0, weight * value, 0.0)
    total = round_to(total, out_ptr.dtype.element_ty)
    tl.store(out_ptr + token * H + column, total, mask=column < H)


def combine(
    rows: Tensor, route_row: Tensor, topk_weights: Tensor, *, dtype: torch.dtype | None = None
) -> Tensor:
    """out[t] = sum over a = 0 .. A-1, in this order, of topk_weights[t, a] * rows[route_row[t, a]].

    Args:
        rows: [R, H] float32, float16 or bfloat16, dense rows, on a CUDA device.
        route_row: int32 [T, A], contiguous: `Permutation.route_row`; -1 contributes nothing.
        topk_weights: [T, A] float32, float16 or bfloat16, contiguous.
        dtype: of the result, default that of rows. Products and sums are fp32, rounded once.

    Returns:
        [T, H]. Deterministic. Does not block the host; one launch on the current stream.

    Raises:
        TypeError, ValueError, RuntimeError: arguments that do not fit, or tensors on the CPU.

    Cost: reads T A H and writes T H elements. Twin: reference.combine.

    Example:
        >>> out = combine(rows, order.route_row, topk_weights)
    """
    op = "combine"
    check_tensor(op, "rows", rows, (None, None), FLOATS, contiguous=False)
    check_tensor(op, "route_row", route_row, (None, None), (torch.int32,), rows)
    check_tensor(op, "topk_weights", topk_weights, tuple(route_row.shape), FLOATS, rows)
    dtype = rows.dtype if dtype is None else dtype
    if dtype not in FLOATS:
        raise TypeError(f"{op}: dtype must be float32, float16 or bfloat16, got {dtype}")
    (num_tokens, top_k), hidden_size = route_row.shape, rows.shape[1]
    out = torch.empty(num_tokens, hidden_size, dtype=dtype, device=rows.device)
    with require_device(op, rows):
        if out.numel() and not rows.numel():
            return out.zero_()
        if out.numel():
            # One token: many small programs, or a few SMs would do all the reading.
            columns = 128 if num_tokens <= 8 else 512
            combine_kernel[(num_tokens, triton.cdiv(hidden_size, columns))](
                rows,
                route_row,
                topk_weights,
                out,
                hidden_size,
                rows.stride(0),
                TOP_K=top_k,
                BLOCK_H=columns,
                num_warps=4,
            )
    return out
