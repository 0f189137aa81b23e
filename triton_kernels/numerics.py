"""Arithmetic that must come out right both compiled and through the interpreter.

Triton 3.6's interpreter keeps bfloat16 as uint16: its dot multiplies those integers, and its
conversion from fp32 cuts bits off where the GPU rounds to nearest, ties to even. The helpers below
do the right thing in either world; compiled, they are the plain operation.
"""

from __future__ import annotations

import triton
import triton.language as tl
from triton.language.extra import libdevice

from moe_offload.triton_kernels.launch import interpreting

INTERPRETED = tl.constexpr(interpreting())


@triton.jit
def dot(a, b, total):
    """total + a @ b with fp32 accumulation; fp32 inputs are not shortened to TF32."""
    if INTERPRETED:
        return tl.dot(a.to(tl.float32), b.to(tl.float32), total)
    else:
        return tl.dot(a, b, total, input_precision="ieee")


@triton.jit
def round_to(x, dtype: tl.constexpr):
    """fp32 to dtype, to nearest, ties to even."""
    if INTERPRETED and dtype == tl.bfloat16:
        bits = x.to(tl.int32, bitcast=True)
        rounded = (bits + 0x7FFF + ((bits >> 16) & 1)) & -65536
        bits = tl.where(x == x, rounded, bits)  # NaN stays NaN
        return bits.to(tl.float32, bitcast=True).to(tl.bfloat16)
    else:
        return x.to(dtype)


@triton.jit
def exact_sigmoid(x):
    """What torch's CUDA sigmoid computes: libdevice's exp and a rounded division.

    Triton's own exp and "/" are approximations that are off in the last bit.
    """
    if INTERPRETED:
        return tl.div_rn(1.0, 1.0 + tl.exp(-x))
    else:
        return tl.div_rn(1.0, 1.0 + libdevice.exp(-x))


@triton.jit
def _sigmoid(x):
    return 1.0 / (1.0 + tl.exp(-x))


@triton.jit
def activate(x, NAME: tl.constexpr):
    """The elementwise activations of moe_offload.activations.ACTIVATIONS, on fp32."""
    if NAME == "silu":
        return x * _sigmoid(x)
    elif NAME == "gelu":
        return 0.5 * x * (1.0 + tl.erf(x * 0.7071067811865476))
    elif NAME == "gelu_tanh":
        # 0.5 (1 + tanh(u)) = sigmoid(2 u)
        return x * _sigmoid(2.0 * 0.7978845608028654 * (x + 0.044715 * x * x * x))
    elif NAME == "relu":
        return tl.where(x < 0.0, 0.0, x)  # NaN stays NaN
    else:
        tl.static_assert(NAME == "relu2", "unknown activation")
        positive = tl.where(x < 0.0, 0.0, x)
        return positive * positive


@triton.jit
def _clamp(x, low, high):
    x = tl.where(x < low, low, x)
    return tl.where(x > high, high, x)  # NaN stays NaN


@triton.jit
def gated_activation(gate, up, NAME: tl.constexpr, alpha, limit, offset):
    """act(gate) * up, or clamped_swiglu; see moe_offload.activations.Activation."""
    if NAME == "clamped_swiglu":
        gate = tl.where(gate > limit, limit, gate)
        return (_clamp(up, -limit, limit) + offset) * gate * _sigmoid(alpha * gate)
    else:
        return activate(gate, NAME) * up
