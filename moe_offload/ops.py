"""The package's operators for torch's dispatcher: schema, fake kernel, implementations.

Eager code does not come through here (`functional` calls the kernels directly, without the
dispatcher's cost); `torch.compile` and exporters do, and see one opaque operator.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from moe_offload import reference, resident
from moe_offload.activations import Activation
from moe_offload.backends.native import BoundLayer, NativeRun

torch.library.define(
    "moe_offload::expert_ffn",
    "(Tensor hidden, Tensor gate_up, Tensor down, Tensor topk_ids, Tensor topk_weights, "
    "Tensor? gate_up_bias, Tensor? down_bias, str activation, bool gated, float alpha, "
    "float limit, float offset, str kernels) -> Tensor",
)  # kernels: a backend of `resident`; on the CPU also an instruction set


@torch.library.impl("moe_offload::expert_ffn", ("cpu", "cuda"))
def _expert_ffn_op(
    hidden: Tensor,
    gate_up: Tensor,
    down: Tensor,
    topk_ids: Tensor,
    topk_weights: Tensor,
    gate_up_bias: Tensor | None,
    down_bias: Tensor | None,
    activation: str,
    gated: bool,
    alpha: float,
    limit: float,
    offset: float,
    kernels: str,
) -> Tensor:
    act = Activation(activation, gated, alpha, limit, offset)
    arguments = (hidden, gate_up, down, topk_ids, topk_weights, act, gate_up_bias, down_bias)
    if hidden.device.type == "cpu" and kernels not in resident.WHY_NOT:
        return expert_ffn_cpu(*arguments, isa=kernels)
    return expert_ffn_gpu(*arguments, backend=kernels)


@torch.library.register_fake("moe_offload::expert_ffn")
def _expert_ffn_fake(hidden: Tensor, *_: object) -> Tensor:
    return torch.empty_like(hidden, memory_format=torch.contiguous_format)


def expert_ffn_cpu(
    hidden: Tensor,
    gate_up: Tensor,
    down: Tensor,
    topk_ids: Tensor,
    topk_weights: Tensor,
    activation: Activation,
    gate_up_bias: Tensor | None = None,
    down_bias: Tensor | None = None,
    isa: str = "auto",
) -> Tensor:
    """The native CPU kernels on whole weights. Arguments are trusted; see `functional`."""
    num_experts, hidden_size, inner = down.shape
    layer = BoundLayer(activation, hidden_size, inner, num_experts, down.dtype, isa=isa)
    tensors = resident.as_parameters(gate_up, down, gate_up_bias, down_bias, activation.gated)
    call = NativeRun(layer, hidden, topk_ids, topk_weights)
    call.run.compute_all(layer.weights(tensors))
    return call.finish()


def expert_ffn_gpu(
    hidden: Tensor,
    gate_up: Tensor,
    down: Tensor,
    topk_ids: Tensor,
    topk_weights: Tensor,
    activation: Activation,
    gate_up_bias: Tensor | None = None,
    down_bias: Tensor | None = None,
    backend: str = "auto",
) -> Tensor:
    """The kernels for GPUs on whole weights, see `resident`. Arguments are trusted.

    Raises:
        ValueError: a backend asked for by name cannot compute these experts.
    """
    weights = resident.as_parameters(gate_up, down, gate_up_bias, down_bias, activation.gated)
    if backend == "auto":
        backend = resident.choose(weights)
    if backend == "torch":
        return expert_ffn_plain(
            hidden, gate_up, down, topk_ids, topk_weights, activation, gate_up_bias, down_bias
        )
    if (reason := resident.WHY_NOT[backend](weights)) is not None:
        raise ValueError(
            f"expert_ffn: backend={backend!r} cannot compute these experts: {reason}. Use "
            'backend="auto".'
        )
    return resident.expert_ffn(backend, hidden, weights, topk_ids, topk_weights, activation)


def expert_ffn_plain(hidden: Tensor, *arguments: Any) -> Tensor:
    """The plain twin, fp32 inside, in the dtype of hidden; arguments as for the others."""
    return reference.expert_ffn(hidden, *arguments, dtype=torch.float32).to(hidden.dtype)
