"""What the tests of the Triton kernels share: devices, poisoned outputs, comparing results.

One list of tests runs on the CPU through Triton's interpreter and, where there is a GPU, compiled.
"""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from typing import Any

import pytest
import torch
from torch import Tensor

pytest.importorskip("triton", reason="needs triton (on Linux, pip install -e '.[dev]' has it)")

from moe_offload.triton_kernels.launch import interpreting

DEVICES = [
    pytest.param(
        "cpu",
        marks=pytest.mark.skipif(
            not interpreting(), reason="compiled kernels; TRITON_INTERPRET=1 interprets them"
        ),
    ),
    pytest.param(
        "cuda",
        marks=[
            pytest.mark.gpu,
            pytest.mark.skipif(interpreting(), reason="TRITON_INTERPRET=1: no compiled kernels"),
        ],
    ),
]


@contextlib.contextmanager
def poisoned() -> Iterator[None]:
    """Every torch.empty holds NaN, or the largest integer, instead of what lay there before."""
    torch.use_deterministic_algorithms(True)
    assert torch.utils.deterministic.fill_uninitialized_memory
    try:
        yield
    finally:
        torch.use_deterministic_algorithms(False)


def assert_same(got: Any, want: Any, where: str = "result", rtol: float = 1e-5) -> None:
    """Integers equal, floats close (rtol: some fp32 roundings and another exp), None is None."""
    if isinstance(want, Tensor):
        assert isinstance(got, Tensor), f"{where}: got {got}"
        if want.dtype.is_floating_point:
            torch.testing.assert_close(
                got, want, rtol=rtol, atol=1e-6, msg=lambda text: f"{where}: {text}"
            )
        else:
            torch.testing.assert_close(got, want, msg=lambda text: f"{where}: {text}")
    elif want is None:
        assert got is None, where
    else:
        for name, ours, theirs in zip(want._fields, got, want, strict=True):
            assert_same(ours, theirs, f"{where}.{name}", rtol)
