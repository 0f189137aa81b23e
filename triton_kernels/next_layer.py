"""Which experts the next layers will want, from the hidden state this layer starts from.

The predictor is a linear head per predicted layer: the next layer's own gate applied early
(mixtral-offloading, arXiv 2312.17238), or a trained head of the same shape. Each token's top_m
experts are wanted; an expert's probability is the largest score any token that wants it gives it,
a maximum because that does not depend on the order of tokens. The answer is a list per predicted
layer, without duplicates, most probable first: what the pager should prefetch.

A prediction never changes a result, only when pages move. So its logits may be summed in another
order than the model's gate would, and are.
"""

from __future__ import annotations

from dataclasses import dataclass, field, replace
from typing import Literal, NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor

from moe_offload.triton_kernels.launch import FLOATS, check_count, check_tensor
from moe_offload.triton_kernels.numerics import dot
from moe_offload.triton_kernels.scoring import (
    Choice,
    Scoring,
    lane_experts,
    load_or_zero,
    rank_keys,
    select_experts,
)

MAX_LAYERS = 16


@dataclass(frozen=True)
class NextLayerPredictor:
    """Linear heads for the layers that follow. P experts per predicted layer.

    Attributes:
        weight: [L', P, H], contiguous; row block l predicts layer (present + 1 + l).
        top_m: experts wanted per token, 1 to P.
        scoring: choice and score, as of the predicted layers' routers. normalize and scale are
            ignored; "softmax_topk" gives the softmax over all P as score.
        bias: fp32 [L', P] added to the logits (gpt-oss), or None.
        correction_bias: fp32 [L', P] for scoring "sigmoid", or None.
    """

    weight: Tensor
    top_m: int
    scoring: Scoring = field(default_factory=Scoring)
    bias: Tensor | None = None
    correction_bias: Tensor | None = None

    @property
    def num_layers(self) -> int:
        return self.weight.shape[0]

    @property
    def num_experts(self) -> int:
        return self.weight.shape[1]

    def check(self, op: str, hidden: Tensor) -> None:
        """Raise TypeError or ValueError unless the heads fit `hidden` [T, H] and each other."""
        check_tensor(op, "hidden", hidden, (None, None), FLOATS, contiguous=False)
        shape = (None, None, hidden.shape[1])
        check_tensor(op, "predictor.weight", self.weight, shape, (hidden.dtype,), hidden)
        check_count(op, "predictor layers", self.num_layers, 1, MAX_LAYERS)
        self.scoring.check_sizes(op, self.num_experts, self.top_m)
        for name in ("bias", "correction_bias"):
            value = getattr(self, name)
            if value is not None:
                wanted = (self.num_layers, self.num_experts)
                check_tensor(op, f"predictor.{name}", value, wanted, (torch.float32,), hidden)
        if self.correction_bias is not None and self.scoring.kind != "sigmoid":
            raise ValueError(
                f'{op}: predictor.correction_bias needs scoring "sigmoid", got '
                f"{self.scoring.kind!r}; a bias of the logits is predictor.bias"
            )

    def choice(self) -> Choice:
        """What the kernels need to know at compile time."""
        kind: Literal["softmax", "sigmoid"]
        kind = "sigmoid" if self.scoring.kind == "sigmoid" else "softmax"
        plain = replace(self.scoring, kind=kind, normalize=False, scale=1.0)
        return plain.choice(self.num_experts, self.top_m)


class Prediction(NamedTuple):
    """What the next layers will want.

    Attributes:
        next_ids: int32 [L', T, top_m], wanted by each token, best first.
        next_scores: fp32 [L', T, top_m].
        prefetch_ids: int32 [L', P], distinct, most probable first; -1 behind the last.
        prefetch_probs: fp32 [L', P], the largest score over the tokens that want it; 0 behind.
        prefetch_slots: int32 [L', P], the slot that holds it, -1 if absent; None without a table.
        num_prefetch: int32 [L'].
    """

    next_ids: Tensor
    next_scores: Tensor
    prefetch_ids: Tensor
    prefetch_probs: Tensor
    prefetch_slots: Tensor | None
    num_prefetch: Tensor

    @classmethod
    def empty(cls, num_tokens: int, predictor: NextLayerPredictor, slots: bool) -> Prediction:
        """Uninitialised; the kernels write every element."""
        layers, experts = predictor.num_layers, predictor.num_experts
        device = predictor.weight.device

        def make(dtype: torch.dtype, *shape: int) -> Tensor:
            return torch.empty(shape, dtype=dtype, device=device)

        return cls(
            make(torch.int32, layers, num_tokens, predictor.top_m),
            make(torch.float32, layers, num_tokens, predictor.top_m),
            make(torch.int32, layers, experts),
            make(torch.float32, layers, experts),
            make(torch.int32, layers, experts) if slots else None,
            make(torch.int32, layers),
        )


class Heads(NamedTuple):
    """The kernels' view of a predictor: its tensors and the slot table's rows it fills in from."""

    weight: Tensor  # [L', P, H]
    bias: Tensor | None  # fp32 [L', P]
    correction: Tensor | None  # fp32 [L', P]
    slots: Tensor | None  # int32 [L', P]


class HeadTiles(NamedTuple):
    """How a head [P, H] is cut for up to 64 tokens; SPLIT_K is a multiple of BLOCK_K."""

    H: int
    NUM_BLOCKS: int  # blocks of BLOCK_N experts
    NUM_SPLITS: int  # parts of SPLIT_K columns
    SPLIT_K: int
    BLOCK_N: int
    BLOCK_K: int

    @classmethod
    def of(cls, num_tokens: int, hidden_size: int, num_next: int) -> HeadTiles:
        """Few tokens: many parts of H, so that every SM has some 8 KB in flight (a Qwen3 gate of
        0.5 MB is 64 tiles). Many tokens: few parts, since one program adds up parts x T x P."""
        block_k, parts = (256, 16) if num_tokens <= 4 else (128, 4) if num_tokens <= 16 else (64, 2)
        split = triton.cdiv(triton.cdiv(hidden_size, parts), block_k) * block_k
        blocks, splits = triton.cdiv(num_next, 16), triton.cdiv(hidden_size, split)
        return cls(hidden_size, blocks, splits, split, 16, block_k)


@triton.jit
def head_partial(
    hidden_ptr,
    heads,
    layer,
    first_expert,
    first_k,
    num_tokens,
    num_next,
    hidden_stride,
    BLOCK_T: tl.constexpr,
    D: tl.constexpr,
):
    """Logits [BLOCK_N, BLOCK_T] of BLOCK_N experts from SPLIT_K of the H columns.

    Weights are the M operand: one token then costs no padding to 16 rows of a tensor core tile.
    """
    expert = first_expert + tl.arange(0, D.BLOCK_N)
    token = tl.arange(0, BLOCK_T)
    rows = heads.weight + (layer * num_next + expert).to(tl.int64)[:, None] * D.H
    tokens = hidden_ptr + token.to(tl.int64)[:, None] * hidden_stride
    BLOCK_N: tl.constexpr = D.BLOCK_N
    total = tl.zeros([BLOCK_N, BLOCK_T], dtype=tl.float32)
    for start in range(0, D.SPLIT_K, D.BLOCK_K):
        k = first_k + start + tl.arange(0, D.BLOCK_K)
        in_k = (k < D.H)[None, :]
        w = tl.load(rows + k[None, :], mask=(expert < num_next)[:, None] & in_k, other=0.0)
        h = tl.load(tokens + k[None, :], mask=(token < num_tokens)[:, None] & in_k, other=0.0)
        if BLOCK_T <= 2:
            product = w.to(tl.float32)[:, None, :] * h.to(tl.float32)[None, :, :]
            total += tl.sum(product, axis=2)
        else:
            total = dot(w, tl.trans(h), total)
    return total


@triton.jit
def want_experts(
    logits,  # [BLOCK_T, lanes] fp32, without biases
    tokens,  # [BLOCK_T]
    layer,
    heads,
    out,  # Prediction
    num_tokens,
    num_next,
    C: tl.constexpr,
):
    """Store each token's wanted experts; returns each lane's largest score, -1 if not wanted."""
    expert, valid = lane_experts(num_next, C)
    at = layer * num_next + expert
    logits += load_or_zero(heads.bias, at, valid)[None, :]
    correction = load_or_zero(heads.correction, at, valid)
    ids, scores, chosen, score = select_experts(logits, correction, expert, valid, C)
    column = tl.arange(0, C.BLOCK_A)
    mask = (tokens[:, None] < num_tokens) & (column[None, :] < C.TOP_K)
    at = (layer * num_tokens + tokens)[:, None].to(tl.int64) * C.TOP_K + column[None, :]
    tl.store(out.next_ids + at, ids, mask=mask)
    tl.store(out.next_scores + at, scores, mask=mask)
    # NaN would poison a maximum in some orders and not in others: it counts as certain.
    score = tl.where(score != score, 1.0, score)
    score = tl.where(chosen & (tokens[:, None] < num_tokens), score, -1.0)
    return tl.max(score, axis=0)


@triton.jit
def write_prefetch_list(
    best,  # [lanes] fp32, -1 where not wanted
    expert,  # [lanes]
    layer,
    keys_ptr,  # scratch: int64 [L', lanes]
    heads,
    out,  # Prediction
    num_next,
    LANES: tl.constexpr,
):
    """Sort the wanted experts by (probability descending, id): rank = how many are ahead."""
    wanted = best >= 0.0
    keys = tl.where(wanted, rank_keys(best, expert), -(2**63))
    keys_ptr += layer * LANES
    lane = tl.arange(0, LANES)
    tl.store(keys_ptr + lane, keys)
    tl.debug_barrier()  # the keys are now in memory, where every thread can read all of them
    CHUNK: tl.constexpr = min(LANES, max(1, 8192 // LANES))
    rank = tl.zeros([LANES], dtype=tl.int32)
    for start in range(0, LANES, CHUNK):
        other = tl.load(keys_ptr + start + tl.arange(0, CHUNK), cache_modifier=".cg")
        rank += tl.sum((other[None, :] > keys[:, None]).to(tl.int32), axis=1)

    count = tl.sum(wanted.to(tl.int32), axis=0)
    tl.store(out.num_prefetch + layer, count)
    at = layer * num_next + rank
    behind = layer * num_next + lane
    is_behind = (lane >= count) & (lane < num_next)
    tl.store(out.prefetch_ids + at, expert, mask=wanted)
    tl.store(out.prefetch_ids + behind, -1, mask=is_behind)
    tl.store(out.prefetch_probs + at, best, mask=wanted)
    tl.store(out.prefetch_probs + behind, 0.0, mask=is_behind)
    if heads.slots is not None:
        slot = tl.load(heads.slots + layer * num_next + expert, mask=wanted, other=-1)
        tl.store(out.prefetch_slots + at, slot, mask=wanted)
        tl.store(out.prefetch_slots + behind, -1, mask=is_behind)
