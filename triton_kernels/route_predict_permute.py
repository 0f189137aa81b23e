"""Which experts now, which next, and the rows sorted by expert: one launch for up to 64 tokens.

Each of these steps is far shorter than a launch (2 to 3 us in a graph), so the launches are the
cost. They differ in shape: choosing needs one program, the predictor's matrix wants many. So ranges
of one grid have different jobs:

    programs 0 .. n - 1        choose the experts of some tokens; the last to arrive sorts all rows
    programs n .. (per layer)  a block of a predictor head times a part of H; the last to arrive
                               sums the parts, takes each token's best and writes the list

"Last to arrive" is a counter per job: whoever finds the others done does the rest and sets the
counter back to zero. No program waits for another, so nothing depends on how many run at once.
More than 64 tokens take a chain of three launches (choose and predict; prefix sums; sort and list).

No other kernel that predicts the next layer in the launch that routes this one was found
(reference: kernel survey, November 2026); the parts are known, see docs/triton_kernels.md.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor

from moe_offload.triton_kernels.launch import (
    FLOATS,
    check_count,
    check_tensor,
    require_device,
)
from moe_offload.triton_kernels.next_layer import (
    Heads,
    HeadTiles,
    NextLayerPredictor,
    Prediction,
    head_partial,
    want_experts,
    write_prefetch_list,
)
from moe_offload.triton_kernels.numerics import dot, round_to
from moe_offload.triton_kernels.permute import (
    MAX_EXPERTS,
    MAX_TOP_K,
    SMALL_T,
    Permutation,
    SortSizes,
    empty_permutation,
    permute_tile,
    permute_tokens,
    sum_tiles,
)
from moe_offload.triton_kernels.scoring import (
    Choice,
    Scoring,
    lane_experts,
    load_or_zero,
    select_experts,
)


class Routing(NamedTuple):
    """Everything a layer needs to start.

    Attributes:
        topk_ids: int32 [T, A], best first; equal scores by lowest id.
        topk_weights: [T, A] in `weights_dtype`.
        topk_slots: int32 [T, A], the slot that holds each expert, -1 if absent; None without table.
        rows: the routes sorted by expert.
        prediction: what the next layers will want, None without a predictor.
    """

    topk_ids: Tensor
    topk_weights: Tensor
    topk_slots: Tensor | None
    rows: Permutation
    prediction: Prediction | None


class Router(NamedTuple):
    """The kernels' view of what a routing program reads and writes."""

    logits: Tensor  # [T, E], row stride logits_stride
    correction: Tensor | None  # fp32 [E]
    slots: Tensor | None  # int32 [E], this layer's row of the slot table
    topk_ids: Tensor  # out, see Routing
    topk_weights: Tensor
    topk_slots: Tensor | None


@triton.jit
def _route_tokens(tokens, router, num_tokens, num_experts, stride, scale, C: tl.constexpr):
    """Choose, store ids, weights and slots; returns how many of the tokens chose each lane."""
    expert, valid = lane_experts(num_experts, C)
    correction = load_or_zero(router.correction, expert, valid)
    exists = tokens < num_tokens
    at = router.logits + tokens[:, None].to(tl.int64) * stride + expert[None, :]
    logits = tl.load(at, mask=exists[:, None] & valid[None, :], other=0.0).to(tl.float32)
    ids, weights, chosen, _ = select_experts(logits, correction, expert, valid, C)

    column = tl.arange(0, C.BLOCK_A)
    mask = exists[:, None] & (column[None, :] < C.TOP_K)
    at = tokens[:, None].to(tl.int64) * C.TOP_K + column[None, :]
    tl.store(router.topk_ids + at, ids, mask=mask)
    weights = round_to(weights * scale, router.topk_weights.dtype.element_ty)
    tl.store(router.topk_weights + at, weights, mask=mask)
    if router.slots is not None:
        slots = tl.load(router.slots + ids, mask=mask, other=-1)
        tl.store(router.topk_slots + at, slots, mask=mask)
    return tl.sum((chosen & exists[:, None]).to(tl.int32), axis=0)


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
        _route_tokens(tokens, router, num_tokens, num_experts, logits_stride, scale, C)
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
        counts = _route_tokens(tokens, router, num_tokens, num_experts, logits_stride, scale, C)
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


def routing_workspace(predictor: NextLayerPredictor | None, device: torch.device | str) -> Tensor:
    """The counters of `route_predict_permute`, int32 zeros, zero again after each call.

    Allocate once per stream: calls that may run at the same time must not share one. It fits
    every call with this predictor, or one with as many layers and experts, of any T.
    """
    return torch.zeros(_workspace_size(predictor), dtype=torch.int32, device=device)


def _workspace_size(predictor: NextLayerPredictor | None) -> int:
    return 1 if predictor is None else 1 + predictor.num_layers * (1 + predictor.num_experts)


def route_predict_permute(
    logits: Tensor,
    top_k: int,
    scoring: Scoring | None = None,
    *,
    correction_bias: Tensor | None = None,
    slot_of: Tensor | None = None,
    layer: int = 0,
    hidden: Tensor | None = None,
    predictor: NextLayerPredictor | None = None,
    weights_dtype: torch.dtype = torch.float32,
    workspace: Tensor | None = None,
) -> Routing:
    """Choose this layer's experts, sort the rows, and say what the next layers will want.

    Args:
        logits: [T, E] of the router, float32, float16 or bfloat16, dense rows, on a CUDA device;
            E up to 4096. The router's own product stays with the model: another order of summation
            could turn a near tie.
        top_k: A, 1 to 64.
        scoring: how logits become choices and weights; default Scoring(), plain softmax.
        correction_bias: fp32 [E], for "sigmoid".
        slot_of: int32 [L, E], which slot holds (layer, expert), -1 absent. Slot ids are int32.
        layer: this layer's row in slot_of; the predicted layers are the rows after it.
        hidden: [T, H], what the predictor reads; dense rows.
        predictor: heads for the next layers, or None.
        weights_dtype: dtype of topk_weights; the arithmetic is fp32.
        workspace: from `routing_workspace`, one per stream. None allocates zeros for this call,
            which costs a memset.

    Returns:
        Routing. Does not block the host: all launches go to the current stream, their number and
        shapes depend on the arguments' shapes only, so the call can be captured in a CUDA graph.

    Raises:
        TypeError, ValueError: arguments that do not fit; the message names the one.
        RuntimeError: tensors on the CPU without the interpreter.

    Cost: reads T E logits and L' P (H + T) head weights and parts, writes 4 T A (5) + 4 L' (T top_m
    2 + P 3) bytes; 2 T L' P H FLOPs. One launch for T <= 64, three above.
    Twin: reference.route_predict_permute.

    Example:
        >>> routing = route_predict_permute(logits, 8, Scoring(normalize=True))
        >>> rows = hidden[routing.rows.row_route // 8]
    """
    op = "route_predict_permute"
    scoring = scoring or Scoring()
    check_tensor(op, "logits", logits, (None, None), FLOATS, contiguous=False)
    num_tokens, num_experts = logits.shape
    check_count(op, "experts (columns of logits)", num_experts, 1, MAX_EXPERTS)
    scoring.check_sizes(op, num_experts, top_k)
    check_count(op, "top_k", top_k, 1, MAX_TOP_K)
    if weights_dtype not in FLOATS:
        raise TypeError(
            f"{op}: weights_dtype must be float32, float16 or bfloat16, got {weights_dtype}"
        )
    if correction_bias is not None:
        wanted = (num_experts,)
        check_tensor(op, "correction_bias", correction_bias, wanted, (torch.float32,), logits)
        if scoring.kind != "sigmoid":
            raise ValueError(f'{op}: correction_bias needs scoring "sigmoid", got {scoring.kind!r}')
    if (hidden is None) != (predictor is None):
        got = "predictor" if hidden is None else "hidden"
        raise ValueError(f"{op}: give hidden and predictor together, got only {got}")
    if predictor is not None and hidden is not None:
        shape = (num_tokens, None)
        check_tensor(op, "hidden", hidden, shape, FLOATS, logits, contiguous=False)
        predictor.check(op, hidden)
    slots, next_slots = _slot_rows(op, slot_of, layer, logits, predictor)
    if workspace is not None:
        check_tensor(op, "workspace", workspace, (None,), (torch.int32,), logits)
        if workspace.numel() < _workspace_size(predictor):
            raise ValueError(
                f"{op}: workspace must hold {_workspace_size(predictor)} counters for this "
                f"predictor, got {workspace.numel()}; use routing_workspace(predictor, device)"
            )

    with require_device(op, logits):
        if workspace is None:
            workspace = routing_workspace(predictor, logits.device)
        topk_ids = torch.empty(num_tokens, top_k, dtype=torch.int32, device=logits.device)
        topk_weights = torch.empty_like(topk_ids, dtype=weights_dtype)
        topk_slots = None if slots is None else torch.empty_like(topk_ids)
        prediction = heads = None
        if predictor is not None:
            prediction = Prediction.empty(num_tokens, predictor, next_slots is not None)
            biases = (predictor.bias, predictor.correction_bias)
            heads = Heads(predictor.weight, *biases, next_slots)
        if num_tokens == 0:
            rows = empty_permutation(top_k, num_experts, logits.device)
            return Routing(topk_ids, topk_weights, topk_slots, rows, _nothing(prediction))
        rows = Permutation.empty(num_tokens, top_k, num_experts, logits.device)
        router = Router(logits, correction_bias, slots, topk_ids, topk_weights, topk_slots)
        launch = _launch_once if num_tokens <= SMALL_T else _launch_chain
        launch(router, rows, scoring, hidden, predictor, heads, prediction, workspace)
        return Routing(topk_ids, topk_weights, topk_slots, rows, prediction)


def _launch_once(
    router: Router,
    rows: Permutation,
    scoring: Scoring,
    hidden: Tensor | None,
    predictor: NextLayerPredictor | None,
    heads: Heads | None,
    out: Prediction | None,
    workspace: Tensor,
) -> None:
    (num_tokens, num_experts), top_k = router.logits.shape, router.topk_ids.shape[1]
    sizes = SortSizes.of(num_tokens, num_experts, top_k)
    num_programs = triton.cdiv(sizes.MAX_T, sizes.BLOCK_T)
    next_choice = tiles = partial = keys = None
    num_layers = num_next = 0
    if predictor is not None and hidden is not None:
        num_layers, num_next = predictor.num_layers, predictor.num_experts
        next_choice, keys = predictor.choice(), _empty_keys(predictor)
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


def _launch_chain(
    router: Router,
    rows: Permutation,
    scoring: Scoring,
    hidden: Tensor | None,
    predictor: NextLayerPredictor | None,
    heads: Heads | None,
    out: Prediction | None,
    workspace: Tensor,
) -> None:
    (num_tokens, num_experts), top_k = router.logits.shape, router.topk_ids.shape[1]
    sizes = SortSizes.of(num_tokens, num_experts, top_k)
    num_routers = triton.cdiv(num_tokens, sizes.BLOCK_T)
    counts = torch.empty(num_routers, num_experts, dtype=torch.int32, device=workspace.device)
    next_choice = best = keys = None
    num_layers = num_next = num_predictors = 0
    next_t = 16
    if predictor is not None:
        num_layers, num_next = predictor.num_layers, predictor.num_experts
        next_choice, keys = predictor.choice(), _empty_keys(predictor)
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


def _empty_keys(predictor: NextLayerPredictor) -> Tensor:
    choice: Choice = predictor.choice()
    shape = (predictor.num_layers, choice.BLOCK_G * choice.BLOCK_J)
    return torch.empty(shape, dtype=torch.int64, device=predictor.weight.device)


def _nothing(prediction: Prediction | None) -> Prediction | None:
    """The prediction from no tokens."""
    if prediction is not None:
        prediction.prefetch_ids.fill_(-1)
        prediction.prefetch_probs.zero_()
        prediction.num_prefetch.zero_()
        if prediction.prefetch_slots is not None:
            prediction.prefetch_slots.fill_(-1)
    return prediction


def _slot_rows(
    op: str,
    slot_of: Tensor | None,
    layer: int,
    logits: Tensor,
    predictor: NextLayerPredictor | None,
) -> tuple[Tensor | None, Tensor | None]:
    """The slot table's rows of this layer and of the predicted ones."""
    if slot_of is None:
        return None, None
    num_experts = logits.shape[1]
    check_tensor(op, "slot_of", slot_of, (None, num_experts), (torch.int32,), logits)
    check_count(op, "layer", layer, 0, slot_of.shape[0] - 1)
    if predictor is None:
        return slot_of[layer], None
    last = layer + predictor.num_layers
    if predictor.num_experts != num_experts or last >= slot_of.shape[0]:
        raise ValueError(
            f"{op}: the predictor is for {predictor.num_layers} layers of {predictor.num_experts} "
            f"experts after layer {layer}; slot_of has {slot_of.shape[0]} layers of {num_experts}"
        )
    return slot_of[layer], slot_of[layer + 1 : last + 1]
