"""route_predict_permute for many tokens: three launches.

route_and_predict   choose and count tile by tile; every predictor head on tiles of tokens
sum_tiles           prefix sums of the counts (permute.py)
permute_and_list    sort the rows; write each predicted layer's list
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from moe_offload.triton_kernels.next_layer import (
    Heads,
    NextLayerPredictor,
    Prediction,
    want_experts,
    write_prefetch_list,
)
from moe_offload.triton_kernels.numerics import dot
from moe_offload.triton_kernels.permute import Permutation, SortSizes, permute_tile, sum_tiles
from moe_offload.triton_kernels.route_tokens import Router, empty_keys, route_tokens
from moe_offload.triton_kernels.scoring import Scoring, lane_experts


@triton.jit
def _predict_tokens(
    first_token,
    layer,
    hidden_ptr,
    heads,
    out,
    best_ptr,
    num_tokens,
    num_next,
    hidden_stride,
    N: tl.constexpr,
    H: tl.constexpr,
    NEXT_T: tl.constexpr,
    BLOCK_K: tl.constexpr,
):
    """All logits of NEXT_T tokens and what follows from them; many tokens need no split of H."""
    LANES: tl.constexpr = N.BLOCK_G * N.BLOCK_J
    tokens = first_token + tl.arange(0, NEXT_T)
    expert, valid = lane_experts(num_next, N)
    head_rows = heads.weight + (layer * num_next + expert).to(tl.int64)[None, :] * H
    hidden_rows = hidden_ptr + tokens.to(tl.int64)[:, None] * hidden_stride
    logits = tl.zeros([NEXT_T, LANES], dtype=tl.float32)
    for start in range(0, H, BLOCK_K):
        k = start + tl.arange(0, BLOCK_K)
        exists = (tokens < num_tokens)[:, None] & (k < H)[None, :]
        h = tl.load(hidden_rows + k[None, :], mask=exists, other=0.0)
        w = tl.load(head_rows + k[:, None], mask=valid[None, :] & (k < H)[:, None], other=0.0)
        logits = dot(h, w, logits)
    best = want_experts(logits, tokens, layer, heads, out, num_tokens, num_next, N)
    # Scores are not negative, so their bits order as integers; a maximum has no order.
    bits = best.to(tl.int32, bitcast=True) + 1
    tl.atomic_max(best_ptr + layer * num_next + expert, bits, mask=best >= 0.0)


@triton.jit
def route_and_predict_kernel(
    router,  # as route_predict_permute_kernel
    counts_ptr,  # out: int32 [num_routers, E], routes of each tile of tokens
    hidden_ptr,
    heads,
    out,
    best_ptr,  # out: int32 [L', P], zero before: 1 + bits of the largest score of a wanted expert
    num_tokens,
    num_experts,
    num_next,
    num_routers,
    num_predictors,  # tiles of NEXT_T tokens
    logits_stride,
    hidden_stride,
    scale,
    C: tl.constexpr,
    Z: tl.constexpr,
    N: tl.constexpr,
    H: tl.constexpr,
    NEXT_T: tl.constexpr,
    BLOCK_K: tl.constexpr,
):
    pid = tl.program_id(0)
    if pid < num_routers:
        tokens = pid * Z.BLOCK_T + tl.arange(0, Z.BLOCK_T)
        counts = route_tokens(tokens, router, num_tokens, num_experts, logits_stride, scale, C)
        expert, valid = lane_experts(num_experts, C)
        tl.store(counts_ptr + pid.to(tl.int64) * num_experts + expert, counts, mask=valid)
    else:
        if N is not None:
            layer = (pid - num_routers) // num_predictors
            first_token = (pid - num_routers) % num_predictors * NEXT_T
            _predict_tokens(
                first_token,
                layer,
                hidden_ptr,
                heads,
                out,
                best_ptr,
                num_tokens,
                num_next,
                hidden_stride,
                N,
                H,
                NEXT_T,
                BLOCK_K,
            )


@triton.jit
def permute_and_list_kernel(
    ids_ptr,  # int32 [T, A]
    bases_ptr,  # int32 [num_routers, E], from sum_tiles_kernel
    totals_ptr,  # int32 [E]
    rows,  # out: Permutation
    best_ptr,  # int32 [L', P], from route_and_predict_kernel; zero afterwards
    keys_ptr,  # scratch: int64 [L', lanes]
    heads,
    out,
    num_tokens,
    num_experts,
    num_next,
    num_routers,
    Z: tl.constexpr,
    N: tl.constexpr,
):
    pid = tl.program_id(0)
    if pid < num_routers:
        permute_tile(pid, ids_ptr, bases_ptr, totals_ptr, rows, num_tokens, num_experts, Z)
    else:
        if N is not None:
            LANES: tl.constexpr = N.BLOCK_G * N.BLOCK_J
            layer = pid - num_routers
            expert, valid = lane_experts(num_next, N)
            at = best_ptr + layer * num_next + expert
            bits = tl.load(at, mask=valid, other=0)
            tl.store(at, 0, mask=valid)
            best = tl.where(bits > 0, (bits - 1).to(tl.float32, bitcast=True), -1.0)
            write_prefetch_list(best, expert, layer, keys_ptr, heads, out, num_next, LANES)


def launch_chain(
    router: Router,
    rows: Permutation,
    scoring: Scoring,
    hidden: Tensor | None,
    predictor: NextLayerPredictor | None,
    heads: Heads | None,
    out: Prediction | None,
    workspace: Tensor,
) -> None:
    """As `launch_once`, for any number of tokens."""
    (num_tokens, num_experts), top_k = router.logits.shape, router.topk_ids.shape[1]
    sizes = SortSizes.of(num_tokens, num_experts, top_k)
    num_routers = triton.cdiv(num_tokens, sizes.BLOCK_T)
    counts = torch.empty(num_routers, num_experts, dtype=torch.int32, device=workspace.device)
    next_choice = best = keys = None
    num_layers = num_next = num_predictors = 0
    next_t = 16
    if predictor is not None:
        num_layers, num_next = predictor.num_layers, predictor.num_experts
        next_choice, keys = predictor.choice(), empty_keys(predictor)
        num_predictors = triton.cdiv(num_tokens, next_t)
        best = workspace[1 + num_layers :]
    route_and_predict_kernel[(num_routers + num_layers * num_predictors,)](
        router,
        counts,
        hidden,
        heads,
        out,
        best,
        num_tokens,
        num_experts,
        num_next,
        num_routers,
        num_predictors,
        router.logits.stride(0),
        0 if hidden is None else hidden.stride(0),
        scoring.scale,
        scoring.choice(num_experts, top_k),
        sizes,
        next_choice,
        H=0 if hidden is None else hidden.shape[1],
        NEXT_T=next_t,
        BLOCK_K=32,
        num_warps=8,
    )
    totals = sum_tiles(counts)
    permute_and_list_kernel[(num_routers + num_layers,)](
        router.topk_ids,
        counts,
        totals,
        rows,
        best,
        keys,
        heads,
        out,
        num_tokens,
        num_experts,
        num_next,
        num_routers,
        sizes,
        next_choice,
        num_warps=8,
    )
