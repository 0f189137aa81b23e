"""What all tests share: no network, and the `gpu` marker skips by itself without a CUDA device."""

from __future__ import annotations

import os

import pytest

# Every model of the tests is on disk; a wrong path must fail at once, not after a download attempt.
os.environ.setdefault("HF_HUB_OFFLINE", "1")
# Without a GPU, Triton kernels run through Triton's interpreter; it must be asked for before triton
# is imported anywhere. With one, they are compiled, unless the caller says otherwise.
if not os.path.exists("/dev/nvidiactl"):
    os.environ.setdefault("TRITON_INTERPRET", "1")


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    gpu_tests = [item for item in items if item.get_closest_marker("gpu")]
    if not gpu_tests:
        return
    import torch

    if not torch.cuda.is_available():
        for item in gpu_tests:
            item.add_marker(pytest.mark.skip(reason="needs a CUDA device"))
