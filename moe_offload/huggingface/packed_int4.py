"""Checkpoints of four-bit integers: their packed matrices seen as the tensors they mean.

A parameter X is stored as words of eight codes, scales and more, under other names. transformers
needs a package per method to load that. Here a checkpoint is read through a view in which X exists,
with the shape and dtype of what it means, and reading X dequantises it: transformers loads the
dense layers, and its converters describe the experts, as those of a checkpoint in bfloat16. Pages
take what is behind the view (`quantised.py`). A weight is (code - 8) * scale, rounded to the
scales' dtype and then to the model's: what the methods' own packages dequantise to.

The methods are in `compressed_tensors.py` and `gptq.py`. Config and tensors are checked against
each other from the headers.
"""

from __future__ import annotations

import copy
from dataclasses import dataclass
from typing import Any, Protocol

from torch import Tensor

from moe_offload.errors import CheckpointError, UnsupportedModelError
from moe_offload.quantization import dequantise_int4_group
from moe_offload.safetensors_file import Checkpoint, TensorRange

SCALE_DTYPES = ("BF16", "F16", "F32")


@dataclass(frozen=True)
class PackedMatrix(TensorRange):
    """A tensor [..., N, K] that is stored packed, row by row as pages hold it.

    Attributes:
        dtype_name: of the scales, and of what it means.
        offset, nbytes: of `codes`, and bytes of everything it is made of.
        codes: int32 [..., N, K / 8].
        scales: [..., N, K / group].
    """

    codes: TensorRange
    scales: TensorRange

    in_rows = True  # do codes and scales lie in the file as pages hold them?

    @property
    def page_shapes(self) -> tuple[tuple[int, ...], tuple[int, ...]]:
        """Shapes of codes and scales as pages hold them."""
        return self.codes.shape, self.scales.shape

    def read_codes(self, files: Checkpoint, name: str, row: int | None = None) -> Tensor:
        """int32 [..., N, K / 8]; with `row` as `Checkpoint.read`. `name` is for messages."""
        return files.read_range(self.codes, name, row)

    def read_scales(self, files: Checkpoint, name: str, row: int | None = None) -> Tensor:
        """[..., N, K / group]."""
        return files.read_range(self.scales, name, row)


class Packing(Protocol):
    """What config.json says of packed matrices."""

    def matrices(self, files: Checkpoint) -> dict[str, tuple[PackedMatrix, list[str]]]:
        """Every packed matrix by the name of what it means, and the keys it is made of.

        Raises:
            CheckpointError: tensors that belong neither together nor to the config.
            UnsupportedModelError: tensors of a form that is not read.
        """


class PackedCheckpoint(Checkpoint):
    """A checkpoint whose packed matrices appear in `tensors` as what they mean.

    Args:
        files: the checkpoint as it is stored.
        packing: what its config says.

    Raises:
        CheckpointError, UnsupportedModelError: as `Packing.matrices`; no packed matrix at all.
    """

    def __init__(self, files: Checkpoint, packing: Packing) -> None:
        super().__init__(dict(files.tensors), files.location)
        found = packing.matrices(files)
        if not found:
            raise CheckpointError(
                f"{files.location}: config.json says its weights are packed integers, but none of "
                "its tensors is. Weights and config.json do not belong together."
            )
        for name, (matrix, keys) in found.items():
            if name in files.tensors:
                raise CheckpointError(
                    f"{files.location}: {name} and {keys[0]} both exist. Keep one of them."
                )
            for key in keys:
                del self.tensors[key]
            self.tensors[name] = matrix

    def read(self, name: str, row: int | None = None) -> Tensor:
        """As of `Checkpoint`; a packed matrix is dequantised."""
        tensor = self.tensors[name]
        if not isinstance(tensor, PackedMatrix):
            return super().read(name, row)
        scales = tensor.read_scales(self, name, row)
        return dequantise_int4_group(tensor.read_codes(self, name, row), scales)


def plain_config(config: Any) -> Any:
    """A copy of a transformers config that does not mention the quantisation."""
    config = copy.deepcopy(config)
    for owner in (config, config.get_text_config()):
        if hasattr(owner, "quantization_config"):
            del owner.quantization_config
    return config


def expect(path: str, method: str, what: str, wanted: Any, got: Any, fits: bool) -> None:
    """Raise UnsupportedModelError unless a field of the quantization_config fits."""
    if not fits:
        raise UnsupportedModelError(
            f"{path} is quantised by {method} with {what} {got!r}; moe_offload reads symmetric "
            f"four-bit weights: {what} must be {wanted!r}. Use such a checkpoint of the model, or "
            "one in bfloat16."
        )
