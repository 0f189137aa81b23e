"""Safetensors files as byte ranges: where each tensor lies, and exact reads of it.

The pager needs offsets, not tensors, and a paging system must not trust a header it did not
check: one flipped bit in an offset is silent wrong output. So this reads the header itself, as
strictly as the format's reference implementation (ranges in order, no holes, no overlap, length =
file size), and says which file, what was expected and what came. Reads are `pread` of exactly the
bytes asked for, never `mmap`: with a mapping the kernel's read-ahead moved 3.5 times the bytes
wanted. Format: https://huggingface.co/docs/safetensors (8-byte length, JSON, bytes).
"""

from __future__ import annotations

import json
import math
import os
import threading
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from moe_offload.errors import CheckpointError, PageReadError

MAX_HEADER_BYTES = 100_000_000  # the limit of the reference implementation
INDEX_NAME = "model.safetensors.index.json"
SINGLE_NAME = "model.safetensors"

# The format's dtypes: bits per element, and torch's name where torch has one.
_DTYPES: dict[str, tuple[int, str]] = {
    "BOOL": (8, "bool"),
    "U8": (8, "uint8"),
    "I8": (8, "int8"),
    "U16": (16, "uint16"),
    "I16": (16, "int16"),
    "U32": (32, "uint32"),
    "I32": (32, "int32"),
    "U64": (64, "uint64"),
    "I64": (64, "int64"),
    "F4": (4, ""),
    "F6_E2M3": (6, ""),
    "F6_E3M2": (6, ""),
    "F8_E4M3": (8, "float8_e4m3fn"),
    "F8_E5M2": (8, "float8_e5m2"),
    "F8_E8M0": (8, "float8_e8m0fnu"),
    "F8_E4M3FNUZ": (8, "float8_e4m3fnuz"),
    "F8_E5M2FNUZ": (8, "float8_e5m2fnuz"),
    "F16": (16, "float16"),
    "BF16": (16, "bfloat16"),
    "F32": (32, "float32"),
    "F64": (64, "float64"),
    "C64": (64, "complex64"),
}


@dataclass(frozen=True)
class TensorRange:
    """One tensor's place: `nbytes` bytes at `offset` of the file at `path`.

    Attributes:
        dtype_name: the format's own name ("BF16"); `dtype` is torch's.
        offset: bytes from the start of the file, header included.
    """

    path: str
    dtype_name: str
    shape: tuple[int, ...]
    offset: int
    nbytes: int

    @property
    def dtype(self) -> torch.dtype:
        """Torch's dtype; CheckpointError when this torch has none (4- and 6-bit floats)."""
        dtype = getattr(torch, _DTYPES[self.dtype_name][1], None)
        if not isinstance(dtype, torch.dtype):
            raise CheckpointError(
                f"{self.path}: dtype {self.dtype_name} has no counterpart in torch "
                f"{torch.__version__}. Convert the checkpoint to bfloat16 first."
            )
        return dtype


def read_header(path: str | os.PathLike[str]) -> dict[str, TensorRange]:
    """Read and check a safetensors header; no tensor byte is read.

    Args:
        path: a .safetensors file.

    Returns:
        `{tensor name: TensorRange}` in file order, paths absolute.

    Raises:
        CheckpointError: missing, truncated, not safetensors, or a header that contradicts itself
            or the file's size. The text names the file, what was expected, what came.
    """
    path = os.path.abspath(os.fspath(path))
    raw, file_size = _read_header_bytes(path)
    try:
        header = json.loads(raw, object_pairs_hook=_unique_pairs, parse_constant=_no_constant)
    except (ValueError, RecursionError) as error:  # UnicodeDecodeError, JSONDecodeError: ValueError
        raise _bad(path, f"its header must be JSON text, but: {error}") from None
    if not isinstance(header, dict):
        raise _bad(path, f"its header must be a JSON object, got {type(header).__name__}")
    metadata = header.pop("__metadata__", {})
    if not isinstance(metadata, dict) or not all(isinstance(v, str) for v in metadata.values()):
        raise _bad(path, "__metadata__ in its header must map strings to strings")
    data_start = 8 + len(raw)
    ranges = {name: _tensor_range(path, name, entry, data_start) for name, entry in header.items()}
    _check_tiling(path, ranges, data_start, file_size)
    return ranges


def _bad(path: str, what: str) -> CheckpointError:
    return CheckpointError(
        f"{path} is not a valid safetensors file: {what}. The file is damaged or was written by "
        "something else; copy or download it again."
    )


def _no_read_ahead(descriptor: int) -> None:
    """Let the kernel read the bytes asked for and nothing beyond."""
    if hasattr(os, "posix_fadvise"):
        os.posix_fadvise(descriptor, 0, 0, os.POSIX_FADV_RANDOM)


def _read_header_bytes(path: str) -> tuple[bytes, int]:
    if not os.path.isfile(path):
        kind = "is a directory" if os.path.isdir(path) else "does not exist"
        raise CheckpointError(
            f"{path}: expected a .safetensors file, but it {kind}. Check the path, or download "
            "the missing file."
        )
    try:
        with open(path, "rb") as file:
            _no_read_ahead(file.fileno())  # it would read megabytes of weights behind the header
            file_size = os.fstat(file.fileno()).st_size
            prefix = file.read(8)
            length = int.from_bytes(prefix, "little")
            if file_size < 10:
                raise _bad(path, f"expected at least 10 bytes (length and '{{}}'), got {file_size}")
            if length > MAX_HEADER_BYTES or length < 2:
                raise _bad(
                    path,
                    f"its first 8 bytes announce a header of {length} bytes, expected 2 to "
                    f"{MAX_HEADER_BYTES}",
                )
            if 8 + length > file_size:
                raise _bad(
                    path,
                    f"its header of {length} bytes does not fit in the file's {file_size} bytes "
                    "(truncated?)",
                )
            raw = file.read(length)
    except OSError as error:
        raise CheckpointError(
            f"{path}: cannot read the file: {error.strerror}. Check its permissions and the disk."
        ) from error
    if not raw.startswith(b"{"):
        raise _bad(path, f"its header must begin with '{{', got {raw[:8]!r}")
    return raw, file_size


def _unique_pairs(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    result = dict(pairs)
    if len(result) != len(pairs):
        seen: set[str] = set()
        twice = next(key for key, _ in pairs if key in seen or seen.add(key))  # type: ignore[func-returns-value]
        raise ValueError(f"the key {twice!r} appears twice")
    return result


def _no_constant(text: str) -> None:
    raise ValueError(f"{text} is not JSON")


def _is_count(value: object) -> bool:
    return isinstance(value, int) and not isinstance(value, bool) and value >= 0


def _tensor_range(path: str, name: str, entry: object, data_start: int) -> TensorRange:
    if not isinstance(entry, dict) or set(entry) != {"dtype", "shape", "data_offsets"}:
        keys = sorted(entry) if isinstance(entry, dict) else type(entry).__name__
        raise _bad(path, f"tensor {name!r} must have dtype, shape and data_offsets, got {keys}")
    dtype, shape, offsets = entry["dtype"], entry["shape"], entry["data_offsets"]
    if not isinstance(dtype, str) or dtype not in _DTYPES:
        raise _bad(path, f"tensor {name!r} has the unknown dtype {dtype!r}")
    if not isinstance(shape, list) or not all(_is_count(size) for size in shape):
        raise _bad(path, f"tensor {name!r} has the shape {shape!r}, expected a list of sizes >= 0")
    if not isinstance(offsets, list) or len(offsets) != 2 or not all(map(_is_count, offsets)):
        raise _bad(path, f"tensor {name!r} has data_offsets {offsets!r}, expected [begin, end]")
    begin, end = offsets
    bits = math.prod(shape) * _DTYPES[dtype][0]
    if begin > end or (end - begin) * 8 != bits:
        raise _bad(
            path,
            f"tensor {name!r} of {dtype} {shape} needs {bits // 8} bytes, but its data_offsets "
            f"{offsets} span {end - begin}",
        )
    return TensorRange(path, dtype, tuple(shape), data_start + begin, end - begin)


def _check_tiling(
    path: str, ranges: Mapping[str, TensorRange], data_start: int, file_size: int
) -> None:
    """The ranges must tile the data: any hole or overlap means a wrong offset somewhere."""
    position = data_start
    for name, tensor in sorted(ranges.items(), key=lambda item: (item[1].offset, item[1].nbytes)):
        if tensor.offset != position:
            kind = "overlaps the one before it" if tensor.offset < position else "leaves a hole"
            raise _bad(
                path,
                f"tensor {name!r} {kind}: expected it at byte {position - data_start} of the "
                f"data, its data_offsets say {tensor.offset - data_start}",
            )
        position += tensor.nbytes
    if position != file_size:
        state = "truncated" if file_size < position else "longer than its header says"
        raise _bad(
            path, f"its header describes {position} bytes, the file has {file_size} ({state})"
        )


class Checkpoint:
    """The tensors of one checkpoint, in one file or in shards, readable one range at a time.

    Files are opened at the first read and stay open until `close()`, so a file that is deleted
    later still gives its bytes. Reads are thread-safe. Use `Checkpoint.open` or `from_files`.
    """

    def __init__(self, tensors: dict[str, TensorRange], location: str) -> None:
        self.tensors = tensors
        self.location = location  # for messages: the folder or file the caller named
        self._files: dict[str, tuple[int, tuple[int, int]]] = {}  # path: (fd, (size, mtime_ns))
        self._lock = threading.Lock()

    @classmethod
    def open(cls, path: str | os.PathLike[str]) -> Checkpoint:
        """Open a .safetensors file or a folder with one, or with an index and its shards."""
        path = Path(os.path.abspath(os.fspath(path)))
        if not path.is_dir():
            return cls.from_files([path], str(path))
        index = path / INDEX_NAME
        if index.is_file():
            weight_map = _read_index(index)
            shards = list(dict.fromkeys(path / shard for shard in weight_map.values()))
            missing = [shard.name for shard in shards if not shard.is_file()]
            if missing:
                raise CheckpointError(
                    f"{path}: {index.name} names {len(shards)} shards, but "
                    f"{', '.join(missing)} {'is' if len(missing) == 1 else 'are'} missing. "
                    "Download the missing files."
                )
            checkpoint = cls.from_files(shards, str(path))
            for name, shard in weight_map.items():
                found = checkpoint.tensors.get(name)
                if found is None or found.path != str(path / shard):
                    where = "no shard" if found is None else os.path.basename(found.path)
                    raise CheckpointError(
                        f"{path}: {index.name} says tensor {name!r} is in {shard}, but it is in "
                        f"{where}. Index and shards do not belong together; download them again."
                    )
            return checkpoint
        if (path / SINGLE_NAME).is_file():
            return cls.from_files([path / SINGLE_NAME], str(path))
        others = sorted(p.name for p in path.glob("*") if p.suffix in (".bin", ".pt", ".pth"))
        hint = (
            f" It has {others[0]}, a pickled torch checkpoint: load it with transformers and call "
            "save_pretrained(new_folder) once, which writes safetensors."
            if others
            else " Check the path, or download the weights."
        )
        raise CheckpointError(f"{path}: expected {SINGLE_NAME} or {INDEX_NAME}, found none.{hint}")

    @classmethod
    def from_files(cls, paths: Iterable[str | os.PathLike[str]], location: str) -> Checkpoint:
        """Read the headers of these files; the same tensor in two of them is an error."""
        tensors: dict[str, TensorRange] = {}
        for path in paths:
            for name, tensor in read_header(path).items():
                if name in tensors:
                    raise CheckpointError(
                        f"{location}: tensor {name!r} is in {os.path.basename(tensor.path)} and in "
                        f"{os.path.basename(tensors[name].path)}. Keep the shards of one "
                        "checkpoint in one folder."
                    )
                tensors[name] = tensor
        return cls(tensors, location)

    def read(self, name: str, row: int | None = None) -> Tensor:
        """Read a tensor, or with `row` only the slice `[row : row + 1]` of its first dimension.

        Returns:
            A fresh CPU tensor of the file's dtype. Blocks; reads exactly the bytes returned.

        Raises:
            PageReadError: the read failed, or the file changed since it was opened.
        """
        return self.read_range(self.tensors[name], name, row)

    def read_range(self, tensor: TensorRange, name: str, row: int | None = None) -> Tensor:
        """As `read`, of any range in the checkpoint's files; `name` is for messages."""
        offset, nbytes, shape = tensor.offset, tensor.nbytes, tensor.shape
        if row is not None:
            nbytes //= shape[0]
            offset += row * nbytes
            shape = (1, *shape[1:])
        out = torch.empty(nbytes, dtype=torch.uint8)
        self._read_into(tensor.path, offset, out.numpy().data, name)
        return out.view(tensor.dtype).reshape(shape)

    def _read_into(self, path: str, offset: int, out: memoryview, name: str) -> None:
        done = 0
        try:
            descriptor, opened = self._open_file(path)
            while done < len(out):
                count = os.preadv(descriptor, [out[done : done + (1 << 30)]], offset + done)
                if count == 0:
                    break
                done += count
            status = os.fstat(descriptor)
        except OSError as error:
            raise PageReadError(
                f"{path}: reading {len(out)} bytes at offset {offset} for tensor {name!r} failed: "
                f"{error.strerror}. Check the disk, then call again."
            ) from error
        if done < len(out) or (status.st_size, status.st_mtime_ns) != opened:
            raise PageReadError(
                f"{path} changed while in use: opened with {opened[0]} bytes, now "
                f"{status.st_size}; reading tensor {name!r} at offset {offset} gave {done} of "
                f"{len(out)} bytes. Put the file back, or load the model again."
            )

    def _open_file(self, path: str) -> tuple[int, tuple[int, int]]:
        with self._lock:
            if path not in self._files:
                descriptor = os.open(path, os.O_RDONLY | os.O_CLOEXEC)
                _no_read_ahead(descriptor)
                status = os.fstat(descriptor)
                self._files[path] = (descriptor, (status.st_size, status.st_mtime_ns))
            return self._files[path]

    def close(self) -> None:
        """Close the files; a later read opens them again."""
        with self._lock:
            for descriptor, _ in self._files.values():
                os.close(descriptor)
            self._files.clear()

    def __del__(self) -> None:
        self.close()


def _read_index(index: Path) -> dict[str, str]:
    try:
        content = json.loads(index.read_text(encoding="utf-8"), object_pairs_hook=_unique_pairs)
    except (OSError, ValueError) as error:
        raise CheckpointError(
            f"{index} must be a JSON file that maps tensors to shards, but: {error}. "
            "Download it again."
        ) from None
    weight_map = content.get("weight_map") if isinstance(content, dict) else None
    if (
        not isinstance(weight_map, dict)
        or not weight_map
        or not all(isinstance(shard, str) for shard in weight_map.values())
    ):
        raise CheckpointError(
            f"{index}: expected an object with weight_map: {{tensor: shard file}}, got "
            f"{type(content).__name__} without one. Download it again."
        )
    return weight_map
