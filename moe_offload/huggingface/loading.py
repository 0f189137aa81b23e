"""from_pretrained: a transformers model whose experts never enter memory whole.

The model's own loader does all dense work. It is called through a dynamic subclass of the model
class, of the same name, that differs in two places: `__init__` takes the experts' parameters away
while everything is on the meta device, and `_load_pretrained_model` hands the loader the dense
tensors only, as lazy reads of exact byte ranges. Afterwards the model gets its plain class back,
and a pager over the checkpoint's files serves the experts. Nothing global is patched.
"""

from __future__ import annotations

import os
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, fields, replace
from pathlib import Path
from typing import Any

import torch
import transformers
from torch import Tensor
from transformers import AutoConfig, AutoModelForCausalLM, PreTrainedModel
from transformers.core_model_loading import build_glob_alternation

from moe_offload.config import OffloadConfig, format_bytes
from moe_offload.errors import CheckpointError, StateError, UnsupportedModelError
from moe_offload.expert_layer import ExpertLayer
from moe_offload.huggingface.adapters import experts_module, find_expert_layers
from moe_offload.huggingface.attach import Attachment
from moe_offload.huggingface.checkpoint import CheckpointExperts
from moe_offload.huggingface.packed_int4 import PackedCheckpoint, Packing, plain_config
from moe_offload.huggingface.quantised import (
    QuantisedPages,
    allow_partial_blocks,
    check_scales,
    load_options,
    packing_of,
    quantised_pages,
    save_dequantised,
)
from moe_offload.memory import available_memory_bytes
from moe_offload.safetensors_file import Checkpoint

_OPTIONS = {field.name for field in fields(OffloadConfig)}
_HUB_OPTIONS = ("cache_dir", "force_download", "local_files_only", "token", "revision", "subfolder")


@dataclass(frozen=True)
class Origin:
    """How a checkpoint model was made, so that verify() can load its resident twin."""

    model_class: type[PreTrainedModel]
    path: str
    kwargs: dict[str, Any]
    packing: Packing | None = None

    def load_resident(self) -> PreTrainedModel:
        """The model with all its experts in memory, loaded by transformers."""
        if self.packing is None:
            return self.model_class.from_pretrained(self.path, **self.kwargs).eval()
        loader = _loader_class(self.model_class, _Capture(self.path, self.packing, paged=False))
        model = loader.from_pretrained(self.path, **self.kwargs)
        model.__class__ = self.model_class
        return model.eval()


def from_pretrained(
    path_or_id: str | os.PathLike[str],
    device_budget: int | str = "25%",
    dtype: str | torch.dtype = "auto",
    *,
    model_class: type[PreTrainedModel] | None = None,
    **options: Any,
) -> Any:
    """Load a transformers MoE checkpoint with its experts paged from disk.

    Dense weights are read once into memory; of the experts only what fits the budget, when it is
    needed. The checkpoint's files must stay in place while the model is used.

    Args:
        path_or_id: a folder with config.json and safetensors files, or a hub id.
        device_budget: what experts may occupy in slots: bytes, "6GiB" or "25%" of all experts.
        dtype: "auto" (the checkpoint's), or a torch dtype. Another dtype than the files' makes
            every page go through a conversion on its way in.
        model_class: the transformers class to load; default: the one config.json names.
        **options: further fields of OffloadConfig (policy, device, host_budget, ...); every other
            name is passed to transformers' from_pretrained (revision, token, ...).

    Returns:
        A model of transformers' own class, in eval mode. `moe_offload.get_offloader(model)` has
        the statistics; its `restore()` reads all experts and leaves a plain resident model. With
        output_loading_info=True, (model, what transformers found), as there.

    Raises:
        CheckpointError: files missing, damaged or inconsistent with config.json.
        UnsupportedModelError: no experts that can be paged.
        BudgetError: malformed, or too small for one wave.
        DeviceError: no GPU that can be used, or the model without experts does not fit there.
        PredictorError: a predictor that is none, or of another model.
        ValueError: an option of OffloadConfig has a value it does not take.

    Example:
        >>> model = moe_offload.from_pretrained("allenai/OLMoE-1B-7B-0924", device_budget="6GiB")
        >>> model.generate(**inputs, max_new_tokens=20)
    """
    chosen = {name: options.pop(name) for name in list(options) if name in _OPTIONS}
    config = OffloadConfig.from_options(device_budget=device_budget, **chosen)
    path = os.fspath(path_or_id)
    _check_location(path, options)
    model_config = _model_config(path, options)
    if model_class is None:
        model_class = _model_class(path, model_config)
    told = "quantization_config" in options
    packing = packing_of(model_config, path)
    options |= (
        load_options(model_config, path, options)
        if packing is None
        else _plain_options(model_config, path, options)
    )
    want_info = options.pop("output_loading_info", False)
    capture = _Capture(path, packing)
    loader = _loader_class(model_class, capture)
    model, info = loader.from_pretrained(
        path,
        dtype=dtype,
        output_loading_info=True,
        **{"ignore_mismatched_sizes": True, **options},
    )
    model.__class__ = model_class
    _check_loading_info(path, info, options.get("ignore_mismatched_sizes", False))
    experts = capture.experts
    assert experts is not None, "the loader did not reach _load_pretrained_model"
    _check_unused_biases(experts.checkpoint, info["unexpected_keys"])
    layers, pages = experts.layers, None
    if "quantization_config" in options:
        save_dequantised(model)
    if "quantization_config" in options or packing is not None:
        found: QuantisedPages | str = "quantization_config was given to from_pretrained"
        found = found if told else quantised_pages(experts, config)
        if isinstance(found, str):
            layers = [replace(layer, dequantised=found) for layer in layers]
        else:
            layers, pages = found.layers, found.pages()
    attachment = Attachment(
        model, layers, experts.load_layer, before_restore=_memory_check(experts)
    )
    attachment.origin = Origin(model_class, path, {"dtype": dtype, **options}, packing)
    offloader = attachment.start(pages or experts.pages(), config)
    try:
        attachment.move_rest()
    except BaseException:
        offloader.close()
        raise
    return (model, info) if want_info else model


def _check_location(path: str, options: Mapping[str, Any]) -> None:
    """Name the usual mistakes with local folders before transformers gets to guess."""
    if os.path.isfile(path):
        raise CheckpointError(
            f"{path} is a file; from_pretrained expects the folder that holds config.json and the "
            "safetensors files, or a hub id."
        )
    if not os.path.isdir(path):
        if path.startswith((".", "~", os.sep)) or path.count("/") > 1 or os.sep == "\\":
            raise CheckpointError(f"{path}: no such folder. Check the path.")
        return
    folder = Path(path, options.get("subfolder", ""))
    if "config" not in options and not (folder / "config.json").is_file():
        raise CheckpointError(
            f"{folder} has no config.json, so its architecture is unknown. Pass the folder that "
            "save_pretrained wrote, or download config.json beside the weights."
        )
    if options.get("variant") is None and options.get("gguf_file") is None:
        Checkpoint.open(folder)  # headers only: missing, truncated, damaged or pickled files


def _model_config(path: str, options: Mapping[str, Any]) -> Any:
    """transformers' config of a checkpoint."""
    if options.get("config") is not None:
        return options["config"]
    hub = {name: options[name] for name in _HUB_OPTIONS if name in options}
    try:
        return AutoConfig.from_pretrained(path, **hub)
    except OSError as error:
        hint = (
            ""
            if os.path.isdir(path)
            else (
                " Give a hub id that exists and can be reached (`huggingface-cli download` keeps a "
                "copy for offline use, HF_TOKEN opens gated ones), or the folder of a checkpoint."
            )
        )
        raise CheckpointError(f"{path}: {_first_line(error)}{hint}") from error
    except (ValueError, KeyError, TypeError) as error:
        raise UnsupportedModelError(
            f"{path}: transformers {transformers.__version__} cannot read its config.json: "
            f"{_first_line(error)}"
        ) from error


def _model_class(path: str, config: Any) -> type[PreTrainedModel]:
    for name in getattr(config, "architectures", None) or []:
        found = getattr(transformers, name, None)
        if isinstance(found, type) and issubclass(found, PreTrainedModel):
            return found
    try:
        return AutoModelForCausalLM._model_mapping[type(config)]
    except KeyError:
        raise UnsupportedModelError(
            f"{path}: transformers {transformers.__version__} has no model class for "
            f"{type(config).__name__} (architectures: {getattr(config, 'architectures', None)}). "
            "Pass model_class=..., or update transformers."
        ) from None


def _plain_options(config: Any, path: str, options: dict[str, Any]) -> dict[str, Any]:
    """Options with which transformers loads a packed checkpoint as one that is not quantised.

    It gets a config object; options that are fields of it are moved there, as it would do itself.
    """
    if "quantization_config" in options:
        raise UnsupportedModelError(
            f"{path} holds packed integers, which moe_offload reads itself; leave "
            "quantization_config out."
        )
    config = plain_config(config)
    for name in [name for name in options if name != "config" and hasattr(config, name)]:
        setattr(config, name, options.pop(name))
    return {"config": config}


def _first_line(error: BaseException) -> str:
    return (str(error).strip().splitlines() or [type(error).__name__])[0]


class _Capture:
    """What the loader class learns while transformers loads: the experts' place in the files.

    Args:
        path: for messages.
        packing: of a checkpoint of packed integers.
        paged: False loads the experts too.
    """

    def __init__(self, path: str, packing: Packing | None, paged: bool = True) -> None:
        self.path, self.packing, self.paged = path, packing, paged
        self.experts: CheckpointExperts | None = None

    def open(self, files: list[str]) -> Checkpoint:
        """The checkpoint in these files, as transformers shall see it."""
        found = Checkpoint.from_files(files, self.path)
        return found if self.packing is None else PackedCheckpoint(found, self.packing)


def _loader_class(cls: type[PreTrainedModel], capture: _Capture) -> type[PreTrainedModel]:
    """A subclass of the same name that loads everything but the experts, unless told to."""

    def __init__(self: Any, config: Any, *args: Any, **kwargs: Any) -> None:
        cls.__init__(self, config, *args, **kwargs)
        if capture.paged:
            _strip_experts(find_expert_layers(self))  # before device maps and sizes are computed

    def _load_pretrained_model(
        model: Any, state_dict: Any, checkpoint_files: Any, load_config: Any, *args: Any, **kw: Any
    ) -> Any:
        if state_dict is not None or not checkpoint_files:
            raise CheckpointError(f"{capture.path}: expected safetensors files, got a state dict.")
        _refuse_files(checkpoint_files)
        _refuse_device_map(load_config.device_map)
        checkpoint = capture.open(checkpoint_files)
        if not capture.paged:
            lazy = {name: _LazyTensor(checkpoint, name) for name in checkpoint.tensors}
            return cls._load_pretrained_model(
                model, lazy, checkpoint_files, load_config, *args, **kw
            )
        layers = find_expert_layers(model)  # again: a quantiser may have replaced modules
        _strip_experts(layers)
        layers = _planned_dtypes(layers, load_config.dtype_plan or {})
        mapping = load_config.weight_mapping or []
        allow_partial_blocks(mapping)
        if load_config.hf_quantizer is not None:
            check_scales(checkpoint)
        capture.experts = CheckpointExperts(
            checkpoint,
            layers,
            model,
            mapping,
            cast=load_config.hf_quantizer is None,
        )
        dense = {name: _LazyTensor(checkpoint, name) for name in capture.experts.dense}
        return cls._load_pretrained_model(model, dense, checkpoint_files, load_config, *args, **kw)

    body = {
        "__module__": cls.__module__,
        "__qualname__": cls.__qualname__,
        "__init__": __init__,
        "_load_pretrained_model": staticmethod(_load_pretrained_model),
    }
    return type(cls.__name__, (cls,), body)


class _LazyTensor:
    """The part of safetensors' slice object that transformers' loader uses."""

    def __init__(self, checkpoint: Checkpoint, name: str) -> None:
        self._checkpoint, self._name = checkpoint, name

    def __getitem__(self, index: Any) -> Tensor:
        return self._checkpoint.read(self._name)[index]

    def get_shape(self) -> list[int]:
        return list(self._checkpoint.tensors[self._name].shape)

    def get_dtype(self) -> str:
        return self._checkpoint.tensors[self._name].dtype_name


def _strip_experts(layers: list[ExpertLayer]) -> None:
    """Replace the experts' meta parameters by meta tensors the loader does not look for."""
    for layer in layers:
        module: Any = experts_module(layer)
        for name, (shape, dtype) in layer.tensors.items():
            module._parameters.pop(name, None)
            placeholder = torch.empty((layer.num_experts, *shape), dtype=dtype, device="meta")
            object.__setattr__(module, name, placeholder)
        module._is_hf_initialized = True  # nothing here for transformers to initialise


def _planned_dtypes(layers: list[ExpertLayer], plan: dict[str, Any]) -> list[ExpertLayer]:
    """Apply transformers' keep-in-fp32 rules, which go by parameter name."""
    if not plan:
        return layers
    pattern, rule_of_group, _ = build_glob_alternation(list(plan))

    def planned(name: str, dtype: torch.dtype) -> torch.dtype:
        match = pattern.search(name)
        return dtype if match is None else plan[rule_of_group[match.lastgroup]]

    return [
        replace(
            layer,
            tensors={
                section: (shape, planned(f"{layer.name}.{section}", dtype))
                for section, (shape, dtype) in layer.tensors.items()
            },
        )
        for layer in layers
    ]


def _refuse_files(files: list[str]) -> None:
    odd = [file for file in files if not str(file).endswith(".safetensors")]
    if odd:
        raise CheckpointError(
            f"{odd[0]}: expected safetensors files; byte ranges of pickled torch checkpoints "
            "cannot be paged. Load it with transformers and call save_pretrained(new_folder) once."
        )


def _refuse_device_map(device_map: Mapping[str, Any] | None) -> None:
    devices = {str(device) for device in (device_map or {}).values()}
    if devices - {"cpu"}:
        raise UnsupportedModelError(
            f"device_map places modules on {', '.join(sorted(devices))}; leave it out: moe_offload "
            'itself keeps the experts on disk, and device="cuda" puts the rest on a GPU.'
        )


def _check_loading_info(path: str, info: Mapping[str, Any], allow_mismatch: bool) -> None:
    """transformers fills gaps with random numbers and warns; for inference that is an error."""
    missing = sorted(info["missing_keys"])
    if missing:
        raise CheckpointError(
            f"{path}: no tensor for {len(missing)} parameters, the first is {missing[0]}. The "
            "checkpoint is incomplete or belongs to another config.json."
        )
    mismatched = sorted(info["mismatched_keys"])
    if mismatched and not allow_mismatch:
        name, found, expected = mismatched[0]
        raise CheckpointError(
            f"{path}: {name} must have shape {tuple(expected)}, the checkpoint has {tuple(found)}. "
            "Weights and config.json do not belong together."
        )


def _check_unused_biases(checkpoint: Checkpoint, unexpected: Iterable[str]) -> None:
    """AutoGPTQ gives each quantised layer a bias; where the model has none, it has to be zero."""
    if isinstance(checkpoint, PackedCheckpoint):
        for key in unexpected:
            if key.endswith(".bias") and bool(checkpoint.read(key).any()):
                raise CheckpointError(
                    f"{checkpoint.location}: {key} is not zero, and the model has no such bias. "
                    "Weights and config.json do not belong together."
                )


def _memory_check(experts: CheckpointExperts) -> Any:
    def check() -> None:
        needed, available = experts.total_bytes(), available_memory_bytes()
        if needed > available:
            raise StateError(
                f"restore() would read all experts, {format_bytes(needed)}, into memory; only "
                f"{format_bytes(available)} are available. The model stays offloaded; free memory "
                "or keep using it as it is."
            )

    return check
