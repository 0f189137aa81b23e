"""What a budget buys: slots on the compute device, and host memory in front of a GPU."""

from __future__ import annotations

from collections.abc import Sequence

from moe_offload import _core
from moe_offload.config import format_bytes, parse_budget
from moe_offload.errors import BudgetError
from moe_offload.memory import available_memory_bytes
from moe_offload.pager import MIN_SLOTS
from moe_offload.pages import PageLayout
from moe_offload.sources import PageSource, TensorPages


def plan_slots(
    layouts: Sequence[PageLayout], num_pages: Sequence[int], budget: int | str
) -> list[int]:
    """Slots per pool that a budget buys, shared in proportion to each pool's bytes.

    Raises:
        BudgetError: malformed, or too small for MIN_SLOTS pages of every pool; the message names
            the smallest budget that works.
    """
    sizes = [layout.slot_stride * pages for layout, pages in zip(layouts, num_pages, strict=True)]
    total = sum(sizes)
    budget_bytes = parse_budget(budget, total)
    payload = sum(
        layout.payload_bytes * pages for layout, pages in zip(layouts, num_pages, strict=True)
    )
    if budget_bytes >= payload:  # everything fits; slot padding is not held against the user
        return list(num_pages)
    slots = [
        min(budget_bytes * size // total // layout.slot_stride, pages)
        for layout, size, pages in zip(layouts, sizes, num_pages, strict=True)
    ]
    if any(num < min(MIN_SLOTS, pages) for num, pages in zip(slots, num_pages, strict=True)):
        smallest = smallest_budget(layouts, num_pages)
        raise BudgetError(
            f"device_budget: {budget!r} is {budget_bytes} bytes, but this model's experts need at "
            f"least {smallest} bytes ({format_bytes(smallest)}): {MIN_SLOTS} experts of "
            f"{format_bytes(max(layout.slot_stride for layout in layouts))} at a time. "
            f"All experts together are {total} bytes ({format_bytes(total)})."
        )
    return slots


def check_memory(num_bytes: int, budget: int | str, freed_bytes: int = 0) -> None:
    """Slots in host memory must fit in what is free now: it is taken little by little, and a
    process that is killed for it in the middle of a text could have been told.

    Args:
        num_bytes: what the slots may come to occupy.
        budget: as the user gave it, for the message.
        freed_bytes: of slots that are given back before.

    Raises:
        BudgetError: they do not fit.
    """
    free = available_memory_bytes() + freed_bytes
    if num_bytes > free:
        raise BudgetError(
            f"device_budget: {budget!r} is {format_bytes(num_bytes)} of slots, but only "
            f"{format_bytes(free)} of memory are free. Give a device_budget below that, or free "
            "memory first."
        )


def plan_host(
    layouts: Sequence[PageLayout],
    num_pages: Sequence[int],
    budget: int | str,
    pages: PageSource,
    available_bytes: int | None = None,
) -> list[int]:
    """Host memory per pool between a source and the slots of a GPU.

    Args:
        budget: as `OffloadConfig.host_budget`.
        pages: the source; tensors need no frames, only pinning.
        available_bytes: memory that is free; default: asked of the system.

    Raises:
        BudgetError: too small for the frames that copies need, or more than is free.
    """
    strides = [_core.host_frame_bytes(layout.page_bytes) for layout in layouts]
    sizes = [stride * count for stride, count in zip(strides, num_pages, strict=True)]
    total = sum(sizes)
    in_memory = isinstance(pages, TensorPages)
    free = available_memory_bytes() if available_bytes is None else available_bytes
    least = [stride * _core.MIN_HOST_FRAMES for stride in strides]
    if budget == "auto":
        wanted = total if in_memory else max(min(total, free // 2), sum(least))
    else:
        wanted = parse_budget(budget, total, "host_budget")
    if in_memory:  # registering rounds to pages, so "all" is a little more than the bytes
        return [1 << 62 if wanted >= total else wanted * size // total for size in sizes]
    if wanted < min(total, sum(least)):
        raise BudgetError(
            f"host_budget: {budget!r} is {wanted} bytes, but pages on their way from disk to the "
            f"GPU need at least {sum(least)} bytes ({format_bytes(sum(least))}): "
            f"{_core.MIN_HOST_FRAMES} experts of {format_bytes(max(strides))} at a time."
        )
    wanted = max(min(wanted, total), sum(least))
    if wanted > free:
        raise BudgetError(
            f"host_budget: {budget!r} is {format_bytes(wanted)}, but only {format_bytes(free)} of "
            'memory are free. Lower it, or leave it "auto".'
        )
    rest = wanted - sum(least)
    return [low + rest * size // total for low, size in zip(least, sizes, strict=True)]


def smallest_budget(layouts: Sequence[PageLayout], num_pages: Sequence[int]) -> int:
    """The smallest budget in bytes that `plan_slots` accepts."""
    sizes = [layout.slot_stride * pages for layout, pages in zip(layouts, num_pages, strict=True)]
    total = sum(sizes)
    return max(
        -(-min(MIN_SLOTS, pages) * layout.slot_stride * total // size)
        for layout, size, pages in zip(layouts, sizes, num_pages, strict=True)
    )
