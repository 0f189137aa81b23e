"""Experts whose weights are all on a GPU: what `functional.expert_ffn` does with CUDA tensors.

The CUDA kernels read pages, so they take weights that lie in one slab of them: a pool's views, or
what `pages.pack_experts` made once. Triton's take any. Each says why it cannot; "auto" takes the
first that can, and the plain twin where none can or where a gradient is wanted.
"""

from __future__ import annotations

import types
from typing import Any

import torch
from torch import Tensor

from moe_offload import cuda_kernels, cuda_pages
from moe_offload.activations import Activation, ExpertForm
from moe_offload.backends.cuda import BoundLayer, Cuda, bad_sizes, expert_shape
from moe_offload.backends.triton import BoundTriton, TritonExperts
from moe_offload.pages import find_slab

Weights = dict[str, Tensor]  # {"gate_up_proj" or "up_proj": [E, ...], "down_proj": ..., biases}


def as_parameters(
    gate_up: Tensor,
    down: Tensor,
    gate_up_bias: Tensor | None,
    down_bias: Tensor | None,
    gated: bool,
) -> Weights:
    """The weights under the names that pages and backends have for them."""
    first = "gate_up_proj" if gated else "up_proj"
    found = {first: gate_up, "down_proj": down}
    if gate_up_bias is not None and down_bias is not None:
        found |= {f"{first}_bias": gate_up_bias, "down_proj_bias": down_bias}
    return found


def why_not_cuda(weights: Weights) -> str | None:
    """Why the CUDA kernels cannot compute these experts; None when they can."""
    down = weights["down_proj"]
    if (reason := Cuda().missing()) is not None:
        return reason
    if down.device.type not in Cuda.devices:
        return f"it does not compute on {down.device.type}"
    if down.dtype not in cuda_pages.DTYPES:
        return f"it has no kernels for {down.dtype}"
    if (reason := bad_sizes(down.shape[1], down.shape[2])) is not None:
        return reason
    if find_slab(weights) is None:
        return "its weights do not lie in one slab of pages (moe_offload.pages.pack_experts)"
    return None


def why_not_triton(weights: Weights) -> str | None:
    """Why the Triton kernels cannot compute these experts; None when they can."""
    device = weights["down_proj"].device.type
    if (reason := TritonExperts().missing()) is not None:
        return reason
    return None if device in TritonExperts.devices else f"it does not compute on {device}"


WHY_NOT = {"cuda": why_not_cuda, "triton": why_not_triton}


def choose(weights: Weights) -> str:
    """The name in WHY_NOT of the first that can, else "torch"."""
    return next((name for name, why_not in WHY_NOT.items() if why_not(weights) is None), "torch")


def expert_ffn(
    backend: str, hidden: Tensor, weights: Weights, ids: Tensor, topk: Tensor, act: Activation
) -> Tensor:
    """The layer by a backend of WHY_NOT that can compute it. Arguments are trusted."""
    down = weights["down_proj"]
    num_experts, hidden_size, inner = down.shape
    where: Any
    if backend == "cuda":
        found = find_slab(weights)
        assert found is not None, "why_not_cuda has looked"
        slab, stride, offsets = found
        where = cuda_pages.SlabPages(slab, stride)
        shape = expert_shape(act, hidden_size, inner, down.dtype, offsets)
        run: Any = BoundLayer(cuda_kernels.CudaExperts(shape, num_experts))
        run = run.start(hidden, ids, topk)
        compute = run.compute_pages
    else:
        form = ExpertForm(torch.nn.Identity(), act.gated, len(weights) > 2)
        run = BoundTriton(form, act, num_experts).start(hidden, ids, topk)
        where, compute = types.SimpleNamespace(views=weights), run.compute
    if run.experts:
        compute(where, list(enumerate(run.experts)))
    out: Tensor = run.finish()
    return out
