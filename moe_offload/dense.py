"""A model's dense linear layers on the CPU kernels of its experts, where torch's are slower.

In decode a third or more of the bytes an MoE model reads are attention projections, shared experts
and output head, and torch multiplies a few rows at half of memory's rate or less.
`csrc/expert_gemm/cpu/linear.h` has the kernel, bench/linear.py the comparison that `PAYS` is from.

A layer keeps its weights and its place: only its class is swapped, as with experts modules, and
whatever the kernels do not take (gradients, autocast, another dtype or device, tensor subclasses,
torch.compile) goes to torch. Bits depend on the instruction set, the dtype and few-or-many rows.
"""

from __future__ import annotations

import functools
from collections.abc import Callable

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from moe_offload.backends.native import DTYPES, PLAIN_TENSORS, dense_kernels
from moe_offload.norms import use_native_norms
from moe_offload.routing import use_native_routers

# Rows for which the kernels were faster than torch on all of bench/linear.py's shapes, per
# instruction set: first and last. Rows of 16 bits on AVX2 are from two Zen 3 cores, scratch runs up
# to 4 rows (one row 1.2 x torch in bfloat16, 1.3 x in float16, 2 and 4 rows 1.6 to 4 x) and the
# prompts of bench/end_to_end.py. Many rows of float32 and the other ends of AVX2 (forced on Zen 4,
# torch as well) are from scratch runs of that benchmark up to 512 rows, float32 on AVX-512 up to
# 1024; its errors there are 0.5 to 1.7 x torch's. On processors with AMX torch has faster float16
# and float32 products too: their rows there have entries of their own.
_ALL = 1 << 62
PAYS: dict[tuple[str, torch.dtype], tuple[int, int]] = {
    ("avx512_bf16", torch.bfloat16): (1, 128),
    ("amx", torch.bfloat16): (1, _ALL),
    ("amx", torch.float16): (1, 8),  # on AVX-512
    ("amx", torch.float32): (1, 64),  # on AVX-512
    ("avx512", torch.bfloat16): (1, 64),
    ("avx512", torch.float16): (2, _ALL),
    ("avx512", torch.float32): (1, 256),
    ("avx2", torch.bfloat16): (1, _ALL),
    ("avx2", torch.float16): (1, _ALL),
    ("avx2", torch.float32): (1, 128),
}


def linear(x: Tensor, weight: Tensor, bias: Tensor | None = None) -> Tensor:
    """`torch.nn.functional.linear`, by the CPU kernels where they are faster.

    Args:
        x: [..., K]; float32, bfloat16 or float16 on the CPU for the kernels, anything for torch.
        weight: [N, K] in x's dtype, rows of consecutive elements.
        bias: [N] or None.

    Returns:
        [..., N] in x's dtype: fp32 sums, rounded once. Blocks until computed.

    Raises:
        RuntimeError: torch's own, for shapes and dtypes that do not fit together.

    Cost: N K weight elements read once (for each 480 rows), 2 N K floating-point operations a row.
    """
    if not takes(x, weight, bias):
        return F.linear(x, weight, bias)
    num_out, num_in = weight.shape
    x = x.contiguous()
    y = x.new_empty((*x.shape[:-1], num_out))
    dense_kernels(x.dtype).multiply(
        x.data_ptr(),
        x.numel() // num_in,
        num_in,
        num_out,
        weight.data_ptr(),
        weight.stride(0) * weight.element_size(),
        0 if bias is None else bias.data_ptr(),
        y.data_ptr(),
        torch.get_num_threads(),
    )
    return y


class NativeLinear(nn.Linear):
    """`torch.nn.Linear` with another forward; only ever made by swapping a layer's class."""

    def forward(self, input: Tensor) -> Tensor:
        return linear(input, self.weight, self.bias)

    def _get_name(self) -> str:  # for repr
        return "Linear"


def use_dense_kernels(model: nn.Module) -> Callable[[], None]:
    """Let a model compute its dense part as an offloaded one does; returns what takes that back.

    Its `nn.Linear` layers go through `linear` (subclasses keep their own arithmetic), its RMSNorm
    layers and routers, where they are recognised, through `norms.rms_norm` and `routing.route`, and
    in a transformers model decoded tokens attend as `huggingface.attention` and
    `huggingface.attention_layers` say and caches grow in place (`huggingface.growing_cache`). An
    offloaded model has had this done (`OffloadConfig.dense_backend`); it is for a resident one that
    is to give the same bits, or to be as fast.

    Args:
        model: any module; what the kernels do not take (see `linear`) goes to torch at each call,
            so layers may be on any device and in any dtype. Weights are neither copied nor changed.

    Example:
        >>> undo = use_dense_kernels(model)
    """
    swapped = [module for module in model.modules() if type(module) is nn.Linear]
    for module in swapped:
        module.__class__ = NativeLinear
    undo = [use_native_norms(model), use_native_routers(model)]
    if hasattr(model, "set_attn_implementation"):
        from moe_offload.huggingface.attention import use_token_attention
        from moe_offload.huggingface.attention_layers import use_token_projections
        from moe_offload.huggingface.growing_cache import use_growing_caches

        undo += [
            use_token_attention(model),
            use_growing_caches(model),
            use_token_projections(model),
        ]
    return functools.partial(_put_back, swapped, undo)


def _put_back(swapped: list[nn.Linear], undo: list[Callable[[], None]]) -> None:
    for module in swapped:
        module.__class__ = nn.Linear
    for put_back in undo:
        put_back()


def takes(x: Tensor, weight: Tensor, bias: Tensor | None) -> bool:
    """Do the kernels compute this, and faster?"""
    if torch.compiler.is_compiling() or type(x) is not Tensor or type(weight) not in PLAIN_TENSORS:
        return False
    first, last = _pays(x.dtype)
    return (
        x.dim() > 0
        and weight.dim() == 2
        and first * weight.shape[1] <= x.numel() <= last * weight.shape[1]
        and x.shape[-1] == weight.shape[1]
        and weight.dtype == x.dtype
        and weight.stride(1) == 1
        and x.device.type == weight.device.type == "cpu"
        and (
            bias is None
            or (
                type(bias) in PLAIN_TENSORS
                and bias.dtype == x.dtype
                and bias.shape == weight.shape[:1]
                and bias.is_contiguous()
                and bias.device.type == "cpu"
            )
        )
        and not (torch.is_grad_enabled() and (x.requires_grad or weight.requires_grad))
        and not torch.is_autocast_enabled("cpu")
    )


@functools.cache
def _pays(dtype: torch.dtype) -> tuple[int, int]:
    """First and last number of rows; an empty range where nothing is gained."""
    if dtype not in DTYPES:
        return (1, 0)
    for isa in (dense_kernels(torch.bfloat16).isa, dense_kernels(dtype).isa):
        if (isa, dtype) in PAYS:
            return PAYS[isa, dtype]
    return (1, 0)
