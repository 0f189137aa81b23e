"""GPTQ checkpoints of symmetric four-bit integers, as AutoGPTQ and GPTQModel write them.

A layer `X.weight` [N, K] is stored transposed: `X.qweight` int32 [K / 8, N], a word is eight codes
along K, lowest bits first, `X.scales` [K / group, N], `X.qzeros` int32 [K / group, N / 8]
and `X.g_idx` [K], the group of each k. A word is thus the same as in compressed-tensors, so a page
of int4_group is made of it by transposing words and scales as it is read.

A weight is (code - zero) * scale (AutoGPTQ's qlinear_cuda, GPTQModel's torch kernel). Symmetric
means zero = 8 everywhere, which format "gptq" stores as 7 and "gptq_v2" as 8; and without desc_act
g_idx counts the columns. Both are looked at whenever a matrix is read: the config alone is believed
in nothing that would change numbers silently.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from moe_offload.errors import CheckpointError
from moe_offload.huggingface.packed_int4 import SCALE_DTYPES, PackedMatrix, expect
from moe_offload.quantization import INT4_PER_WORD
from moe_offload.safetensors_file import Checkpoint, TensorRange

METHOD = "gptq"
_STORED_ZEROS = {"gptq": 0x77777777, "gptq_v2": 0x88888888 - (1 << 32)}  # as int32, by format


@dataclass(frozen=True)
class GptqMatrix(PackedMatrix):
    """[N, K], stored as the module says.

    Attributes:
        codes, scales: [K / 8, N] and [K / group, N].
        zeros: [K / group, N / 8].
        order: `g_idx`, when it is there.
        stored_zero: what every word of `zeros` must be.
    """

    zeros: TensorRange
    order: TensorRange | None
    stored_zero: int

    in_rows = False

    @property
    def page_shapes(self) -> tuple[tuple[int, ...], tuple[int, ...]]:
        return self.codes.shape[::-1], self.scales.shape[::-1]

    def read_codes(self, files: Checkpoint, name: str, row: int | None = None) -> Tensor:
        """See `PackedMatrix`. CheckpointError where zeros or order are not what the config says."""
        assert row is None, "a matrix of its own is read whole"
        zeros = files.read_range(self.zeros, name)
        if bool((zeros != self.stored_zero).any()):
            raise CheckpointError(
                f"{files.location}: {name} has zero points other than 8; config.json says it is "
                "symmetric. Use a symmetric checkpoint of the model, or one in bfloat16."
            )
        if self.order is not None:
            order = files.read_range(self.order, name)
            columns, groups = self.shape[1], self.scales.shape[0]
            if not torch.equal(order.long(), torch.arange(columns) // (columns // groups)):
                raise CheckpointError(
                    f"{files.location}: {name} has its columns in another order (g_idx); "
                    "config.json says desc_act is false. Use a checkpoint without activation "
                    "order, or one in bfloat16."
                )
        return files.read_range(self.codes, name).t().contiguous()

    def read_scales(self, files: Checkpoint, name: str, row: int | None = None) -> Tensor:
        assert row is None, "a matrix of its own is read whole"
        return files.read_range(self.scales, name).t().contiguous()


@dataclass(frozen=True)
class Gptq:
    """A `Packing`.

    Attributes:
        group_size: columns that share a scale; None for whole rows.
        stored_zero: a word of zero points.
    """

    group_size: int | None
    stored_zero: int

    @classmethod
    def of_config(cls, values: Mapping[str, Any], path: str) -> Gptq:
        """Check a quantization_config of GPTQ.

        Args:
            values: its content, as in config.json.
            path: for messages.

        Raises:
            UnsupportedModelError: anything but four-bit symmetric integers in order.
        """
        for key, wanted, default in (
            ("bits", 4, None),
            ("sym", True, None),
            ("desc_act", False, False),
            ("pack_dtype", "int32", "int32"),
            ("is_marlin_format", False, False),
        ):
            got = values.get(key, default)
            expect(path, METHOD, key, wanted, got, got == wanted)
        per_module = values.get("dynamic") or {}
        # patterns that begin with "-:" leave modules as they are, which the tensors say too
        others = {key: change for key, change in per_module.items() if not key.startswith("-:")}
        expect(path, METHOD, "dynamic", {}, others, not others)
        form = values.get("checkpoint_format") or values.get("format") or "gptq"
        expect(path, METHOD, "checkpoint_format", "gptq or gptq_v2", form, form in _STORED_ZEROS)
        size = values.get("group_size")
        fits = isinstance(size, int) and (size == -1 or size >= INT4_PER_WORD)
        expect(path, METHOD, "group_size", f"-1 or {INT4_PER_WORD} and more", size, fits)
        return cls(None if size == -1 else size, _STORED_ZEROS[form])

    def matrices(self, files: Checkpoint) -> dict[str, tuple[PackedMatrix, list[str]]]:
        """See `Packing`."""
        found: dict[str, tuple[PackedMatrix, list[str]]] = {}
        for key in files.tensors:
            module = key.removesuffix(".qweight")
            if module != key:
                keys = [f"{module}.{part}" for part in ("qweight", "scales", "qzeros", "g_idx")]
                matrix = self._matrix(files, module)
                found[f"{module}.weight"] = (matrix, [key for key in keys if key in files.tensors])
        return found

    def _matrix(self, files: Checkpoint, module: str) -> GptqMatrix:
        parts = [files.tensors.get(f"{module}.{part}") for part in ("qweight", "scales", "qzeros")]
        codes, scales, zeros = parts
        if codes is None or scales is None or zeros is None:
            missing = f"{module}.{'scales' if scales is None else 'qzeros'}"
            raise CheckpointError(
                f"{files.location}: {module}.qweight is quantised, but {missing} is missing. The "
                "checkpoint is damaged or incomplete; download it again."
            )
        order = files.tensors.get(f"{module}.g_idx")
        words, rows = codes.shape if len(codes.shape) == 2 else (0, 0)
        columns = words * INT4_PER_WORD
        size = self.group_size or columns
        fits = (
            codes.dtype_name == zeros.dtype_name == "I32"
            and scales.dtype_name in SCALE_DTYPES
            and columns > 0
            and columns % size == 0
            and scales.shape == (columns // size, rows)
            and zeros.shape == (columns // size, -(-rows // INT4_PER_WORD))
            and (order is None or order.shape == (columns,))
        )
        if not fits:
            raise CheckpointError(
                f"{files.location}: {module} is stored as {codes.dtype_name} {codes.shape} with "
                f"scales {scales.dtype_name} {scales.shape} and zeros {zeros.dtype_name} "
                f"{zeros.shape}; expected I32 [K / 8, N], [K / {self.group_size or 'K'}, N] and "
                "I32 [.., N / 8]. Weights and config.json do not belong together."
            )
        there = [part for part in (codes, scales, zeros, order) if part is not None]
        return GptqMatrix(
            path=codes.path,
            dtype_name=scales.dtype_name,
            shape=(rows, columns),
            offset=codes.offset,
            nbytes=sum(part.nbytes for part in there),
            codes=codes,
            scales=scales,
            zeros=zeros,
            order=order,
            stored_zero=self.stored_zero,
        )
