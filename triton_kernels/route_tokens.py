"""What both forms of route_predict_permute share: choosing the experts of some tokens."""

from __future__ import annotations

from typing import NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor

from moe_offload.triton_kernels.next_layer import NextLayerPredictor
from moe_offload.triton_kernels.numerics import round_to
from moe_offload.triton_kernels.scoring import Choice, lane_experts, load_or_zero, select_experts


class Router(NamedTuple):
    """The kernels' view of what a routing program reads and writes."""

    logits: Tensor  # [T, E], row stride logits_stride
    correction: Tensor | None  # fp32 [E]
    slots: Tensor | None  # int32 [E], this layer's row of the slot table
    topk_ids: Tensor  # out, see Routing
    topk_weights: Tensor
    topk_slots: Tensor | None


@triton.jit
def route_tokens(tokens, router, num_tokens, num_experts, stride, scale, C: tl.constexpr):
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


def empty_keys(predictor: NextLayerPredictor) -> Tensor:
    """Scratch for `write_prefetch_list`: int64 [L', lanes]."""
    choice: Choice = predictor.choice()
    shape = (predictor.num_layers, choice.BLOCK_G * choice.BLOCK_J)
    return torch.empty(shape, dtype=torch.int64, device=predictor.weight.device)
