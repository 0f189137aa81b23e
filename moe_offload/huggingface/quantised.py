"""Quantised checkpoints: their experts paged as the files hold them, and when that cannot be.

transformers dequantises an mxfp4 or fp8 checkpoint while it loads one (to bfloat16, exactly for
mxfp4, with one rounding for fp8), and sees one of four-bit integers dequantised (`packed_int4.py`,
one rounding). That model is the resident twin. Its experts can be paged without
that step where a backend reads the codes: a page is then the checkpoint's codes and scales, section
"down_proj" and section "down_proj_scales", a quarter or a half of the bytes from disk and in slots,
and the kernels give the twin's bits. Elsewhere pages are dequantised one by one on their way in,
and `stats()` says why. Everything that is not an expert is dequantised when it is loaded.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from typing import Any, cast

import torch
from torch import Tensor
from transformers.conversion_mapping import get_model_conversion_mapping
from transformers.integrations.finegrained_fp8 import Fp8Dequantize
from transformers.integrations.mxfp4 import Mxfp4Dequantize
from transformers.quantizers.auto import AutoQuantizationConfig

from moe_offload.backends import choose
from moe_offload.config import OffloadConfig
from moe_offload.errors import CheckpointError, UnsupportedModelError
from moe_offload.huggingface.adapters import experts_module
from moe_offload.huggingface.checkpoint import CheckpointExperts, Recipe, stacks_rows
from moe_offload.huggingface.compressed_tensors import CompressedTensors
from moe_offload.huggingface.gptq import Gptq
from moe_offload.huggingface.packed_int4 import PackedMatrix, Packing
from moe_offload.pages import PageLayout
from moe_offload.quantization import FP8_BLOCK, MXFP4_GROUP, SCALES, dequantise_fp8_block
from moe_offload.safetensors_file import Checkpoint, TensorRange
from moe_offload.sources import CallbackPages, FilePages, Piece

METHODS = ("mxfp4", "fp8")  # which transformers dequantises
PACKINGS: dict[str, type[CompressedTensors] | type[Gptq]] = {
    "compressed-tensors": CompressedTensors,
    "gptq": Gptq,
}


def _quantization(config: Any) -> tuple[str, dict[str, Any]] | None:
    """Method and content of the quantization_config, of the model or of its text part."""
    given = getattr(config, "quantization_config", None)
    given = given or getattr(config.get_text_config(), "quantization_config", None)
    if given is None:
        return None
    values = given if isinstance(given, dict) else given.to_dict()
    method = values.get("quant_method")
    return str(getattr(method, "value", method)).lower().replace("_", "-"), values


def packing_of(config: Any, path: str) -> Packing | None:
    """How a checkpoint of packed integers is packed, by its transformers config; None: it is none.

    Raises:
        UnsupportedModelError: a scheme of these methods that is not read.
    """
    method, values = _quantization(config) or ("", {})
    return PACKINGS[method].of_config(values, path) if method in PACKINGS else None


def dequantising_config(config: Any, path: str) -> Any:
    """The checkpoint's quantization_config, told to dequantise; None when it is not quantised.

    For checkpoints without a `packing_of`.

    Args:
        config: the model's transformers config.
        path: for messages.

    Raises:
        UnsupportedModelError: a method other than METHODS.
    """
    found = _quantization(config)
    if found is None:
        return None
    method, values = found
    if method not in METHODS:
        raise UnsupportedModelError(
            f"{path} is quantised by {method}; moe_offload reads {', '.join(METHODS)} (gpt-oss; "
            "DeepSeek-V3, Qwen3-FP8 and others with 128 x 128 blocks), and four bits of "
            f"{' and '.join(PACKINGS)}. Use such a checkpoint of the model, or one in bfloat16."
        )
    told = AutoQuantizationConfig.from_dict(dict(values))
    told.dequantize = True
    return told


class _AllBlocks(Fp8Dequantize):
    """transformers' operation, but blocks at the lower and right edge may be cut off.

    transformers divides rows and columns evenly by the grid, which fails or misplaces scales where
    a size is no multiple of 128 (DeepSeek-V3's kv_a_proj_with_mqa has 576 rows).
    """

    def _dequantize_one(
        self, quantized: Tensor, scales: Tensor, output_dtype: torch.dtype | None = None
    ) -> Tensor:
        config = self.hf_quantizer.quantization_config
        rows, columns = quantized.shape[-2:]
        grid = (-(-rows // FP8_BLOCK), -(-columns // FP8_BLOCK))
        if (
            quantized.is_floating_point()  # e4m3, or its numbers in a wider dtype already
            and scales.dtype in (torch.float32, torch.bfloat16)
            and tuple(config.weight_block_size or ()) == (FP8_BLOCK, FP8_BLOCK)
            and scales.shape[-2:] == grid
        ):
            codes = quantized.to(torch.float8_e4m3fn)
            return dequantise_fp8_block(codes, scales.float(), output_dtype or torch.bfloat16)
        dequantised: Tensor = super()._dequantize_one(quantized, scales, output_dtype)
        return dequantised


def allow_partial_blocks(weight_mapping: list[Any]) -> None:
    """Make the converters of this load dequantise fp8 weights of any size, see `_AllBlocks`."""
    for entry in weight_mapping:
        operations = getattr(entry, "operations", None)
        if operations is not None:
            entry.operations = [
                _AllBlocks(op.hf_quantizer) if type(op) is Fp8Dequantize else op
                for op in operations
            ]


def save_dequantised(model: Any) -> None:
    """Let a restored model's save_pretrained write what the model is: plain weights.

    transformers would undo the dequantisation while saving, which it cannot: it leaves mxfp4
    experts out and fails for fp8.
    """
    model._weight_conversions = get_model_conversion_mapping(model, add_legacy=False)


def check_scales(checkpoint: Checkpoint) -> None:
    """Raise CheckpointError where codes and scales do not belong together, by the headers.

    transformers would take fp8 codes without scales as weights.
    """
    tensors = checkpoint.tensors
    for key, found in tensors.items():
        if key.endswith(("_blocks", "_scales")):
            name, _, kind = key.rpartition("_")
            blocks, scales = tensors.get(f"{name}_blocks"), tensors.get(f"{name}_scales")
            missing = f"{name}_{'scales' if kind == 'blocks' else 'blocks'}"
            fits = blocks is not None and scales is not None and blocks.shape[:-1] == scales.shape
            wrong = f"scales {scales.shape} for blocks {blocks.shape}" if blocks and scales else ""
        elif found.dtype_name == "F8_E4M3":
            missing, wrong = f"{key}_scale_inv", ""
            renamed = key.removesuffix(".weight") + ".scale"  # DeepSeek-V4's name for it
            fits = missing in tensors or renamed in tensors
        else:
            continue
        if not fits:
            raise CheckpointError(
                f"{checkpoint.location}: {key} is quantised, but {wrong or missing + ' is missing'}"
                ". The checkpoint is damaged or incomplete; download it again."
            )


@dataclass(frozen=True)
class _Stored:
    """One section of a quantised page, and where an expert's bytes of it lie."""

    shape: tuple[int, ...]
    dtype: torch.dtype
    ranges: Callable[[int], list[TensorRange]]
    load: Callable[[int], Tensor] | None = None  # where the file holds it otherwise


class _AsDequantised(Exception):
    """Why an expert's weights cannot be paged as they are stored."""


class QuantisedPages:
    """The experts of a checkpoint as it holds them.

    Args:
        experts: the checkpoint's experts; its `layers` have the dtypes of the resident twin.

    Raises:
        _AsDequantised: some section is stored in a form that no page has.
    """

    def __init__(self, experts: CheckpointExperts) -> None:
        self._sections = [_stored_layer(experts, index) for index in range(len(experts.layers))]
        self._experts = experts
        self.layers = [
            replace(layer, stored={name: (s.shape, s.dtype) for name, s in sections.items()})
            for layer, sections in zip(experts.layers, self._sections, strict=True)
        ]

    @property
    def verbatim(self) -> bool:
        """Do the files hold every section as pages do?"""
        return all(s.load is None for sections in self._sections for s in sections.values())

    def pages(self) -> FilePages | CallbackPages:
        """Byte ranges of every page; else a function that makes one."""
        if not self.verbatim:
            return CallbackPages(self._make, self._experts.disk_bytes)
        files = FilePages()
        for index, layer in enumerate(self.layers):
            for expert in range(layer.num_experts):
                pieces = []
                for name, section in self._sections[index].items():
                    position = 0
                    for r in section.ranges(expert):
                        pieces.append(Piece(name, position, r.path, r.offset, r.nbytes))
                        position += r.nbytes
                files.add(index, expert, pieces)
        return files

    def _make(self, layer: int, expert: int) -> dict[str, Tensor]:
        """One page."""
        files, made = self._experts.checkpoint, {}
        for name, section in self._sections[layer].items():
            if section.load is not None:
                made[name] = section.load(expert)
                continue
            parts = [files.read_range(r, name).flatten() for r in section.ranges(expert)]
            made[name] = torch.cat(parts).reshape(section.shape)
        return made


def quantised_pages(experts: CheckpointExperts, config: OffloadConfig) -> QuantisedPages | str:
    """Pages of a quantised checkpoint as it is, or why they have to be dequantised."""
    try:
        found = QuantisedPages(experts)
        for layer in found.layers:
            assert layer.stored is not None
            layout, device = PageLayout.build(layer.stored), config.device.partition(":")[0]
            choose(config.expert_backend, experts_module(layer), layout, layer.name, device)
    except (_AsDequantised, UnsupportedModelError) as reason:
        return str(reason)
    return found


def _stored_layer(experts: CheckpointExperts, index: int) -> dict[str, _Stored]:
    layer = experts.layers[index]
    sections: dict[str, _Stored] = {}
    for name, (shape, dtype) in layer.tensors.items():
        recipe = experts.recipe(index, name)
        operations = recipe.operations
        where = f"{layer.name}.{name}"
        if operations and isinstance(operations[0], Mxfp4Dequantize):
            made = _mxfp4(experts, recipe, index, where)
        elif operations and isinstance(operations[0], Fp8Dequantize):
            made = _fp8(experts, recipe, where)
        elif any(isinstance(found, PackedMatrix) for found in _sources(experts, recipe)):
            made = _int4(experts, recipe, index, where)
        else:  # biases, and layers that modules_to_not_convert names
            made = {"": _plain(experts, recipe, index, name, shape, dtype)}
        if len(made) > 1 and dtype != torch.bfloat16:
            raise _AsDequantised(f"{where} shall be {dtype}; quantised pages mean bfloat16")
        sections |= {name + suffix: section for suffix, section in made.items()}
    return sections


def _sources(experts: CheckpointExperts, recipe: Recipe) -> list[TensorRange]:
    return [experts.checkpoint.tensors[key] for keys in recipe.sources.values() for key in keys]


def _plain(
    experts: CheckpointExperts,
    recipe: Recipe,
    index: int,
    name: str,
    shape: tuple[int, ...],
    dtype: torch.dtype,
) -> _Stored:
    if experts.section_ranges(index, 0, name) is None:
        raise _AsDequantised(f"{recipe.first_target} is not stored as the model has it")

    def ranges(expert: int) -> list[TensorRange]:
        found = experts.section_ranges(index, expert, name)
        assert found is not None, "every expert is stored as expert 0"
        return found

    return _Stored(shape, dtype, ranges)


def _slice_of(whole: TensorRange) -> Callable[[int], list[TensorRange]]:
    """Each expert's place in a tensor of all of them."""
    nbytes = whole.nbytes // whole.shape[0]
    return lambda expert: [
        replace(whole, shape=whole.shape[1:], offset=whole.offset + expert * nbytes, nbytes=nbytes)
    ]


def _mxfp4(
    experts: CheckpointExperts, recipe: Recipe, index: int, where: str
) -> dict[str, _Stored]:
    """Blocks [E, N, K / 32, 16] and scales [E, N, K / 32], whatever the parameter's orientation."""
    tensors = experts.checkpoint.tensors
    found = {pattern.rsplit("_", 1)[1]: tensors[k] for pattern, (k,) in recipe.sources.items()}
    blocks, scales = found["blocks"], found["scales"]
    first, second = experts.layers[index].tensors[where.rpartition(".")[2]][0]
    rows, columns = second, first  # the parameter is [K, N]
    wanted = (experts.layers[index].num_experts, rows, columns // MXFP4_GROUP)
    if (
        columns % MXFP4_GROUP
        or (blocks.dtype_name, blocks.shape) != ("U8", (*wanted, 16))
        or scales.dtype_name not in ("U8", "F8_E8M0")
        or scales.shape != wanted
    ):
        raise _AsDequantised(
            f"{where} is stored as {blocks.dtype_name} {blocks.shape} with scales "
            f"{scales.dtype_name} {scales.shape}, not as blocks of 32 e2m1 codes"
        )

    return {
        "": _Stored(blocks.shape[1:], torch.uint8, _slice_of(blocks)),
        SCALES: _Stored(scales.shape[1:], torch.uint8, _slice_of(scales)),
    }


def _fp8(experts: CheckpointExperts, recipe: Recipe, where: str) -> dict[str, _Stored]:
    """Per-expert codes [N, K] below each other, and likewise their grids of scales."""
    assert recipe.converter is not None
    dequantise, *rest = recipe.operations
    block = tuple(dequantise.hf_quantizer.quantization_config.weight_block_size or ())
    if block != (FP8_BLOCK, FP8_BLOCK):
        raise _AsDequantised(f"its fp8 blocks are {block}, the kernels' {FP8_BLOCK} x {FP8_BLOCK}")
    if not stacks_rows(rest) or len(recipe.converter.target_patterns) != 1:
        raise _AsDequantised(f"{where} is not made of its experts' rows alone")
    tensors = experts.checkpoint.tensors
    patterns = [p for p in recipe.converter.source_patterns if p in recipe.sources]
    codes = [p for p in patterns if p.rstrip("$").endswith(".weight")]
    pairs = [(p, p.rstrip("$") + "_scale_inv$") for p in codes]
    firsts = [(tensors[recipe.sources[c][0]], tensors[recipe.sources[s][0]]) for c, s in pairs]
    for code, scale in firsts:
        grid = tuple(-(-size // FP8_BLOCK) for size in code.shape)
        if (
            code.dtype_name != "F8_E4M3"
            or len(code.shape) != 2
            or scale.dtype_name not in ("F32", "BF16")
            or scale.dtype_name != firsts[0][1].dtype_name
            or scale.shape != grid
        ):
            raise _AsDequantised(
                f"{where} is stored as {code.dtype_name} {code.shape} with scales "
                f"{scale.dtype_name} {scale.shape}; expected F8_E4M3 with F32 or BF16 {grid}"
            )

    def stack(which: int) -> _Stored:
        parts = [pair[which] for pair in firsts]
        shape = (sum(part.shape[0] for part in parts), parts[0].shape[1])
        keys = [recipe.sources[pair[which]] for pair in pairs]
        return _Stored(shape, parts[0].dtype, lambda expert: [tensors[k[expert]] for k in keys])

    return {"": stack(0), SCALES: stack(1)}


def _int4(experts: CheckpointExperts, recipe: Recipe, index: int, where: str) -> dict[str, _Stored]:
    """Codes [N, K / 8] and scales [N, K / group]: of one tensor for all experts, or of one for each
    (gate's and up's below each other), transposed when they are read where the file has them so."""
    tensors = experts.checkpoint.tensors
    layer = experts.layers[index]
    shape, _ = layer.tensors[where.rpartition(".")[2]]
    if recipe.converter is None:
        (key,) = recipe.sources
        whole = tensors[key]
        assert isinstance(whole, PackedMatrix)
        assert whole.in_rows, "GPTQ packs matrices of two dimensions"
        if whole.shape != (layer.num_experts, *shape) or experts_module(layer).is_transposed:
            raise _AsDequantised(f"{where} is stored transposed")
        parts = {"": whole.codes, SCALES: whole.scales}
        return {
            suffix: _Stored(part.shape[1:], part.dtype, _slice_of(part))
            for suffix, part in parts.items()
        }
    if not stacks_rows(recipe.operations) or len(recipe.converter.target_patterns) != 1:
        raise _AsDequantised(f"{where} is not made of its experts' rows alone")
    patterns = [p for p in recipe.converter.source_patterns if p in recipe.sources]
    matrices = [[tensors[key] for key in recipe.sources[p]] for p in patterns]
    kinds = set()
    for found in [matrix for column in matrices for matrix in column]:
        if not isinstance(found, PackedMatrix):
            raise _AsDequantised(f"some experts of {where} are packed and some are not")
        kinds.add((found.shape[1:], found.dtype, found.page_shapes[1][1:], found.in_rows))
    if len(kinds) != 1:
        raise _AsDequantised(f"the experts of {where} are packed in several ways")
    first = cast(PackedMatrix, matrices[0][0])

    def stack(which: int, part: str, dtype: torch.dtype) -> _Stored:
        def ranges(expert: int) -> list[TensorRange]:
            return [getattr(column[expert], part) for column in matrices]

        def load(expert: int) -> Tensor:
            keys = [recipe.sources[pattern][expert] for pattern in patterns]
            return torch.cat(
                [getattr(tensors[key], f"read_{part}")(experts.checkpoint, key) for key in keys]
            )

        page = (shape[0], first.page_shapes[which][1])
        return _Stored(page, dtype, ranges, None if first.in_rows else load)

    return {"": stack(0, "codes", torch.int32), SCALES: stack(1, "scales", first.dtype)}


def load_options(config: Any, path: str, options: Mapping[str, Any]) -> dict[str, Any]:
    """What to tell transformers about quantisation; nothing when the caller did, or none is."""
    found = dequantising_config(config, path)
    return (
        {} if found is None or "quantization_config" in options else {"quantization_config": found}
    )
