"""Which modules of a transformers model hold experts, and which models are refused, and why.

transformers >= 5 keeps the routed experts of a layer in one module with fused parameters
`gate_up_proj` (or `up_proj`) and `down_proj`, first dimension = experts, marked by a decorator
that sets four flags. The search is structural, so a new family needs no code here. Every size is
taken from parameter shapes, never from the config: families name those differently, and some
lie (Nemotron-H's latent experts).
"""

from __future__ import annotations

from collections.abc import Iterator

import torch
from torch import Tensor, nn

from moe_offload.errors import StateError, UnsupportedModelError
from moe_offload.expert_layer import ExpertLayer
from moe_offload.huggingface.llama4 import teach, unteach

_FLAGS = ("has_gate", "has_bias", "is_transposed", "is_concatenated")
_DTYPES = (torch.float32, torch.float16, torch.bfloat16)
_RESTORE = "call moe_offload.get_offloader(model).restore() first"
_QUANTISED = (
    "Quantised experts of a live model cannot be paged: load mxfp4, fp8 and int4 checkpoints "
    "with moe_offload.from_pretrained, others dequantised (quantization_config with "
    "dequantize=True)."
)


def is_offloaded(module: nn.Module) -> bool:
    """Is this experts module paged by moe_offload (see attach.py)?"""
    return getattr(type(module), "_moe_offload_original", None) is not None


def experts_module(layer: ExpertLayer) -> nn.Module:
    """The module of a layer found here; layers of other origins may have none."""
    assert layer.module is not None
    return layer.module


def section_names(module: nn.Module) -> list[str]:
    """The expert parameters of an experts module, in page order."""
    first = "gate_up_proj" if module.has_gate else "up_proj"
    biased = bool(module.has_bias)
    return [first, *([f"{first}_bias"] if biased else []), "down_proj"] + (
        ["down_proj_bias"] if biased else []
    )


def find_expert_layers(model: nn.Module) -> list[ExpertLayer]:
    """Find the experts of every layer, in module order. Llama 4 is taught the interface first.

    Args:
        model: a transformers model, its experts on any device (meta included).

    Returns:
        One ExpertLayer per experts module, with per-expert shapes and dtypes.

    Raises:
        UnsupportedModelError: no experts, or in a form that is refused; names the class.
        StateError: the model is offloaded already.
    """
    if not isinstance(model, nn.Module):
        raise UnsupportedModelError(
            f"expected a transformers model (a torch.nn.Module), got {type(model).__name__}. "
            "For a path or hub id use moe_offload.from_pretrained."
        )
    taught = teach(model)
    try:
        return _described(model)
    except BaseException:
        if taught:
            unteach(model)
        raise


def _described(model: nn.Module) -> list[ExpertLayer]:
    modules = list(_experts_modules(model))
    if not modules:
        raise _no_experts(model)
    if _is_parallel(model):
        raise UnsupportedModelError(
            f"{type(model).__name__} is tensor or expert parallel; moe_offload pages the experts "
            "of a whole model on one device. Load it without tp_plan / distributed_config."
        )
    for name, module in modules:
        _refuse_unusual(model, name, module)
    return [
        ExpertLayer(
            name=name,
            module=module,
            num_experts=int(getattr(module, section_names(module)[0]).shape[0]),
            tensors={
                section: (tuple(tensor.shape[1:]), tensor.dtype)
                for section in section_names(module)
                if (tensor := getattr(module, section)) is not None
            },
        )
        for name, module in modules
    ]


def _experts_modules(model: nn.Module) -> Iterator[tuple[str, nn.Module]]:
    for name, module in model.named_modules():
        if is_offloaded(module):
            raise StateError(
                f"{name} is offloaded already; {_RESTORE}, or change the budget of the present "
                'offloader with .resize("40%").'
            )
        if _looks_like_experts(module):
            yield name, module


def _looks_like_experts(module: nn.Module) -> bool:
    if not all(isinstance(getattr(module, flag, None), bool) for flag in _FLAGS):
        return False
    return all(isinstance(getattr(module, name, None), Tensor) for name in section_names(module))


def _no_experts(model: nn.Module) -> UnsupportedModelError:
    named = type(model).__name__
    suspects = {
        type(module).__name__: module
        for name, module in model.named_modules()
        if "experts" in type(module).__name__.lower() or name.rsplit(".", 1)[-1] == "experts"
    }
    if not suspects:
        return UnsupportedModelError(
            f"{named} has no routed experts; moe_offload pages the experts of Mixture-of-Experts "
            "models (Mixtral, Qwen-MoE, OLMoE, DeepSeek, gpt-oss, ...). Nothing to offload."
        )
    classes = ", ".join(sorted(suspects))
    if any(p.dtype not in _DTYPES for module in suspects.values() for p in module.parameters()):
        return UnsupportedModelError(
            f"{named} keeps its experts quantised, in {classes}. {_QUANTISED}"
        )
    return UnsupportedModelError(
        f"{named} keeps its experts in {classes}, which does not use transformers' common experts "
        "interface (fused gate_up_proj / down_proj parameters and @use_experts_implementation). "
        "This family is not supported yet."
    )


def _is_parallel(model: nn.Module) -> bool:
    if getattr(model, "_device_mesh", None) is not None or getattr(model, "_tp_size", None):
        return True
    return any(
        getattr(module, "_is_expert_parallel", False) or hasattr(module, "_hf_device_mesh")
        for module in model.modules()
    )


def _refuse_unusual(model: nn.Module, name: str, module: nn.Module) -> None:
    """Raise for what class swap and verbatim paging would get wrong."""
    cls = type(module).__name__
    where = f"{name} ({cls})"
    expected = set(section_names(module))
    extra = sorted(set(module._parameters) - expected)
    if extra:
        raise UnsupportedModelError(
            f"{where} has the parameters {', '.join(extra)} besides {', '.join(sorted(expected))}: "
            f"quantised experts. {_QUANTISED}"
        )
    sizes = set()
    for section in section_names(module):
        tensor = getattr(module, section)
        data = tensor.data if isinstance(tensor, nn.Parameter) else tensor
        if type(data) is not Tensor or tensor.dtype not in _DTYPES:
            raise UnsupportedModelError(
                f"{where}: {section} is a {type(data).__name__} of {tensor.dtype}; expected plain "
                f"float32, float16 or bfloat16. {_QUANTISED}"
            )
        dims = 2 if section.endswith("_bias") else 3
        if tensor.dim() != dims:
            raise UnsupportedModelError(
                f"{where}: {section} must have {dims} dimensions, experts first, got shape "
                f"{tuple(tensor.shape)}."
            )
        sizes.add(int(tensor.shape[0]))
    if len(sizes) != 1:
        raise UnsupportedModelError(f"{where}: its parameters disagree on the experts: {sizes}.")
    hook = getattr(module, "_hf_hook", None)
    if hook is not None or "forward" in vars(module):
        cause = "an accelerate hook (device_map)" if hook is not None else "a replaced forward"
        raise UnsupportedModelError(
            f"{where} carries {cause}, which would run instead of paging. Load the model with "
            "moe_offload.from_pretrained(path, device_budget=...), or without device_map."
        )
    if getattr(model, "use_kernels", False) and any(
        getattr(parent, "kernel_layer_name", None)
        for prefix, parent in model.named_modules()
        if name.startswith(f"{prefix}.") and hasattr(parent, "experts")
    ):
        raise UnsupportedModelError(
            f"{where} sits in a layer replaced by use_kernels=True, which reads all expert weights "
            "itself. Load the model with use_kernels=False."
        )
