"""What one page looks like: the bytes of one expert, section by section.

A section is one expert's slice of one parameter of the experts module (`gate_up_proj`,
`down_proj`, biases), exactly as the checkpoint stores it, so a page goes from file to slot
verbatim and every transformers layout (gated or not, transposed, interleaved, biased) is only
another list of sections. Sections start at multiples of 256 bytes (vector loads, TMA); slots at
multiples of 4096. Experts with equal layouts share one pool of slots across all layers. Within its
slot a page may lie shifted, see `pager.ExpertPool`; a layout knows nothing of that.
"""

from __future__ import annotations

import math
import mmap
from collections.abc import Mapping
from dataclasses import dataclass

import torch
from torch import Tensor

from moe_offload import _core
from moe_offload.config import format_bytes
from moe_offload.errors import BudgetError

SECTION_ALIGN = 256
SLOT_ALIGN = 4096


def _round_up(value: int, multiple: int) -> int:
    return (value + multiple - 1) // multiple * multiple


@dataclass(frozen=True)
class Section:
    """One expert's slice of one parameter: `shape` without the expert dimension."""

    name: str
    shape: tuple[int, ...]
    dtype: torch.dtype
    offset: int  # bytes from the start of the page
    nbytes: int


@dataclass(frozen=True)
class PageLayout:
    """Byte layout of a page. Equal layouts are interchangeable, whatever layer they serve."""

    sections: tuple[Section, ...]

    @classmethod
    def build(cls, params: Mapping[str, tuple[tuple[int, ...], torch.dtype]]) -> PageLayout:
        """Lay out `{parameter name: (per-expert shape, dtype)}` in the order given.

        Raises:
            ValueError: no parameters, or one with no elements.
        """
        if not params:
            raise ValueError("PageLayout: expected at least one expert parameter, got none")
        sections, offset = [], 0
        for name, (shape, dtype) in params.items():
            nbytes = math.prod(shape) * dtype.itemsize
            if nbytes <= 0:
                raise ValueError(f"PageLayout: parameter {name!r} of shape {shape} has no bytes")
            sections.append(Section(name, tuple(shape), dtype, offset, nbytes))
            offset = _round_up(offset + nbytes, SECTION_ALIGN)
        return cls(tuple(sections))

    @property
    def page_bytes(self) -> int:
        """Bytes from the first section's start to the last section's end."""
        last = self.sections[-1]
        return last.offset + last.nbytes

    @property
    def payload_bytes(self) -> int:
        """Bytes of weights, alignment gaps left out: what a copy of the page moves."""
        return sum(section.nbytes for section in self.sections)

    @property
    def slot_stride(self) -> int:
        """Bytes from one slot to the next."""
        return _round_up(self.page_bytes, SLOT_ALIGN)

    def section(self, name: str) -> Section:
        for section in self.sections:
            if section.name == name:
                return section
        names = ", ".join(section.name for section in self.sections)
        raise KeyError(f"page has no section {name!r}; it has {names}")

    def views(self, slab: Tensor, stride: int | None = None) -> dict[str, Tensor]:
        """See a slab of slots as parameters.

        Args:
            slab: uint8 [S * stride], contiguous, its start aligned to 256 bytes.
            stride: bytes from slot to slot, a multiple of 256; default: slot_stride.

        Returns:
            `{name: Tensor[S, *shape]}`, views into the slab with that stride over S.
        """
        stride = stride or self.slot_stride
        num_slots = slab.numel() // stride
        views = {}
        for section in self.sections:
            typed = slab[section.offset :]
            # slots and sections are 256-aligned, so the byte offset divides evenly
            end = (num_slots - 1) * stride + section.nbytes
            flat = typed[:end].view(section.dtype)
            strides, step = [], 1
            for size in reversed(section.shape):
                strides.append(step)
                step *= size
            views[section.name] = flat.as_strided(
                (num_slots, *section.shape),
                (stride // section.dtype.itemsize, *reversed(strides)),
            )
        return views


def pack_experts(tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Copy whole parameters into one slab of pages on their device, for kernels that read pages.

    Args:
        tensors: `{parameter name: [E, ...]}`, on one device, in the order of a page's sections.

    Returns:
        `{name: Tensor[E, ...]}` with the same values, views of the slab, which lives as long as
        any of them. Use them in place of the originals. Bytes: E * slot_stride.

    Raises:
        ValueError: no parameters, different numbers of experts, or several devices.

    Example:
        >>> packed = pack_experts({"gate_up_proj": gate_up, "down_proj": down})
        >>> out = expert_ffn(hidden, packed["gate_up_proj"], packed["down_proj"], ids, weights)
    """
    layout = PageLayout.build({name: (tuple(t.shape[1:]), t.dtype) for name, t in tensors.items()})
    first = next(iter(tensors.values()))
    if len({(len(tensor), tensor.device) for tensor in tensors.values()}) != 1:
        found = ", ".join(f"{n}: {len(t)} on {t.device}" for n, t in tensors.items())
        raise ValueError(
            f"pack_experts: expected as many experts in each, on one device, got {found}"
        )
    nbytes = len(first) * layout.slot_stride
    raw = torch.zeros(nbytes + SLOT_ALIGN, dtype=torch.uint8, device=first.device)
    start = -raw.data_ptr() % SLOT_ALIGN
    views = layout.views(raw[start : start + nbytes])
    for name, view in views.items():
        view.copy_(tensors[name])
    return views


def find_slab(tensors: Mapping[str, Tensor]) -> tuple[Tensor, int, dict[str, int]] | None:
    """The slab whose views these parameters are.

    Args:
        tensors: `{parameter name: [E, ...]}`.

    Returns:
        The slab, uint8 [E * slot_stride], from a multiple of 256 bytes on; slot_stride; the offset
        of each section. None when they do not share one allocation as pages of it, with sections
        and slots at multiples of 16 bytes.
    """
    parts = list(tensors.values())
    storage = parts[0].untyped_storage()
    num_experts, stride = len(parts[0]), parts[0].stride(0) * parts[0].element_size()
    base = min(part.data_ptr() for part in parts)
    offsets = {name: part.data_ptr() - base for name, part in tensors.items()}
    for part, offset in zip(parts, offsets.values(), strict=True):
        fits = offset + part[0].numel() * part.element_size() <= stride
        if (
            part.untyped_storage().data_ptr() != storage.data_ptr()
            or part.stride(0) * part.element_size() != stride
            or not (len(part) == num_experts and part[0].is_contiguous() and fits)
            or offset % 16
        ):
            return None
    start = base - storage.data_ptr()
    if base % SECTION_ALIGN or stride % 16 or start + num_experts * stride > storage.nbytes():
        return None
    slab = torch.empty(0, dtype=torch.uint8, device=parts[0].device)
    slab.set_(storage, start, (num_experts * stride,), (1,))
    return slab, stride, offsets


def allocate_slab(num_slots: int, stride: int) -> Tensor:
    """A slab of slots that reads as zeros, uint8 [S * stride], from a 4096-byte boundary on.

    Zeros so that no kernel that multiplies a masked row by zero can meet NaN left in memory by
    someone else. They are the kernel's own: memory is taken when a slot is first written, and a
    budget of gigabytes costs nothing until then. In huge pages where the kernel gives them: matrix
    kernels that stream weights save TLB misses, and direct reads need fewer pieces.

    Raises:
        BudgetError: the system refuses so much address space.
    """
    nbytes = num_slots * stride
    try:
        memory = mmap.mmap(-1, nbytes + SLOT_ALIGN, flags=mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS)
    except OSError as error:
        raise BudgetError(
            f"device_budget: the system refuses {format_bytes(nbytes)} of memory for slots: "
            f"{error.strerror}. Lower device_budget, or the limit (ulimit -v) is too low."
        ) from error
    raw = torch.frombuffer(memory, dtype=torch.uint8)  # keeps the mapping
    _core.advise_huge_pages(raw.data_ptr(), raw.numel())  # before it is touched
    start = -raw.data_ptr() % SLOT_ALIGN
    return raw[start : start + nbytes]
