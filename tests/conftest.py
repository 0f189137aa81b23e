"""What all tests share: no network, and the `gpu` marker skips by itself without a CUDA device."""

from __future__ import annotations

import os
from typing import Any

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


# A GPU that is not there: the CUDA kernels in emulation, and a driver that is a fake.


@pytest.fixture(scope="session")
def cuda_libraries(tmp_path_factory: pytest.TempPathFactory) -> tuple[Any, Any]:
    import emulated_cuda
    import fake_cuda

    folder = tmp_path_factory.mktemp("cuda")
    return emulated_cuda.build(folder), fake_cuda.build(folder)


@pytest.fixture
def kernels(cuda_libraries: tuple[Any, Any], monkeypatch: pytest.MonkeyPatch) -> Any:
    """`moe_offload._cuda` runs on the CPU, on tensors of the CPU."""
    import emulated_cuda

    emulated_cuda.install(cuda_libraries[0], monkeypatch)
    return cuda_libraries[0]


@pytest.fixture
def gpu(kernels: Any, cuda_libraries: tuple[Any, Any], monkeypatch: pytest.MonkeyPatch) -> Any:
    """device="cuda" finds the fake driver and the emulated kernels; the driver, to steer it."""
    import fake_cuda
    import torch

    from moe_offload import _core, offloader
    from moe_offload.device import ComputeDevice

    driver = fake_cuda.load(cuda_libraries[1])
    driver.fake_cuda_reset()
    driver.fake_cuda_set_delay(5, 50)
    device = ComputeDevice(torch.device("cpu"), _core.CudaDevice(0, str(cuda_libraries[1])))
    monkeypatch.setattr(offloader, "open_device", lambda name: device)
    return driver
