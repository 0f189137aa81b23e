"""Where experts are computed: the CPU, or one CUDA device and what paging needs to know of it.

Paging talks to the driver itself (csrc/paging/cuda_driver.h); torch owns the slots, the streams
and everything else on the device. Nothing here touches CUDA before `open_device("cuda")` is called.
"""

from __future__ import annotations

from collections.abc import Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from moe_offload import _core
from moe_offload.config import format_bytes
from moe_offload.errors import BudgetError, DeviceError, StateError
from moe_offload.pages import SLOT_ALIGN, allocate_slab


@dataclass(frozen=True)
class ComputeDevice:
    """A device experts are computed on.

    Attributes:
        torch_device: where slots, inputs and outputs lie.
        cuda: the driver's side of it; None when slots are host memory.
    """

    torch_device: torch.device
    cuda: _core.CudaDevice | None = None

    def stream(self) -> int | None:
        """The current stream's handle; None where the host reads the slots."""
        if self.torch_device.type != "cuda":
            return None
        return torch.cuda.current_stream(self.torch_device).cuda_stream

    def guard(self) -> AbstractContextManager[object]:
        """Makes the device current for a scope."""
        if self.torch_device.type != "cuda":
            return nullcontext()
        return torch.cuda.device(self.torch_device)

    def check_call(self, name: str, **tensors: Tensor) -> None:
        """Refuse tensors of another device, and graph capture.

        Raises:
            ValueError: a tensor lies elsewhere.
            StateError: a CUDA graph is being captured on the current stream.
        """
        for argument, tensor in tensors.items():
            if tensor.device != self.torch_device:
                raise ValueError(
                    f"{name}: {argument} must be on {self.torch_device}, where the experts are "
                    f"computed, got {tensor.device}. Move the model and its inputs there."
                )
        if self.torch_device.type == "cuda" and torch.cuda.is_current_stream_capturing():
            raise StateError(
                f"{name}: paged experts cannot be captured into a CUDA graph: which pages are "
                "copied depends on the routed ids, which the host reads once per layer. Capture "
                "the parts between the experts, or call the model without graphs."
            )

    def allocate_slab(self, num_slots: int, stride: int) -> Tensor:
        """A zeroed slab of slots, see `pages.allocate_slab`; written when this returns.

        Raises:
            BudgetError: the device has no room for them.
        """
        if self.torch_device.type != "cuda":
            return allocate_slab(num_slots, stride)
        nbytes = num_slots * stride
        try:
            with self.guard():
                raw = torch.zeros(nbytes + SLOT_ALIGN, dtype=torch.uint8, device=self.torch_device)
                # Copies run on streams of their own: none may start before the zeros are there.
                torch.cuda.current_stream().synchronize()
        except torch.OutOfMemoryError as error:
            free, total = torch.cuda.mem_get_info(self.torch_device)
            raise BudgetError(
                f"device_budget: {format_bytes(nbytes)} of slots do not fit on "
                f"{self.torch_device}: {format_bytes(free)} of {format_bytes(total)} are free. "
                "Lower device_budget, or free memory there first."
            ) from error
        start = -raw.data_ptr() % SLOT_ALIGN
        return raw[start : start + nbytes]


HOST = ComputeDevice(torch.device("cpu"))


def open_device(name: str) -> ComputeDevice:
    """Find the device an `OffloadConfig` names.

    Args:
        name: "cpu", "cuda" (torch's current device) or "cuda:N".

    Raises:
        DeviceError: no driver, no such device, a torch without CUDA, or a GPU that this torch has
            no code for.
    """
    if name == "cpu":
        return HOST
    if torch.version.cuda is None:
        raise DeviceError(
            f'device="{name}": this torch ({torch.__version__}) was built without CUDA. Install a '
            'CUDA build of torch, or use device="cpu".'
        )
    wanted = torch.device(name)
    cuda = _core.CudaDevice(wanted.index or 0)  # a missing driver is named by the one who looks
    if wanted.index is None:
        wanted = torch.device("cuda", torch.cuda.current_device())
        cuda = _core.CudaDevice(wanted.index)
    check_capability(cuda, torch.cuda.get_arch_list())
    return ComputeDevice(wanted, cuda)


def check_capability(cuda: _core.CudaDevice, archs: list[str]) -> None:
    """Refuse a GPU older than everything in `archs` ("sm_80", ...), which torch was built for."""
    known = [int("".join(filter(str.isdigit, arch))) for arch in archs if arch.startswith("sm_")]
    major, minor = cuda.capability
    if known and major * 10 + minor < min(known):
        raise DeviceError(
            f"{cuda.name} has compute capability {major}.{minor}; this torch "
            f"({torch.__version__}) has kernels for {min(known) // 10}.{min(known) % 10} and newer."
            ' Install a torch built for this GPU, or use device="cpu".'
        )


def to_device(values: Sequence[Any], dtype: torch.dtype, device: torch.device) -> Tensor:
    """A small tensor on the device, through pinned memory: the host does not wait for it."""
    host = torch.tensor(values, dtype=dtype, pin_memory=device.type == "cuda")
    return host.to(device, non_blocking=True)


def read_ids(ids: Tensor) -> Tensor:
    """The routed ids on the host: the one place where a forward waits for the device.

    Args:
        ids: [T, A], integer. On the CPU they are returned as they are.

    Which pages to copy is the host's decision, so the host has to know; everything after it is
    enqueued. T * A * 8 bytes, through pinned memory.
    """
    if ids.device.type != "cuda":
        return ids
    host = torch.empty(ids.shape, dtype=ids.dtype, pin_memory=True)
    host.copy_(ids, non_blocking=True)
    torch.cuda.current_stream(ids.device).synchronize()
    return host
