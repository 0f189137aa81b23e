"""route_predict_permute for up to SMALL_T tokens: everything in one launch.

Ranges of one grid have different jobs:

    programs 0 .. n - 1        choose the experts of some tokens; the last to arrive sorts all rows
    programs n .. (per layer)  a block of a predictor head times a part of H; the last to arrive
                               sums the parts, takes each token's best and writes the list

"Last to arrive" is a counter per job: whoever finds the others done does the rest and sets the
counter back to zero. No program waits for another, so nothing depends on how many run at once.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from moe_offload.triton_kernels.next_layer import (
    Heads,
    HeadTiles,
    NextLayerPredictor,
    Prediction,
    head_partial,
    want_experts,
    write_prefetch_list,
)
from moe_offload.triton_kernels.permute import Permutation, SortSizes, permute_tokens
from moe_offload.triton_kernels.route_tokens import Router, empty_keys, route_tokens
from moe_offload.triton_kernels.scoring import Scoring, lane_experts


@triton.jit
def _is_last(counter_ptr, expected):
    """Is this program the last of `expected` to get here? Then all others' stores are visible.

    The barrier puts all threads' stores before the release by the one thread that counts; readers
    load with .cg, past the L1 of their SM.
    """
    tl.debug_barrier()
    before = tl.atomic_add(counter_ptr, 1, sem="acq_rel", scope="gpu")
    last = before == expected - 1
    if last:
        tl.store(counter_ptr, 0)  # ready for the next launch
    return last


@triton.jit
def route_predict_permute_kernel(
    router,  # Router
    rows,  # out: Permutation
    hidden_ptr,  # [T, H], row stride hidden_stride; None without a predictor
    heads,  # Heads, or None
    out,  # out: Prediction, or None
    counters_ptr,  # int32 [1 + L'], zero before and after
    partial_ptr,  # scratch: fp32 [NUM_SPLITS, L', T, P]
    keys_ptr,  # scratch: int64 [L', lanes]
    num_tokens,
    num_experts,
    num_next,
    num_layers,
    logits_stride,
    hidden_stride,
    scale,
    C: tl.constexpr,  # Choice of this layer
    Z: tl.constexpr,  # SortSizes
    N: tl.constexpr,  # Choice of the next layers, or None
    D: tl.constexpr,  # HeadTiles, or None
):
    pid = tl.program_id(0)
    NUM_ROUTERS: tl.constexpr = (Z.MAX_T + Z.BLOCK_T - 1) // Z.BLOCK_T
    if pid < NUM_ROUTERS:
        tokens = pid * Z.BLOCK_T + tl.arange(0, Z.BLOCK_T)
        route_tokens(tokens, router, num_tokens, num_experts, logits_stride, scale, C)
        if _is_last(counters_ptr, NUM_ROUTERS):
            permute_tokens(router.topk_ids, rows, num_tokens, num_experts, Z)
    else:
        if N is not None:
            job = pid - NUM_ROUTERS
            layer = job // (D.NUM_BLOCKS * D.NUM_SPLITS)
            split = job % D.NUM_SPLITS
            first = job // D.NUM_SPLITS % D.NUM_BLOCKS * D.BLOCK_N
            first_k = split * D.SPLIT_K
            logits = head_partial(
                hidden_ptr,
                heads,
                layer,
                first,
                first_k,
                num_tokens,
                num_next,
                hidden_stride,
                Z.MAX_T,
                D,
            )
            expert = first + tl.arange(0, D.BLOCK_N)
            token = tl.arange(0, Z.MAX_T)
            row = ((split * num_layers + layer) * num_tokens + token).to(tl.int64)
            at = partial_ptr + row[None, :] * num_next + expert[:, None]
            tl.store(at, logits, mask=(token < num_tokens)[None, :] & (expert < num_next)[:, None])
            if _is_last(counters_ptr + 1 + layer, D.NUM_BLOCKS * D.NUM_SPLITS):
                _predict_from_partials(
                    layer,
                    partial_ptr,
                    keys_ptr,
                    heads,
                    out,
                    num_tokens,
                    num_next,
                    num_layers,
                    Z,
                    N,
                    D,
                )


@triton.jit
def _predict_from_partials(
    layer,
    partial_ptr,
    keys_ptr,
    heads,
    out,
    num_tokens,
    num_next,
    num_layers,
    Z: tl.constexpr,
    N: tl.constexpr,
    D: tl.constexpr,
):
    LANES: tl.constexpr = N.BLOCK_G * N.BLOCK_J
    MAX_T: tl.constexpr = Z.MAX_T
    BLOCK_T: tl.constexpr = min(MAX_T, max(1, 4096 // LANES))
    NUM_SPLITS: tl.constexpr = D.NUM_SPLITS
    expert, valid = lane_experts(num_next, N)
    best = tl.full([LANES], -1.0, dtype=tl.float32)
    for start in range(0, MAX_T, BLOCK_T):
        tokens = start + tl.arange(0, BLOCK_T)
        mask = (tokens < num_tokens)[:, None] & valid[None, :]
        logits = tl.zeros([BLOCK_T, LANES], dtype=tl.float32)
        for split in range(NUM_SPLITS):  # a fixed order of addition
            row = ((split * num_layers + layer) * num_tokens + tokens).to(tl.int64)
            at = partial_ptr + row[:, None] * num_next + expert[None, :]
            logits += tl.load(at, mask=mask, other=0.0, cache_modifier=".cg")
        wanted = want_experts(logits, tokens, layer, heads, out, num_tokens, num_next, N)
        best = tl.maximum(best, wanted)
    write_prefetch_list(best, expert, layer, keys_ptr, heads, out, num_next, LANES)


def launch_once(
    router: Router,
    rows: Permutation,
    scoring: Scoring,
    hidden: Tensor | None,
    predictor: NextLayerPredictor | None,
    heads: Heads | None,
    out: Prediction | None,
    workspace: Tensor,
) -> None:
    """Fill what `router`, `rows` and `out` point at; up to SMALL_T tokens."""
    (num_tokens, num_experts), top_k = router.logits.shape, router.topk_ids.shape[1]
    sizes = SortSizes.of(num_tokens, num_experts, top_k)
    num_programs = triton.cdiv(sizes.MAX_T, sizes.BLOCK_T)
    next_choice = tiles = partial = keys = None
    num_layers = num_next = 0
    if predictor is not None and hidden is not None:
        num_layers, num_next = predictor.num_layers, predictor.num_experts
        next_choice, keys = predictor.choice(), empty_keys(predictor)
        tiles = HeadTiles.of(num_tokens, hidden.shape[1], num_next)
        num_programs += num_layers * tiles.NUM_BLOCKS * tiles.NUM_SPLITS
        shape = (tiles.NUM_SPLITS, num_layers, num_tokens, num_next)
        partial = torch.empty(shape, dtype=torch.float32, device=workspace.device)
    route_predict_permute_kernel[(num_programs,)](
        router,
        rows,
        hidden,
        heads,
        out,
        workspace,
        partial,
        keys,
        num_tokens,
        num_experts,
        num_next,
        num_layers,
        router.logits.stride(0),
        0 if hidden is None else hidden.stride(0),
        scoring.scale,
        scoring.choice(num_experts, top_k),
        sizes,
        next_choice,
        tiles,
        num_warps=4 if num_tokens <= 4 else 8,
    )
