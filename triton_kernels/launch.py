"""What every public op of this package does before it launches: checks, and the right device.

A Triton kernel reads whatever addresses it is given, so a wrong dtype or stride must be caught
here, where a message can still name it. Kernels run on CUDA devices; on CPU tensors they run only
under Triton's interpreter (`TRITON_INTERPRET=1`, set before triton is imported), which is how they
are tested without a GPU and far too slow for anything else.
"""

from __future__ import annotations

import contextlib
from collections.abc import Sequence
from contextlib import AbstractContextManager
from typing import Any

import torch
import triton
from torch import Tensor

FLOATS = (torch.float32, torch.float16, torch.bfloat16)
IDS = (torch.int32, torch.int64)


def interpreting() -> bool:
    """Were this process's kernels decorated for the interpreter?"""
    return bool(triton.knobs.runtime.interpret)


def require_device(op: str, tensor: Tensor) -> AbstractContextManager[Any]:
    """A context in which kernels on this tensor launch on its device.

    Raises:
        RuntimeError: a device on which the kernels cannot run.
    """
    if tensor.device.type == "cuda":
        return torch.cuda.device(tensor.device)
    if tensor.device.type == "cpu" and interpreting():
        return contextlib.nullcontext()
    raise RuntimeError(
        f"{op}: Triton kernels need CUDA tensors, got a tensor on {tensor.device}. Move the inputs "
        "to a GPU; to run on the CPU for a test, set TRITON_INTERPRET=1 before triton is imported; "
        "for results on the CPU use the twin in moe_offload.triton_kernels.reference."
    )


def check_tensor(
    op: str,
    name: str,
    tensor: Tensor,
    shape: Sequence[int | None],
    dtypes: Sequence[torch.dtype],
    like: Tensor | None = None,
    *,
    contiguous: bool = True,
) -> None:
    """Shape (None is any size), dtype, device of `like`, and rows without gaps.

    With `contiguous=False` only the last dimension must be dense.

    Raises:
        TypeError: not a tensor, or a wrong dtype.
        ValueError: a wrong shape, device or stride.
    """
    if not isinstance(tensor, Tensor):
        raise TypeError(f"{op}: {name} must be a tensor, got {type(tensor).__name__}")
    wanted = "[" + ", ".join("any" if size is None else str(size) for size in shape) + "]"
    got = list(tensor.shape)
    if len(got) != len(shape) or any(
        w is not None and w != g for w, g in zip(shape, got, strict=True)
    ):
        raise ValueError(f"{op}: {name} must have shape {wanted}, got {got}")
    if tensor.dtype not in dtypes:
        names = " or ".join(str(dtype).removeprefix("torch.") for dtype in dtypes)
        raise TypeError(
            f"{op}: {name} must be {names}, got {str(tensor.dtype).removeprefix('torch.')}"
        )
    if like is not None and tensor.device != like.device:
        raise ValueError(
            f"{op}: {name} is on {tensor.device} and the first input on {like.device}; "
            "move them to one device"
        )
    dense = tensor.is_contiguous() if contiguous else tensor.dim() == 0 or tensor.stride(-1) == 1
    if not dense and tensor.numel() > 1:
        kind = "contiguous" if contiguous else "dense in its last dimension"
        raise ValueError(
            f"{op}: {name} must be {kind}, got strides {list(tensor.stride())}; "
            f"call {name}.contiguous()"
        )


def check_count(op: str, name: str, value: int, low: int, high: int) -> None:
    """An integer in [low, high]."""
    if isinstance(value, bool) or not isinstance(value, int):
        raise TypeError(f"{op}: {name} must be an int, got {type(value).__name__}")
    if not low <= value <= high:
        raise ValueError(f"{op}: {name} must lie in {low} to {high}, got {value}")


def block(size: int, smallest: int = 1) -> int:
    """The power of two that covers `size`: Triton's tiles have no other sizes."""
    return max(smallest, triton.next_power_of_2(size))
