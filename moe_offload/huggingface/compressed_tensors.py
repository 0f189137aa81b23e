"""compressed-tensors checkpoints in "pack-quantized", W4A16, as llm-compressor writes them.

A parameter X is stored as `X_packed` (int32 [N, K / 8], eight codes a word, lowest bits first),
`X_scale` [N, K / group] and `X_shape`; one scale a row where the strategy is "channel". Read from
compressed-tensors 0.20: compressors/pack_quantized, and `_dequantize` in quantization/lifecycle/
forward_helpers.py. What else the package knows is refused by name.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from moe_offload.errors import CheckpointError, UnsupportedModelError
from moe_offload.huggingface.packed_int4 import SCALE_DTYPES, PackedMatrix, expect
from moe_offload.quantization import INT4_PER_WORD
from moe_offload.safetensors_file import Checkpoint

METHOD = "compressed-tensors"
FORMAT = "pack-quantized"


@dataclass(frozen=True)
class CompressedTensors:
    """A `Packing`.

    Attributes:
        group_sizes: columns that share a scale, of every config group; None for whole rows.
    """

    group_sizes: frozenset[int | None]

    @classmethod
    def of_config(cls, values: Mapping[str, Any], path: str) -> CompressedTensors:
        """Check a quantization_config of compressed-tensors.

        Args:
            values: its content, as in config.json.
            path: for messages.

        Raises:
            UnsupportedModelError: anything but four-bit symmetric integers in `FORMAT`.
        """
        groups = values.get("config_groups") or {}
        _expect(path, "format", FORMAT, values.get("format"))
        _expect(path, "config_groups", "at least one group", sorted(groups), bool(groups))
        for name in ("kv_cache_scheme", "sparsity_config", "transform_config"):
            given = values.get(name) or {}
            plain = not given or given.get("format") == "dense" or given == {"config_groups": {}}
            _expect(path, name, "none", given, plain)
        sizes = set()
        for name, group in groups.items():
            weights = group.get("weights") or {}
            _expect(path, f"{name}.format", FORMAT, group.get("format") or FORMAT)
            for activations in ("input_activations", "output_activations"):
                _expect(path, f"{name}.{activations}", None, group.get(activations))
            for key, wanted in (("num_bits", 4), ("type", "int"), ("symmetric", True)):
                _expect(path, f"{name}.weights.{key}", wanted, weights.get(key))
            _expect(path, f"{name}.weights.dynamic", False, weights.get("dynamic") or False)
            order = str(weights.get("actorder") or "none").lower()
            inert = order in ("none", "weight", "static")  # these leave columns where they are
            _expect(path, f"{name}.weights.actorder", "none, weight or static", order, inert)
            sizes.add(_group_size(path, name, weights))
        return cls(frozenset(sizes))

    def matrices(self, files: Checkpoint) -> dict[str, tuple[PackedMatrix, list[str]]]:
        """See `Packing`."""
        found = {}
        for key in files.tensors:
            name = key.removesuffix("_packed")
            if name != key:
                keys = [key, f"{name}_scale", f"{name}_shape"]
                matrix = self._matrix(files, name)
                found[name] = (matrix, [key for key in keys if key in files.tensors])
        return found

    def _matrix(self, files: Checkpoint, name: str) -> PackedMatrix:
        """One packed matrix, its parts checked by their headers."""
        for part, what in (("zero_point", "asymmetric"), ("g_idx", "in activation order")):
            if f"{name}_{part}" in files.tensors:
                raise UnsupportedModelError(
                    f"{files.location}: {name} is quantised {what} ({name}_{part} exists); "
                    "expected symmetric codes in the order of the columns. Use such a checkpoint "
                    "of the model, or one in bfloat16."
                )
        codes, scales = files.tensors[f"{name}_packed"], files.tensors.get(f"{name}_scale")
        if scales is None:
            raise CheckpointError(
                f"{files.location}: {name}_packed is quantised, but {name}_scale is missing. The "
                "checkpoint is damaged or incomplete; download it again."
            )
        columns = codes.shape[-1] * INT4_PER_WORD if codes.shape else 0
        groups = scales.shape[-1] if scales.shape else 0
        size = columns // groups if groups else 0
        fits = (
            codes.dtype_name == "I32"
            and scales.dtype_name in SCALE_DTYPES
            and len(codes.shape) >= 2
            and scales.shape[:-1] == codes.shape[:-1]
            and math.prod(codes.shape) > 0
            and (
                (size * groups == columns and size in self.group_sizes)
                or (groups == 1 and None in self.group_sizes)
            )
        )
        if not fits:
            ordered = sorted(self.group_sizes, key=lambda size: size or 0)
            sizes = " or ".join("a row" if size is None else str(size) for size in ordered)
            raise CheckpointError(
                f"{files.location}: {name} is stored as {codes.dtype_name} {codes.shape} with "
                f"scales {scales.dtype_name} {scales.shape}; expected I32 [N, K / 8] with a float "
                f"scale for each group of {sizes}. Weights and config.json do not belong together."
            )
        if None in self.group_sizes and f"{name}_shape" in files.tensors:
            # without groups only this says whether the last word is full
            stored = files.read(f"{name}_shape").tolist()
            if stored[-1:] != [columns]:
                raise UnsupportedModelError(
                    f"{files.location}: {name} has {stored[-1:]} columns; expected a multiple of "
                    f"{INT4_PER_WORD}, whole words of codes. Use a checkpoint in bfloat16."
                )
        return PackedMatrix(
            path=codes.path,
            dtype_name=scales.dtype_name,
            shape=(*codes.shape[:-1], columns),
            offset=codes.offset,
            nbytes=codes.nbytes + scales.nbytes,
            codes=codes,
            scales=scales,
        )


def _group_size(path: str, name: str, weights: Mapping[str, Any]) -> int | None:
    size = weights.get("group_size")
    strategy = weights.get("strategy") or ("group" if size and size > 0 else "channel")
    known = strategy in ("group", "channel")
    _expect(path, f"{name}.weights.strategy", "group or channel", strategy, known)
    if strategy == "channel":
        return None
    fits = isinstance(size, int) and size >= INT4_PER_WORD
    _expect(path, f"{name}.weights.group_size", f"{INT4_PER_WORD} or more", size, fits)
    return size


def _expect(path: str, what: str, wanted: Any, got: Any, fits: bool | None = None) -> None:
    expect(path, METHOD, what, wanted, got, got == wanted if fits is None else fits)
