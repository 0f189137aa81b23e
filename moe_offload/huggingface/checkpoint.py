"""From checkpoint keys to experts: which bytes of which file make expert e of layer l.

transformers describes how a checkpoint becomes a model by renamings and converters. This asks
transformers' own rules for the target of every key, so any family it can load can be paged.
Two ways out: when a section is a plain sequence of byte ranges (per-expert tensors, or one fused
tensor), the pager reads them verbatim into slots (`FilePages`); otherwise transformers' converter
operations run on lists that hold a single expert, which yields exactly that expert's slice
(`CallbackPages`): casts, transposes, de-interleaving and dequantisation come for free.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn
from transformers.core_model_loading import (
    Concatenate,
    MergeModulelist,
    WeightConverter,
    WeightRenaming,
    dot_natural_key,
    rename_source_key,
)
from transformers.integrations.finegrained_fp8 import Fp8Dequantize

from moe_offload.errors import CheckpointError, UnsupportedModelError
from moe_offload.expert_layer import ExpertLayer
from moe_offload.huggingface.packed_int4 import PackedMatrix
from moe_offload.safetensors_file import Checkpoint, TensorRange
from moe_offload.sources import CallbackPages, FilePages, Piece


@dataclass
class Recipe:
    """How one or more parameters of one experts module are made from checkpoint tensors."""

    first_target: str  # full name of the parameter the converter is filed under
    converter: WeightConverter | None
    sources: dict[str, list[str]] = field(default_factory=dict)  # source pattern: keys in order

    @property
    def operations(self) -> list[Any]:
        """The converter's operations, without a dequantisation that has no scales to apply."""
        found = self.converter.operations if self.converter is not None else []
        scaled = any("weight_scale_inv" in pattern for pattern in self.sources)
        return [op for op in found if scaled or not isinstance(op, Fp8Dequantize)]

    def merges_experts(self) -> bool:
        """Are the sources one tensor per expert (else: stacked, experts first)?"""
        return self.converter is not None and any(
            isinstance(op, MergeModulelist) for op in self.converter.operations
        )


class CheckpointExperts:
    """The experts of a model in a safetensors checkpoint.

    Args:
        checkpoint: its tensors.
        layers: the model's experts modules, with the dtypes they shall have in memory.
        model: the model on meta, experts as placeholders; gives names and the key prefix.
        weight_mapping: transformers' renamings and converters for this load.
        cast: read floating tensors in the target dtype before converting (transformers does,
            except for quantised checkpoints).

    Attributes:
        dense: the checkpoint's tensors that are not experts: what the model's loader reads.
    """

    def __init__(
        self,
        checkpoint: Checkpoint,
        layers: list[ExpertLayer],
        model: Any,
        weight_mapping: list[Any],
        cast: bool = True,
    ) -> None:
        self.checkpoint = checkpoint
        self.layers = layers
        self._config = model.config
        self._cast = cast
        self._targets = {
            f"{layer.name}.{section}": (index, section)
            for index, layer in enumerate(layers)
            for section in layer.tensors
        }
        self._view = _OneExpertView(layers)
        recipes = self._classify_keys(model, weight_mapping)
        self._recipes: list[dict[str, Recipe]] = [{} for _ in layers]
        for recipe in recipes:
            self._check_sources(recipe)
        self._check_complete()
        self._check_conversions()

    def _classify_keys(self, model: Any, weight_mapping: list[Any]) -> list[Recipe]:
        """Split the checkpoint's keys into experts and dense, by transformers' own renaming."""
        renamings = [entry for entry in weight_mapping if isinstance(entry, WeightRenaming)]
        converters = [entry for entry in weight_mapping if isinstance(entry, WeightConverter)]
        by_pattern = {p: converter for converter in converters for p in converter.source_patterns}
        names: dict[str, Any] = dict.fromkeys([*model.state_dict(), *self._targets], True)
        prefix = model.base_model_prefix
        self.dense: dict[str, TensorRange] = {}
        recipes: dict[str, Recipe] = {}
        for key in sorted(self.checkpoint.tensors, key=dot_natural_key):
            target, pattern = rename_source_key(key, renamings, converters, prefix, names)
            if target not in names and key in names:  # as transformers: it needed no renaming
                target, pattern = rename_source_key(key, [], [], prefix, names)
            if target not in self._targets:
                self.dense[key] = self.checkpoint.tensors[key]
                continue
            converter = by_pattern[pattern] if pattern is not None else None
            recipe = recipes.setdefault(target, Recipe(target, converter))
            recipe.sources.setdefault(pattern or key, []).append(key)
        return list(recipes.values())

    def _check_sources(self, recipe: Recipe) -> None:
        index, _ = self._targets[recipe.first_target]
        num_experts = self.layers[index].num_experts
        if recipe.merges_experts():
            for pattern, keys in recipe.sources.items():
                self._check_per_expert(recipe.first_target, pattern, keys, num_experts)
        elif recipe.converter is None and len(recipe.sources) > 1:
            raise CheckpointError(
                f"{self.checkpoint.location}: {', '.join(recipe.sources)} all claim to be "
                f"{recipe.first_target}. Keep one of them."
            )
        elif any(len(keys) > 1 for keys in recipe.sources.values()):
            how = ", ".join(type(op).__name__ for op in recipe.operations) or "nothing"
            raise UnsupportedModelError(
                f"{self.checkpoint.location}: {recipe.first_target} is made of the tensors "
                f"{next(iter(recipe.sources))} by {how}; expected one tensor per expert, or one "
                "with the experts along its first dimension. Load the whole model with "
                "transformers and use moe_offload.offload(model)."
            )
        else:
            for (key,) in recipe.sources.values():
                shape = self.checkpoint.tensors[key].shape
                if not shape or shape[0] != num_experts:
                    raise CheckpointError(
                        f"{self.checkpoint.location}: {key} must hold {num_experts} experts along "
                        f"its first dimension, its shape is {shape}. Weights and config.json do "
                        "not belong together."
                    )
        for target in self._recipe_targets(recipe):
            if target in self._targets:
                layer, section = self._targets[target]
                self._recipes[layer][section] = recipe

    def _check_per_expert(
        self, target: str, pattern: str, keys: list[str], num_experts: int
    ) -> None:
        """Each expert once, in order, all of one shape: list position is the expert's id."""
        present = _expert_numbers(keys)
        if present != list(range(num_experts)):
            missing = sorted(set(range(num_experts)) - set(present))
            wrong = f"experts {missing} are missing" if missing else f"found {present}"
            raise CheckpointError(
                f"{self.checkpoint.location}: {target} needs {num_experts} tensors {pattern}, one "
                f"per expert; {wrong}. The checkpoint is incomplete or belongs to another "
                "config.json."
            )
        shapes = [self.checkpoint.tensors[key].shape for key in keys]
        usual = max(set(shapes), key=shapes.count)
        for key, shape in zip(keys, shapes, strict=True):
            if shape != usual:
                raise CheckpointError(
                    f"{self.checkpoint.location}: {key} has shape {shape}, the same tensor of "
                    f"other experts {usual}. The checkpoint is damaged; download it again."
                )

    def _recipe_targets(self, recipe: Recipe) -> list[str]:
        if recipe.converter is None:
            return [recipe.first_target]
        first, *rest = (pattern.rstrip("$") for pattern in recipe.converter.target_patterns)
        return [recipe.first_target, *(recipe.first_target.replace(first, p) for p in rest)]

    def _check_complete(self) -> None:
        missing = [
            f"{layer.name}.{section}"
            for index, layer in enumerate(self.layers)
            for section in layer.tensors
            if section not in self._recipes[index]
        ]
        if missing:
            raise CheckpointError(
                f"{self.checkpoint.location}: no tensor for {len(missing)} expert parameters, the "
                f"first is {missing[0]}. The checkpoint is incomplete or belongs to another "
                "config.json."
            )

    def _check_conversions(self) -> None:
        """Run every conversion once on meta tensors: shapes come out right or it is refused."""
        for index, layer in enumerate(self.layers):
            if self._direct_pieces(index, 0) is not None:
                continue  # byte counts agree, nothing to convert
            made = self._make(index, 0, on_meta=True)
            for section, (shape, _) in layer.tensors.items():
                if tuple(made[section].shape) != shape:
                    recipe = self._recipes[index][section]
                    keys = [self.checkpoint.tensors[k[0]] for k in recipe.sources.values()]
                    raise CheckpointError(
                        f"{self.checkpoint.location}: one expert of {layer.name}.{section} must "
                        f"have shape {shape}, but the checkpoint's {next(iter(recipe.sources))} "
                        f"{[key.shape for key in keys]} gives {tuple(made[section].shape)}. "
                        "Weights and config.json do not belong together."
                    )

    def recipe(self, layer: int, section: str) -> Recipe:
        """How one parameter is made from the checkpoint's tensors."""
        return self._recipes[layer][section]

    def pages(self) -> FilePages | CallbackPages:
        """The source for the pager: byte ranges when every section allows, else the converter."""
        files = FilePages()
        for index, layer in enumerate(self.layers):
            for expert in range(layer.num_experts):
                pieces = self._direct_pieces(index, expert)
                if pieces is None:
                    return CallbackPages(self.make, self.disk_bytes)
                files.add(index, expert, pieces)
        return files

    def make(self, layer: int, expert: int) -> dict[str, Tensor]:
        """Read and convert one expert: `{section: Tensor[*section shape]}`. Thread-safe."""
        return self._make(layer, expert, on_meta=False)

    def disk_bytes(self, layer: int, expert: int) -> int:
        """Checkpoint bytes that `make` reads for one expert."""
        total = 0
        for recipe in {id(recipe): recipe for recipe in self._recipes[layer].values()}.values():
            for keys in recipe.sources.values():
                if recipe.merges_experts():
                    total += self.checkpoint.tensors[keys[expert]].nbytes
                else:
                    stacked = sum(self.checkpoint.tensors[key].nbytes for key in keys)
                    total += stacked // self.layers[layer].num_experts
        return total

    def load_layer(self, layer: int) -> dict[str, Tensor]:
        """All experts of a layer in memory: `{section: Tensor[E, *section shape]}`."""
        spec = self.layers[layer]
        tensors = {
            section: torch.empty((spec.num_experts, *shape), dtype=dtype)
            for section, (shape, dtype) in spec.tensors.items()
        }
        for expert in range(spec.num_experts):
            for section, tensor in self.make(layer, expert).items():
                tensors[section][expert].copy_(tensor)
        return tensors

    def total_bytes(self) -> int:
        """Bytes of all experts in memory."""
        return sum(layer.resident_bytes for layer in self.layers)

    def _direct_pieces(self, layer: int, expert: int) -> list[Piece] | None:
        """The byte ranges of one page; None when some section needs converting."""
        pieces: list[Piece] = []
        for section in self.layers[layer].tensors:
            ranges = self.section_ranges(layer, expert, section)
            if ranges is None:
                return None
            position = 0
            for r in ranges:
                pieces.append(Piece(section, position, r.path, r.offset, r.nbytes))
                position += r.nbytes
        return pieces

    def section_ranges(self, layer: int, expert: int, section: str) -> list[TensorRange] | None:
        """The byte ranges of one section of a page; None when it needs converting."""
        shape, dtype = self.layers[layer].tensors[section]
        ranges = self._direct_ranges(self._recipes[layer][section], layer, expert, shape)
        if ranges is None or any(r.dtype_name != _format_name(dtype) for r in ranges):
            return None
        fits = sum(r.nbytes for r in ranges) == math.prod(shape) * dtype.itemsize
        return ranges if fits else None

    def _direct_ranges(
        self, recipe: Recipe, layer: int, expert: int, shape: tuple[int, ...]
    ) -> list[TensorRange] | None:
        """One expert of one section as byte ranges, if it is a plain sequence of rows."""
        tensors = self.checkpoint.tensors
        if recipe.converter is None:
            (key,) = recipe.sources
            whole = tensors[key]
            if whole.shape != (self.layers[layer].num_experts, *shape):
                return None
            if isinstance(whole, PackedMatrix):  # there are no bytes of its dtype
                return None
            nbytes = whole.nbytes // whole.shape[0]
            offset = whole.offset + expert * nbytes
            return [TensorRange(whole.path, whole.dtype_name, shape, offset, nbytes)]
        operations = recipe.operations
        if len(recipe.converter.target_patterns) != 1 or not stacks_rows(operations):
            return None
        patterns = [p for p in recipe.converter.source_patterns if p in recipe.sources]
        ranges = [tensors[recipe.sources[pattern][expert]] for pattern in patterns]
        if len(operations) == 1 and len(ranges) != 1:
            return None
        if any(len(r.shape) != len(shape) or r.shape[1:] != shape[1:] for r in ranges):
            return None
        return None if any(isinstance(r, PackedMatrix) for r in ranges) else ranges

    def _make(self, layer: int, expert: int, on_meta: bool) -> dict[str, Tensor]:
        made: dict[str, Tensor] = {}
        for section, (_, dtype) in self.layers[layer].tensors.items():
            if section in made:
                continue  # a converter with several targets made it already
            recipe = self._recipes[layer][section]
            for target, tensor in self._convert(recipe, expert, dtype, on_meta).items():
                if target in self._targets:
                    name = self._targets[target][1]
                    made[name] = tensor[0].to(self.layers[layer].tensors[name][1])
        return made

    def _convert(
        self, recipe: Recipe, expert: int, dtype: torch.dtype, on_meta: bool
    ) -> dict[str, Tensor]:
        """Run the converter on lists that hold this expert only; results are [1, ...]."""
        merges = recipe.merges_experts()
        collected: dict[str, list[Tensor]] = {}
        for pattern, keys in recipe.sources.items():
            chosen = [keys[expert]] if merges else keys
            row = None if merges else expert
            collected[pattern] = [self._read(key, row, dtype, on_meta) for key in chosen]
        if recipe.converter is None:
            (tensors,) = collected.values()
            return {recipe.first_target: tensors[0]}
        values: dict[str, Any] = collected
        try:
            for operation in recipe.operations:
                values = operation.convert(
                    values,
                    source_patterns=recipe.converter.source_patterns,
                    target_patterns=recipe.converter.target_patterns,
                    full_layer_name=recipe.first_target,
                    model=self._view,
                    config=self._config,
                    missing_keys=None,
                )
        except (ValueError, RuntimeError, IndexError, KeyError, NotImplementedError) as error:
            raise UnsupportedModelError(
                f"{self.checkpoint.location}: transformers' conversion of "
                f"{next(iter(recipe.sources))} into {recipe.first_target} does not work one expert "
                f"at a time ({type(error).__name__}: {error}). Load the whole model with "
                "transformers and use moe_offload.offload(model)."
            ) from error
        return self._named(recipe, values)

    def _named(self, recipe: Recipe, values: Mapping[str, Any]) -> dict[str, Tensor]:
        """Give the converter's results their full names, as transformers does."""
        targets = self._recipe_targets(recipe)
        named: dict[str, Tensor] = {}
        for pattern, value in values.items():
            tensor = value[0] if isinstance(value, list) else value
            full = next((name for name in targets if pattern.rstrip("$") in name), None)
            if full is not None:
                named[full] = tensor
        return named

    def _read(self, key: str, row: int | None, dtype: torch.dtype, on_meta: bool) -> Tensor:
        source = self.checkpoint.tensors[key]
        if on_meta:
            shape = source.shape if row is None else (1, *source.shape[1:])
            tensor = torch.empty(shape, dtype=source.dtype, device="meta")
        else:
            tensor = self.checkpoint.read(key, row)
        return tensor.to(dtype) if self._cast and tensor.is_floating_point() else tensor


class _OneExpertView:
    """What converter operations may ask the model: a parameter's shape and dtype.

    Answers with one expert, because that is what the operations are given.
    """

    def __init__(self, layers: list[ExpertLayer]) -> None:
        self._modules: dict[str, _Sections] = {
            layer.name: _Sections(layer.tensors) for layer in layers
        }

    def get_parameter(self, name: str) -> Tensor:
        module, _, section = name.rpartition(".")
        return getattr(self._modules[module], section)

    def get_submodule(self, name: str) -> _Sections:
        return self._modules[name]


class _Sections(nn.Module):
    def __init__(self, tensors: Mapping[str, tuple[tuple[int, ...], torch.dtype]]) -> None:
        super().__init__()
        for name, (shape, dtype) in tensors.items():
            placeholder = torch.empty((1, *shape), dtype=dtype, device="meta")
            object.__setattr__(self, name, placeholder)


def stacks_rows(operations: list[Any]) -> bool:
    """Is this exactly "stack the experts, then put the sources below each other"?"""
    kinds = [(type(op), getattr(op, "dim", None)) for op in operations]
    return kinds == [(MergeModulelist, 0)] or kinds == [(MergeModulelist, 0), (Concatenate, 1)]


def _expert_numbers(keys: list[str]) -> list[int]:
    """The expert number of each key: the one numeric component in which the keys differ.

    >>> _expert_numbers(["layers.1.experts.0.w1", "layers.1.experts.2.w1"])
    [0, 2]
    """
    if len(keys) == 1:
        return [0]
    columns = list(zip(*(key.split(".") for key in keys), strict=False))
    varying = [column for column in columns if len(set(column)) > 1]
    if len(varying) != 1 or not all(part.isdigit() for part in varying[0]):
        return []
    return [int(part) for part in varying[0]]


def _format_name(dtype: torch.dtype) -> str:
    return {torch.float32: "F32", torch.float16: "F16", torch.bfloat16: "BF16"}[dtype]
