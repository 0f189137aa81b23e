"""Where pages come from: byte ranges of files, tensors in memory, or a Python converter.

A source answers one question, "the page of (layer, expert), please", and knows nothing of slots
or policy. These classes collect the answers in Python terms; the pager turns them into the C++
sources that worker threads read from. Files are read with `pread`, never mapped: read-ahead on a
mapped file moved 3.5 times the bytes wanted (reference measurements in docs/architecture.md).
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass

from torch import Tensor

from moe_offload import _core
from moe_offload.pages import PageLayout


@dataclass(frozen=True)
class Piece:
    """A contiguous byte range of a file that belongs at a place in a section of a page."""

    section: str
    section_offset: int
    path: str
    file_offset: int
    nbytes: int


class FilePages:
    """Pages as byte ranges of safetensors files, read verbatim into slots."""

    def __init__(self) -> None:
        self._pieces: dict[tuple[int, int], list[Piece]] = {}

    def add(self, layer: int, expert: int, pieces: list[Piece]) -> None:
        """Say where the bytes of one page lie. The pieces must cover every section once."""
        self._pieces[layer, expert] = list(pieces)

    def core_source(
        self, layout: PageLayout, layers: list[int], num_experts: list[int], direct_io: bool
    ) -> _core.PageSource:
        paths: dict[str, int] = {}
        pages = []
        for local, (layer, count) in enumerate(zip(layers, num_experts, strict=True)):
            for expert in range(count):
                pieces = self._pieces.get((layer, expert))
                if pieces is None:
                    raise ValueError(f"FilePages: no pieces for layer {layer} expert {expert}")
                _check_coverage(layout, layer, expert, pieces)
                pages.append(
                    (
                        local,
                        expert,
                        [
                            (
                                paths.setdefault(piece.path, len(paths)),
                                piece.file_offset,
                                piece.nbytes,
                                layout.section(piece.section).offset + piece.section_offset,
                            )
                            for piece in pieces
                        ],
                    )
                )
        source = _core.FileSource(list(paths), direct_io)
        for local, expert, segments in pages:
            source.add_page(local, expert, segments)
        return source


class TensorPages:
    """Pages as slices of tensors in memory; the tensors are kept alive, never copied or changed."""

    def __init__(self) -> None:
        self._tensors: dict[int, dict[str, Tensor]] = {}

    def add_layer(self, layer: int, tensors: Mapping[str, Tensor]) -> None:
        """Give one layer's parameters, each [E, *section shape], contiguous, on the CPU."""
        for name, tensor in tensors.items():
            if tensor.device.type != "cpu" or not tensor.is_contiguous():
                raise ValueError(
                    f"TensorPages: {name} of layer {layer} must be contiguous on the CPU, got "
                    f"strides {tensor.stride()} on {tensor.device}. Call .contiguous() first."
                )
        self._tensors[layer] = dict(tensors)

    def core_source(
        self, layout: PageLayout, layers: list[int], num_experts: list[int], direct_io: bool
    ) -> _core.PageSource:
        source = _core.MemorySource()
        for local, (layer, count) in enumerate(zip(layers, num_experts, strict=True)):
            tensors = self._tensors[layer]
            for expert in range(count):
                segments = []
                for section in layout.sections:
                    tensor = tensors[section.name]
                    if tuple(tensor.shape) != (count, *section.shape):
                        raise ValueError(
                            f"TensorPages: {section.name} of layer {layer} must have shape "
                            f"{(count, *section.shape)}, got {tuple(tensor.shape)}"
                        )
                    pointer = tensor.data_ptr() + expert * section.nbytes
                    segments.append((pointer, section.nbytes, section.offset))
                source.add_page(local, expert, segments)
        source.keep_alive(tuple(tensors for tensors in self._tensors.values()))
        return source


class CallbackPages:
    """Pages made by a Python function: for checkpoints whose bytes need converting first.

    Args:
        make: `(layer, expert) -> {section name: Tensor[*section shape]}`; called on a worker
            thread. What it raises reaches the caller that waits for the page.
        disk_bytes: `(layer, expert) -> bytes` that `make` reads from storage, for the counters.
    """

    def __init__(
        self,
        make: Callable[[int, int], Mapping[str, Tensor]],
        disk_bytes: Callable[[int, int], int] | None = None,
    ) -> None:
        self._make = make
        self._disk_bytes = disk_bytes

    def core_source(
        self, layout: PageLayout, layers: list[int], num_experts: list[int], direct_io: bool
    ) -> _core.PageSource:
        make, disk_bytes = self._make, self._disk_bytes

        def fill(local: int, expert: int, pointer: int) -> int:
            tensors = make(layers[local], expert)
            for section in layout.sections:
                tensor = tensors[section.name]
                if tuple(tensor.shape) != section.shape or tensor.dtype != section.dtype:
                    raise ValueError(
                        f"converter: {section.name} of layer {layers[local]} expert {expert} must "
                        f"be {section.dtype} {section.shape}, got {tensor.dtype} "
                        f"{tuple(tensor.shape)}"
                    )
                tensor = tensor.contiguous()
                _core.copy_bytes(pointer + section.offset, tensor.data_ptr(), section.nbytes)
            return disk_bytes(layers[local], expert) if disk_bytes else 0

        return _core.CallbackSource(fill, layout.payload_bytes)


PageSource = FilePages | TensorPages | CallbackPages


def _check_coverage(layout: PageLayout, layer: int, expert: int, pieces: list[Piece]) -> None:
    """Every byte of every section exactly once: a gap would be silent wrong output."""
    for section in layout.sections:
        position = 0
        for piece in sorted(
            (piece for piece in pieces if piece.section == section.name),
            key=lambda piece: piece.section_offset,
        ):
            if piece.section_offset != position:
                position = -1
                break
            position += piece.nbytes
        if position != section.nbytes:
            raise ValueError(
                f"FilePages: layer {layer} expert {expert}: the pieces of {section.name!r} must "
                f"cover its {section.nbytes} bytes once and without gaps"
            )
