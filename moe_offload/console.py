"""What commands write to a terminal: tables with aligned columns, and progress bars."""

from __future__ import annotations

import sys
from collections.abc import Collection, Iterable, Sequence
from typing import Any


def aligned(rows: Sequence[Sequence[str]], left: Collection[int] = (0,)) -> list[str]:
    """Rows of cells as lines whose columns stand under each other.

    Args:
        rows: all of one length.
        left: columns written from the left; the others end on the right, as numbers should.
    """
    widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
    return [
        "  ".join(
            cell.ljust(width) if column in left else cell.rjust(width)
            for column, (cell, width) in enumerate(zip(row, widths, strict=True))
        ).rstrip()
        for row in rows
    ]


def progress(items: Iterable[Any] | None = None, **options: Any) -> Any:
    """A tqdm bar on stderr, only where a person looks at it; gone when it is done.

    Args:
        items: what to iterate over; None: the caller calls `update`.
        options: tqdm's, such as `desc` and `total`.
    """
    from tqdm import tqdm

    return tqdm(items, leave=False, disable=not sys.stderr.isatty(), **options)
