"""Attention of decoded tokens, one a sequence, by a CPU kernel that reads keys and values once.

What a decoded token's attention costs is the bytes of its keys and values, and torch's kernel reads
them at a fraction of memory's rate. `csrc/expert_gemm/cpu/attention.h` has the kernel,
bench/attention.py compares it with torch's.

Keys and values are read where they lie, whatever the distance between sequences, heads and
positions, so a cache may have room behind the last position.
"""

from __future__ import annotations

import functools

import torch
from torch import Tensor

from moe_offload.backends.native import DTYPES, dense_kernels

# Bytes of keys and values from which on the kernel is used, and the instruction sets where it was
# faster than torch's fastest way from there on in every dtype: 1.25 to 13.5 x in bench/attention.py
# on two Zen 4 cores, 1.0 to 9.1 x with AVX2 forced there, 0.99 to 8.2 x in bfloat16 on two Zen 3
# cores, but for four disturbed cells of 336; 0.99 to 2.2 x on two Emerald Rapids cores but for one
# of 112 (AMX has no part in it).
PAYS_FROM = 128 << 10
PAYS_ON = ("avx2", "avx512", "avx512_bf16", "amx")


def token_attention(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    mask: Tensor | None = None,
    scale: float | None = None,
) -> Tensor:
    """softmax(scale query key^T + mask) value, for tensors that `takes` accepts.

    Args:
        query: [B, Hq, 1, D]; float32, bfloat16 or float16 on the CPU, as the others.
        key: [B, Hkv, S, D], Hq a multiple of Hkv; elements of a head lie next to each other.
        value: [B, Hkv, S, D'], likewise.
        mask: [B or 1, Hq or 1, 1, S]; bool (False: masked), or float32 or query's dtype, added to
            the scores. None: nothing is masked. Where everything is, the result is zeros.
        scale: of the scores; None: D ** -0.5.

    Returns:
        [B, 1, Hq, D'] in query's dtype: fp32 inside, rounded once. Blocks until computed. Bits
        depend on the instruction set, the dtype and S, not on threads, strides or other sequences.

    Cost: B Hkv S (D + D') elements read once, 2 B Hq S (D + D') floating-point operations.
    """
    batch, heads, _, size = query.shape
    _, groups, positions, value_size = value.shape
    query = query.contiguous()
    out = query.new_empty((batch, 1, heads, value_size))
    dense_kernels(query.dtype).attend(
        query.data_ptr(),
        key.data_ptr(),
        value.data_ptr(),
        out.data_ptr(),
        (batch, heads, groups, positions, size, value_size),
        _strides(key),
        _strides(value),
        None if mask is None else _mask(mask),
        size**-0.5 if scale is None else scale,
        torch.get_num_threads(),
    )
    return out


def takes(query: Tensor, key: Tensor, value: Tensor, mask: Tensor | None) -> bool:
    """Does the kernel compute this, and faster than torch?"""
    tensors = (query, key, value) if mask is None else (query, key, value, mask)
    if torch.compiler.is_compiling() or any(type(t) is not Tensor or t.dim() != 4 for t in tensors):
        return False
    batch, heads, tokens, size = query.shape
    groups, positions = key.shape[1:3]
    num_bytes = (key.numel() + value.numel()) * query.element_size()
    return (
        tokens == 1
        and num_bytes >= _pays(query.dtype)
        and num_bytes > 0
        and heads > 0
        and heads % groups == 0
        and key.shape == (batch, groups, positions, size)
        and value.shape == (batch, groups, positions, value.shape[3])
        and value.shape[3] > 0
        and size > 0
        and key.dtype == value.dtype == query.dtype
        and key.stride(3) == value.stride(3) == 1
        and all(t.device.type == "cpu" for t in tensors)
        and (mask is None or _mask_fits(mask, query.dtype, (batch, heads, 1, positions)))
        and not (torch.is_grad_enabled() and any(t.requires_grad for t in tensors))
        and not torch.is_autocast_enabled("cpu")
    )


def _mask_fits(mask: Tensor, dtype: torch.dtype, shape: tuple[int, int, int, int]) -> bool:
    return (
        mask.dtype in (torch.bool, torch.float32, dtype)
        and mask.shape[2:] == shape[2:]
        and mask.shape[0] in (1, shape[0])
        and mask.shape[1] in (1, shape[1])
    )


def _strides(tensor: Tensor) -> tuple[int, int, int]:
    """Bytes to the next sequence, head and position."""
    item = tensor.element_size()
    return (tensor.stride(0) * item, tensor.stride(1) * item, tensor.stride(2) * item)


def _mask(mask: Tensor) -> tuple[int, str, int, int, int]:
    """Address, kind, and bytes to the next sequence, head and position."""
    item = mask.element_size()
    sequence, head = (mask.stride(i) * item if mask.shape[i] > 1 else 0 for i in (0, 1))
    kind = {torch.bool: "bool", torch.float32: "float32"}.get(mask.dtype, "same")
    return (mask.data_ptr(), kind, sequence, head, mask.stride(3) * item)


@functools.cache
def _pays(dtype: torch.dtype) -> int:
    """Bytes of keys and values from which on the kernel is faster; more than there are: never."""
    pays = dtype in DTYPES and dense_kernels(dtype).isa in PAYS_ON
    return PAYS_FROM if pays else 1 << 62
