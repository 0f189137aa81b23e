"""The same ops in plain PyTorch: short, slow, fp32 inside. They are the oracle of the tests.

Each function has the name, arguments and results of the kernel it describes. They run on any
device and synchronise freely.
"""

from __future__ import annotations

import torch
from torch import Tensor

from moe_offload.activations import ACTIVATIONS
from moe_offload.triton_kernels.grouped_gemm import Epilogue
from moe_offload.triton_kernels.next_layer import NextLayerPredictor, Prediction
from moe_offload.triton_kernels.permute import Permutation as Rows
from moe_offload.triton_kernels.route_predict_permute import Routing
from moe_offload.triton_kernels.scoring import Scoring


def choose(
    logits: Tensor, top_k: int, scoring: Scoring, correction_bias: Tensor | None = None
) -> tuple[Tensor, Tensor, Tensor]:
    """Ids [T, A], fp32 weights [T, A] without scale, and all scores [T, E].

    A stable descending sort is the tie rule: among equal scores the lowest id comes first.
    """
    logits = logits.float()
    num_tokens, num_experts = logits.shape
    choice, scores = logits, logits
    if scoring.kind == "sigmoid":
        scores = logits.sigmoid()
        choice = scores if correction_bias is None else scores + correction_bias
    elif scoring.kind == "softmax":
        scores = logits.softmax(dim=-1)
    if scoring.num_groups > 1:
        grouped = choice.view(num_tokens, scoring.num_groups, -1)
        group_scores = grouped.topk(2, dim=-1).values.sum(dim=-1)
        best = group_scores.sort(dim=-1, descending=True, stable=True).indices
        kept = torch.zeros_like(group_scores, dtype=torch.bool)
        kept.scatter_(1, best[:, : scoring.top_groups], True)
        choice = grouped.masked_fill(~kept.unsqueeze(-1), -torch.inf).view(num_tokens, num_experts)
    ids = choice.sort(dim=-1, descending=True, stable=True).indices[:, :top_k]
    weights = scores.gather(1, ids)
    if scoring.kind == "softmax_topk":
        weights = weights.softmax(dim=-1)
    elif scoring.normalize:
        epsilon = 1e-20 if scoring.kind == "sigmoid" else 0.0
        weights = weights / (weights.sum(dim=-1, keepdim=True) + epsilon)
    return ids, weights, scores


def permute(topk_ids: Tensor, num_experts: int) -> Rows:
    """Twin of `permute.permute`."""
    flat = topk_ids.reshape(-1).long()
    valid = (flat >= 0) & (flat < num_experts)
    order = torch.where(valid, flat, num_experts).sort(stable=True).indices
    num_rows = int(valid.sum())
    row_route = torch.where(torch.arange(flat.numel(), device=flat.device) < num_rows, order, -1)
    route_row = torch.full_like(flat, -1)
    route_row[order[:num_rows]] = torch.arange(num_rows, device=flat.device)
    counts = torch.bincount(flat[valid], minlength=num_experts)
    offsets = torch.cat([counts.new_zeros(1), counts.cumsum(0)])
    active = counts.nonzero().flatten()
    padded = active.new_full((min(flat.numel(), num_experts),), -1)
    padded[: active.numel()] = active
    return Rows(
        row_route.int(),
        route_row.view(topk_ids.shape).int(),
        offsets.int(),
        padded.int(),
        torch.tensor([active.numel()], dtype=torch.int32, device=flat.device),
    )


def predict(
    hidden: Tensor, predictor: NextLayerPredictor, next_slots: Tensor | None = None
) -> Prediction:
    """The predictor's half of `route_predict_permute`. next_slots: int32 [L', P] or None."""
    layers, num_next = predictor.num_layers, predictor.num_experts
    kind = "sigmoid" if predictor.scoring.kind == "sigmoid" else "softmax"
    limits = (predictor.scoring.num_groups, predictor.scoring.top_groups)
    scoring = Scoring(kind, False, *limits)  # type: ignore[arg-type]
    ids, scores, lists, counts = [], [], [], []
    for layer in range(layers):
        logits = hidden.float() @ predictor.weight[layer].float().t()
        if predictor.bias is not None:
            logits = logits + predictor.bias[layer]
        correction = predictor.correction_bias
        correction = None if correction is None else correction[layer]
        layer_ids, layer_scores, _ = choose(logits, predictor.top_m, scoring, correction)
        best = torch.full((num_next,), -1.0, device=hidden.device)
        best.scatter_reduce_(0, layer_ids.flatten(), layer_scores.flatten(), "amax")
        ids.append(layer_ids.int())
        scores.append(layer_scores)
        lists.append(best)
        counts.append(int((best >= 0).sum()))

    prefetch_ids = torch.full((layers, num_next), -1, dtype=torch.int32, device=hidden.device)
    prefetch_probs = torch.zeros(layers, num_next, device=hidden.device)
    prefetch_slots = None if next_slots is None else torch.full_like(prefetch_ids, -1)
    for layer, (best, count) in enumerate(zip(lists, counts, strict=True)):
        order = best.sort(descending=True, stable=True).indices[:count]
        prefetch_ids[layer, :count] = order.int()
        prefetch_probs[layer, :count] = best[order]
        if prefetch_slots is not None and next_slots is not None:
            prefetch_slots[layer, :count] = next_slots[layer][order]
    num_prefetch = torch.tensor(counts, dtype=torch.int32, device=hidden.device)
    return Prediction(
        torch.stack(ids),
        torch.stack(scores),
        prefetch_ids,
        prefetch_probs,
        prefetch_slots,
        num_prefetch,
    )


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
) -> Routing:
    """Twin of `route_predict_permute.route_predict_permute`."""
    scoring = scoring or Scoring()
    ids, weights, _ = choose(logits, top_k, scoring, correction_bias)
    prediction = None
    if predictor is not None and hidden is not None:
        next_slots = None
        if slot_of is not None:
            next_slots = slot_of[layer + 1 : layer + 1 + predictor.num_layers]
        prediction = predict(hidden, predictor, next_slots)
    return Routing(
        ids.int(),
        (weights * scoring.scale).to(weights_dtype),
        None if slot_of is None else slot_of[layer][ids],
        permute(ids, logits.shape[1]),
        prediction,
    )


def grouped_gemm(
    x: Tensor,
    weight: Tensor,
    rows: Rows,
    slots: Tensor,
    *,
    gather: bool = False,
    bias: Tensor | None = None,
    epilogue: Epilogue | None = None,
    transposed: bool = False,
    out: Tensor | None = None,
) -> Tensor:
    """Twin of `grouped_gemm.grouped_gemm`; computes in the dtype of x when that is fp64."""
    epilogue = epilogue or Epilogue()
    exact = torch.float64 if x.dtype == torch.float64 else torch.float32
    num_columns = weight.shape[2 if transposed else 1]
    features = num_columns if epilogue.gate == "none" else num_columns // 2
    if out is None:
        out = x.new_full((rows.row_route.numel(), features), torch.nan)
    offsets = rows.expert_offsets.tolist()
    for expert, slot in enumerate(slots.tolist()):
        start, end = offsets[expert : expert + 2]
        if slot < 0 or start == end:
            continue
        source = rows.row_route[start:end].long() // rows.route_row.shape[1]
        values = x[source] if gather else x[start:end]
        matrix = weight[slot].to(exact)
        result = values.to(exact) @ (matrix if transposed else matrix.t())
        if bias is not None:
            result = result + bias[slot].to(exact)
        out[start:end] = _apply(epilogue, result).to(out.dtype)
    return out


def _apply(epilogue: Epilogue, result: Tensor) -> Tensor:
    if epilogue.gate == "none":
        return result if epilogue.activation == "none" else ACTIVATIONS[epilogue.activation](result)
    if epilogue.gate == "halves":
        gate, up = result.chunk(2, dim=-1)
    else:
        gate, up = result[:, ::2], result[:, 1::2]
    if epilogue.activation != "clamped_swiglu":
        return ACTIVATIONS[epilogue.activation](gate) * up
    gate = gate.clamp(max=epilogue.limit)
    up = up.clamp(-epilogue.limit, epilogue.limit)
    return (up + epilogue.offset) * gate * torch.sigmoid(epilogue.alpha * gate)


def combine(
    rows: Tensor, route_row: Tensor, topk_weights: Tensor, *, dtype: torch.dtype | None = None
) -> Tensor:
    """Twin of `combine.combine`: a sum in the order of the choices."""
    exact = torch.float64 if rows.dtype == torch.float64 else torch.float32
    out = torch.zeros(route_row.shape[0], rows.shape[1], dtype=exact, device=rows.device)
    for rank in range(route_row.shape[1]):
        row = route_row[:, rank].long()
        part = topk_weights[:, rank, None].to(exact) * rows[row.clamp(min=0)].to(exact)
        out += torch.where(row[:, None] >= 0, part, 0.0)
    return out.to(rows.dtype if dtype is None else dtype)
