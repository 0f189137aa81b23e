"""Stateless operations, usable without the rest of the package."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Literal

import torch
from torch import Tensor

from moe_offload import ops
from moe_offload.activations import ACTIVATIONS, Activation

BACKENDS = ("auto", "native", "cuda", "triton", "torch")
_DTYPES = (torch.float32, torch.bfloat16, torch.float16)


def expert_ffn(
    hidden: Tensor,
    gate_up: Tensor,
    down: Tensor,
    topk_ids: Tensor,
    topk_weights: Tensor,
    activation: str | Activation = "silu",
    backend: Literal["auto", "native", "cuda", "triton", "torch"] = "auto",
    *,
    gate_up_bias: Tensor | None = None,
    down_bias: Tensor | None = None,
) -> Tensor:
    """The routed experts of one Mixture-of-Experts layer, all of their weights at hand.

    Args:
        hidden: [T, H] float32, bfloat16 or float16; T may be 0.
        gate_up: [E, 2F, H] in hidden's dtype, gate rows then up rows; [E, F, H] for experts
            without a gate. Rows contiguous.
        down: [E, H, F], likewise.
        topk_ids: [T, A] integer; ids outside [0, E) contribute nothing.
        topk_weights: [T, A] floating point, in any of the three dtypes.
        activation: "silu", "gelu", "gelu_tanh", "relu", "relu2", or an `Activation`.
        backend: "native" (CPU kernels), "cuda" (CUDA kernels; bfloat16 and float16, weights that
            lie in one slab of pages, see `pages.pack_experts`), "triton", "torch" (the plain
            PyTorch twin, fp32 inside, any device, the one with a gradient), or "auto": native on
            the CPU; on CUDA the first of cuda, triton and torch that can.
        gate_up_bias, down_bias: [E, 2F] (or [E, F]) and [E, H], both or neither.

    Returns:
        [T, H] in the dtype and on the device of hidden. Blocks the host; inputs may be reused.
        The native result has one rounding to the dtype after the activation, one per weighted
        expert row, one at the end; sums are fp32, a token's experts in the order of its ids.

    Raises:
        ValueError: shapes, dtypes or devices that do not fit together, or a backend asked for by
            name that cannot compute these experts, with the reason.

    Cost: distinct experts x 3 F H weight elements read once, 6 T A F H floating-point operations.

    Example:
        >>> weights, ids = router(hidden).softmax(-1).topk(8)
        >>> out = expert_ffn(hidden, gate_up, down, ids, weights)
    """
    act = _checked(
        hidden, gate_up, down, topk_ids, topk_weights, activation, gate_up_bias, down_bias
    )
    if backend not in BACKENDS:
        raise ValueError(f"expert_ffn: backend must be of {', '.join(BACKENDS)}, got {backend!r}")
    on_cpu = hidden.device.type == "cpu"
    if backend == "native" and not on_cpu:
        raise ValueError(
            f"expert_ffn: the native kernels compute on the CPU, hidden is on {hidden.device}; "
            'use backend="auto"'
        )
    arguments = (hidden, gate_up, down, topk_ids, topk_weights, act, gate_up_bias, down_bias)
    floats = (hidden, gate_up, down, topk_weights, gate_up_bias, down_bias)
    if backend == "auto" and not on_cpu and _wants_gradient(floats):
        backend = "torch"
    if backend == "torch":
        return ops.expert_ffn_plain(*arguments)
    if torch.compiler.is_compiling() and hidden.device.type in ("cpu", "cuda"):
        return torch.ops.moe_offload.expert_ffn(
            *(hidden, gate_up, down, topk_ids, topk_weights, gate_up_bias, down_bias),
            *(act.name, act.gated, act.alpha, act.limit, act.offset),
            "auto" if backend == "native" else backend,
        )
    with torch.no_grad():
        if on_cpu and backend in ("auto", "native"):
            return ops.expert_ffn_cpu(*arguments)
        return ops.expert_ffn_gpu(*arguments, backend=backend)


def _wants_gradient(tensors: Iterable[Tensor | None]) -> bool:
    return torch.is_grad_enabled() and any(t is not None and t.requires_grad for t in tensors)


def _checked(
    hidden: Tensor,
    gate_up: Tensor,
    down: Tensor,
    topk_ids: Tensor,
    topk_weights: Tensor,
    activation: str | Activation,
    gate_up_bias: Tensor | None,
    down_bias: Tensor | None,
) -> Activation:
    """Check every argument; returns the activation, with or without a gate as gate_up has it."""
    if hidden.dim() != 2 or gate_up.dim() != 3 or down.dim() != 3:
        raise ValueError(
            "expert_ffn: expected hidden [T, H], gate_up [E, 2F, H] and down [E, H, F], got "
            f"{_shapes(hidden, gate_up, down)}"
        )
    num_experts, hidden_size, inner = down.shape
    rows = gate_up.shape[1]
    if (
        hidden.shape[1] != hidden_size
        or gate_up.shape != (num_experts, rows, hidden_size)
        or rows not in (inner, 2 * inner)
        or min(num_experts, hidden_size, inner) < 1
    ):
        raise ValueError(
            f"expert_ffn: down is [E, H, F] = {tuple(down.shape)}, so hidden must be "
            f"[T, {hidden_size}] and gate_up [{num_experts}, {2 * inner} or {inner}, "
            f"{hidden_size}]; got {_shapes(hidden, gate_up)}"
        )
    if (
        topk_ids.dim() != 2
        or topk_ids.shape != topk_weights.shape
        or (topk_ids.shape[0] != hidden.shape[0])
    ):
        raise ValueError(
            f"expert_ffn: topk_ids and topk_weights must both be [{hidden.shape[0]}, A], got "
            f"{_shapes(topk_ids, topk_weights)}"
        )
    if topk_ids.is_floating_point() or not topk_weights.is_floating_point():
        raise ValueError(
            "expert_ffn: topk_ids must be integers and topk_weights floating point, got "
            f"{topk_ids.dtype} and {topk_weights.dtype}"
        )
    biases = [bias for bias in (gate_up_bias, down_bias) if bias is not None]
    if len(biases) == 1:
        raise ValueError("expert_ffn: give biases for both projections or for neither")
    for bias, expected in zip(
        biases, ((num_experts, rows), (num_experts, hidden_size)), strict=False
    ):
        if bias.shape != expected:
            raise ValueError(f"expert_ffn: a bias must be {expected}, got {tuple(bias.shape)}")
    floats = [hidden, gate_up, down, *biases]
    if hidden.dtype not in _DTYPES or any(tensor.dtype != hidden.dtype for tensor in floats):
        raise ValueError(
            "expert_ffn: hidden, weights and biases must share one dtype of float32, bfloat16 and "
            f"float16, got {', '.join(str(tensor.dtype) for tensor in floats)}"
        )
    everything = [*floats, topk_ids, topk_weights]
    if any(tensor.device != hidden.device for tensor in everything):
        raise ValueError(
            "expert_ffn: all tensors must be on one device, got "
            f"{', '.join(str(tensor.device) for tensor in everything)}"
        )
    if gate_up.stride(2) != 1 or down.stride(2) != 1:
        raise ValueError("expert_ffn: rows of gate_up and down must be contiguous in memory")
    gated = rows == 2 * inner
    if isinstance(activation, Activation):
        if activation.gated != gated:
            raise ValueError(
                f"expert_ffn: {activation} does not fit gate_up of {rows} rows and F = {inner}"
            )
        return activation
    if activation not in ACTIVATIONS:
        raise ValueError(
            f"expert_ffn: activation must be one of {', '.join(ACTIVATIONS)}, or an Activation; "
            f"got {activation!r}"
        )
    return Activation(activation, gated)


def _shapes(*tensors: Tensor) -> str:
    return ", ".join(str(tuple(tensor.shape)) for tensor in tensors)
