"""Which experts now, which next, and the rows sorted by expert: one launch for up to 64 tokens.

Each of these steps is far shorter than a launch (2 to 3 us in a graph), so the launches are the
cost. They differ in shape: choosing needs one program, the predictor's matrix wants many. So ranges
of one grid have different jobs (routing_launch.py). More than 64 tokens take a chain of three
launches (routing_chain.py).

No other kernel that predicts the next layer in the launch that routes this one was found
(reference: kernel survey, November 2026); the parts are known, see docs/triton_kernels.md.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

from moe_offload.triton_kernels.launch import (
    FLOATS,
    check_count,
    check_tensor,
    require_device,
)
from moe_offload.triton_kernels.next_layer import Heads, NextLayerPredictor, Prediction
from moe_offload.triton_kernels.permute import (
    MAX_EXPERTS,
    MAX_TOP_K,
    SMALL_T,
    Permutation,
    empty_permutation,
)
from moe_offload.triton_kernels.route_tokens import Router
from moe_offload.triton_kernels.routing_chain import launch_chain
from moe_offload.triton_kernels.routing_launch import launch_once
from moe_offload.triton_kernels.scoring import Scoring


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
        launch = launch_once if num_tokens <= SMALL_T else launch_chain
        launch(router, rows, scoring, hidden, predictor, heads, prediction, workspace)
        return Routing(topk_ids, topk_weights, topk_slots, rows, prediction)


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
