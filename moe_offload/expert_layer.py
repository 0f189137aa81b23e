"""One experts module as the offloader sees it: its numbers, and what a page of it holds."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any

import torch

from moe_offload.quantization import format_of


@dataclass
class ExpertLayer:
    """One experts module as the offloader sees it.

    Attributes:
        name: qualified module name, for messages.
        module: the experts module, or an `ExpertForm`: what a backend reads to know the
            arithmetic. None for layers that are only paged, never computed.
        num_experts: E.
        tensors: `{parameter name: (shape of one expert's slice, dtype)}`, in page order.
        stored: the sections of a page where it holds quantised weights instead: codes under the
            parameter's name, scales under the name + "_scales".
        dequantised: why pages of a quantised checkpoint hold dequantised weights.
    """

    name: str
    module: Any
    num_experts: int
    tensors: dict[str, tuple[tuple[int, ...], torch.dtype]]
    stored: dict[str, tuple[tuple[int, ...], torch.dtype]] | None = None
    dequantised: str | None = None

    @property
    def page(self) -> dict[str, tuple[tuple[int, ...], torch.dtype]]:
        """The sections of a page: `{name: (shape, dtype)}`."""
        return self.tensors if self.stored is None else self.stored

    @property
    def weight_format(self) -> str:
        """How a page holds weights: of `quantization.FORMATS`."""
        formats = {format_of(dtype) for _, dtype in self.page.values()} - {"plain"}
        return min(formats, default="plain")

    @property
    def resident_bytes(self) -> int:
        """Bytes of all its experts as parameters of a resident model."""
        return self.num_experts * _num_bytes(self.tensors)

    @property
    def page_bytes(self) -> int:
        """Bytes of one expert as a page holds it."""
        return _num_bytes(self.page)


def _num_bytes(tensors: dict[str, tuple[tuple[int, ...], torch.dtype]]) -> int:
    return sum(math.prod(shape) * dtype.itemsize for shape, dtype in tensors.values())
