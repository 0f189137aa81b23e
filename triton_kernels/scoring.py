"""From router logits to a token's experts and their weights: the scoring rules of the MoE families.

All families choose the A best experts of a token; they differ in what "best" compares and in what
the weight is. Three rules cover them:

    softmax        weight = softmax over all E, maybe renormalised     Mixtral, Qwen-MoE, OLMoE
    softmax_topk   weight = softmax over the chosen A                  gpt-oss, Granite
    sigmoid        choose by sigmoid + correction bias, weight =       DeepSeek-V3, GLM-4-MoE
                   sigmoid without the bias; experts may be limited
                   to the groups whose two best add up to most

The choice compares raw logits where the score is monotone in them, so rounding in exp cannot make
or break a tie. Equal scores go to the lowest expert id. torch.topk promises no order among equal
scores (its CPU and CUDA versions differ), so where a score occurs twice our choice is one of those
torch may make, and always the same one. NaN ranks above everything, as in torch.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal, NamedTuple

import triton
import triton.language as tl

from moe_offload.triton_kernels.launch import block, check_count
from moe_offload.triton_kernels.numerics import exact_sigmoid

_LOWEST = tl.constexpr(-(2**63))


@dataclass(frozen=True)
class Scoring:
    """How logits become choices and weights.

    Attributes:
        kind: see the module's table.
        normalize: divide a token's A weights by their sum ("softmax_topk" sums to one anyway).
        num_groups, top_groups: only experts of the `top_groups` best of `num_groups` equal groups
            of consecutive experts may be chosen (DeepSeek-V3, arXiv 2412.19437); 1, 1 is no limit.
        scale: multiplies the weights at the end (DeepSeek's routed_scaling_factor).
    """

    kind: Literal["softmax", "softmax_topk", "sigmoid"] = "softmax"
    normalize: bool = False
    num_groups: int = 1
    top_groups: int = 1
    scale: float = 1.0

    def __post_init__(self) -> None:
        if self.kind not in ("softmax", "softmax_topk", "sigmoid"):
            raise ValueError(
                f"Scoring: kind must be softmax, softmax_topk or sigmoid, got {self.kind!r}"
            )
        check_count("Scoring", "num_groups", self.num_groups, 1, 64)
        check_count("Scoring", "top_groups", self.top_groups, 1, self.num_groups)

    def check_sizes(self, op: str, num_experts: int, top_k: int) -> None:
        """Raise ValueError if `top_k` of `num_experts` cannot be chosen under the group limit."""
        check_count(op, "top_k", top_k, 1, num_experts)
        if num_experts % self.num_groups or (
            self.num_groups > 1 and num_experts // self.num_groups < 2
        ):
            raise ValueError(
                f"{op}: num_groups must divide the experts into groups of two or more, got "
                f"{self.num_groups} groups of {num_experts} experts"
            )
        allowed = num_experts // self.num_groups * self.top_groups
        if top_k > allowed:
            raise ValueError(
                f"{op}: top_k = {top_k}, but {self.top_groups} of {self.num_groups} groups hold "
                f"only {allowed} of the {num_experts} experts"
            )

    def choice(self, num_experts: int, top_k: int) -> Choice:
        """What the kernels need to know at compile time."""
        group = num_experts // self.num_groups
        return Choice(
            self.kind,
            self.normalize,
            top_k,
            block(top_k),
            group,
            self.top_groups,
            block(self.num_groups),
            block(group),
        )


class Choice(NamedTuple):
    """A Scoring for given sizes. A tile has BLOCK_G * BLOCK_J lanes, see `lane_experts`."""

    KIND: str
    NORMALIZE: bool
    TOP_K: int
    BLOCK_A: int
    EXPERTS_PER_GROUP: int
    TOP_GROUPS: int
    BLOCK_G: int
    BLOCK_J: int


@triton.jit
def rank_keys(score, index):
    """int64 keys that sort as (score descending, index ascending), NaN first; -0 equals 0."""
    score = tl.where(score == 0.0, 0.0, score)
    bits = score.to(tl.int32, bitcast=True)
    bits = bits ^ ((bits >> 31) & 0x7FFFFFFF)  # negative floats sort backwards as integers
    bits = tl.where(score != score, 0x7FFFFFFF, bits)
    return (bits.to(tl.int64) << 32) | (0x7FFFFFFF - index).to(tl.int64)


@triton.jit
def key_index(key):
    """The index a key was made with."""
    return 0x7FFFFFFF - (key & 0x7FFFFFFF).to(tl.int32)


@triton.jit
def lane_experts(num_experts, C: tl.constexpr):
    """Expert of each lane of a [tokens, BLOCK_G * BLOCK_J] tile, and whether there is one.

    A group takes BLOCK_J lanes, so that a group is a row of the tile reshaped. Example: 6 experts
    in 2 groups have BLOCK_J = 4 and the lanes 0 1 2 . 3 4 5 .
    """
    lane = tl.arange(0, C.BLOCK_G * C.BLOCK_J)
    within = lane % C.BLOCK_J
    expert = lane // C.BLOCK_J * C.EXPERTS_PER_GROUP + within
    return expert, (within < C.EXPERTS_PER_GROUP) & (expert < num_experts)


@triton.jit
def select_experts(
    logits,  # [BLOCK_T, lanes] fp32
    correction,  # [lanes] fp32, added to the sigmoid for the choice only
    experts,  # [lanes] int32, from lane_experts
    valid,  # [lanes]
    C: tl.constexpr,
):
    """A token's TOP_K experts: ids and weights [BLOCK_T, BLOCK_A], chosen lanes, all scores.

    One round per choice, each a maximum over the lanes; a key carries score and expert, so a
    round needs one reduction. Columns from TOP_K on hold id 0 and weight 0.
    """
    BLOCK_T: tl.constexpr = logits.shape[0]
    KIND: tl.constexpr = C.KIND
    TOP_K: tl.constexpr = C.TOP_K
    BLOCK_A: tl.constexpr = C.BLOCK_A
    if KIND == "sigmoid":
        score = exact_sigmoid(logits)  # the last bit can decide
        choice = score + correction[None, :]
    else:
        choice = logits
        score = logits
        if KIND == "softmax":
            masked = tl.where(valid[None, :], logits, float("-inf"))
            score = tl.exp(masked - tl.max(masked, axis=1)[:, None])
            score = score / tl.sum(score, axis=1)[:, None]

    keys = tl.where(valid[None, :], rank_keys(choice, experts[None, :]), _LOWEST)
    if C.BLOCK_G > 1:
        keys = _keep_best_groups(keys, choice, C)

    column = tl.arange(0, BLOCK_A)
    ids = tl.zeros([BLOCK_T, BLOCK_A], dtype=tl.int32)
    weights = tl.zeros([BLOCK_T, BLOCK_A], dtype=tl.float32)
    chosen = experts[None, :] < tl.zeros([BLOCK_T, 1], dtype=tl.int32)  # none
    for rank in range(TOP_K):
        expert = key_index(tl.max(keys, axis=1))  # [BLOCK_T]
        here = (experts[None, :] == expert[:, None]) & valid[None, :]
        weight = tl.sum(tl.where(here, score, 0.0), axis=1)
        ids = tl.where(column[None, :] == rank, expert[:, None], ids)
        weights = tl.where(column[None, :] == rank, weight[:, None], weights)
        keys = tl.where(here, _LOWEST, keys)
        chosen = chosen | here

    if KIND == "softmax_topk":
        masked = tl.where(column[None, :] < TOP_K, weights, float("-inf"))
        weights = tl.exp(masked - tl.max(masked, axis=1)[:, None])
        weights = weights / tl.sum(weights, axis=1)[:, None]
    elif C.NORMALIZE:
        total = tl.sum(weights, axis=1)
        if KIND == "sigmoid":
            total += 1e-20  # all sigmoids may underflow; the constant is the models' own
        weights = weights / total[:, None]
    return ids, weights, chosen, score


@triton.jit
def load_or_zero(ptr, index, mask):
    """fp32 values at `index`; zeros if there is no such tensor."""
    if ptr is None:
        return index.to(tl.float32) * 0.0
    else:
        return tl.load(ptr + index, mask=mask, other=0.0)


@triton.jit
def _keep_best_groups(keys, choice, C: tl.constexpr):
    BLOCK_T: tl.constexpr = keys.shape[0]
    TOP_GROUPS: tl.constexpr = C.TOP_GROUPS
    BLOCK_G: tl.constexpr = C.BLOCK_G
    BLOCK_J: tl.constexpr = C.BLOCK_J
    # A group's score is the sum of its two best choices. Reshaped, a group is the last dimension.
    grouped = tl.reshape(keys, [BLOCK_T, BLOCK_G, BLOCK_J])
    scores = tl.reshape(choice, [BLOCK_T, BLOCK_G, BLOCK_J])
    best = tl.max(grouped, axis=2)  # [BLOCK_T, BLOCK_G]
    rest = tl.where(grouped == best[:, :, None], _LOWEST, grouped)
    second = tl.max(rest, axis=2)
    sum_best = tl.sum(tl.where(grouped == best[:, :, None], scores, 0.0), axis=2)
    sum_second = tl.sum(tl.where(rest == second[:, :, None], scores, 0.0), axis=2)

    group = tl.arange(0, BLOCK_G)
    group_keys = rank_keys(sum_best + sum_second, group[None, :])
    group_keys = tl.where(best == _LOWEST, _LOWEST, group_keys)  # lanes beyond the last group
    kept = group[None, :] < tl.zeros([BLOCK_T, 1], dtype=tl.int32)  # none
    for _ in range(TOP_GROUPS):
        winner = key_index(tl.max(group_keys, axis=1))
        here = group[None, :] == winner[:, None]
        group_keys = tl.where(here, _LOWEST, group_keys)
        kept = kept | here
    grouped = tl.where(kept[:, :, None], grouped, _LOWEST)
    return tl.reshape(grouped, [BLOCK_T, BLOCK_G * BLOCK_J])
