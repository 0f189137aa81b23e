"""The routed experts' FFN in plain PyTorch: short, slow, wide inside; the oracle of the kernels."""

from __future__ import annotations

import torch
from torch import Tensor

from moe_offload.activations import Activation


def expert_ffn(
    hidden: Tensor,
    gate_up: Tensor,
    down: Tensor,
    topk_ids: Tensor,
    topk_weights: Tensor,
    activation: Activation,
    gate_up_bias: Tensor | None = None,
    down_bias: Tensor | None = None,
    *,
    dtype: torch.dtype = torch.float64,
) -> Tensor:
    """Sum over a token's experts of weight * down(act(gate, up)), computed in `dtype`.

    Arguments as `moe_offload.functional.expert_ffn`. Returns [T, H] in `dtype`, unrounded.
    """
    num_experts = down.shape[0]
    x = hidden.to(dtype)
    out = torch.zeros(hidden.shape[0], down.shape[1], dtype=dtype, device=hidden.device)
    for expert in topk_ids.unique().tolist():
        if not 0 <= expert < num_experts:
            continue
        tokens, ranks = (topk_ids == expert).nonzero(as_tuple=True)
        first = x[tokens] @ gate_up[expert].to(dtype).T  # [M, 2F], or [M, F] without a gate
        if gate_up_bias is not None:
            first = first + gate_up_bias[expert].to(dtype)
        gate, up = first.chunk(2, dim=-1) if activation.gated else (None, first)
        y = activation(gate, up) @ down[expert].to(dtype).T  # [M, H]
        if down_bias is not None:
            y = y + down_bias[expert].to(dtype)
        out.index_add_(0, tokens, y * topk_weights[tokens, ranks, None].to(dtype))
    return out
