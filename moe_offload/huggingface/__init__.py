"""The drop-in for transformers: `offload` a live model, `from_pretrained` a checkpoint.

Importing this needs transformers; the names relied on are checked here, once, so that an
unsupported version says so instead of failing somewhere inside a load.
"""

from __future__ import annotations

import importlib

SUPPORTED = "transformers >= 5.17"
_NEEDED = {
    "transformers": ["AutoConfig", "AutoModelForCausalLM", "PreTrainedModel"],
    "transformers.modeling_utils": ["PreTrainedModel._load_pretrained_model"],
    "transformers.integrations.moe": ["ALL_EXPERTS_FUNCTIONS", "grouped_mm_experts_forward"],
    "transformers.conversion_mapping": ["get_model_conversion_mapping"],
    "transformers.integrations.finegrained_fp8": ["Fp8Dequantize"],
    "transformers.integrations.mxfp4": ["Mxfp4Dequantize"],
    "transformers.core_model_loading": [
        *["Concatenate", "MergeModulelist", "WeightConverter", "WeightRenaming"],
        *["build_glob_alternation", "dot_natural_key", "rename_source_key"],
    ],
}


def missing_names() -> list[str]:
    """The names this package needs that the installed transformers lacks; empty when it fits."""
    missing = []
    for module_name, names in _NEEDED.items():
        try:
            module = importlib.import_module(module_name)
        except ImportError:
            missing.append(module_name)
            continue
        for name in names:
            found: object = module
            for part in name.split("."):
                found = getattr(found, part, None)
            if found is None:
                missing.append(f"{module_name}.{name}")
    return missing


def _check_transformers() -> None:
    missing = missing_names()
    if "transformers" in missing:
        raise ImportError(
            f"moe_offload.huggingface needs {SUPPORTED}, which is not installed. "
            'Install it with: pip install "moe-offload[hf]"'
        )
    if missing:
        version = importlib.import_module("transformers").__version__
        raise ImportError(
            f"moe_offload.huggingface needs {SUPPORTED}; the installed {version} has no "
            f'{", ".join(missing)}. Install a supported one: pip install "moe-offload[hf]"'
        )


_check_transformers()

from moe_offload.huggingface.attach import get_offloader, offload  # noqa: E402
from moe_offload.huggingface.experts import register as _register  # noqa: E402
from moe_offload.huggingface.loading import from_pretrained  # noqa: E402

_register()

__all__ = ["from_pretrained", "get_offloader", "missing_names", "offload"]
