"""Rewrite a saved bfloat16 checkpoint as a quantised one, in the layouts found on the hub."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file, save_file
from tiny_models import tiny_model
from torch import Tensor
from transformers import PreTrainedModel

from moe_offload import quantization

SIZES = {"hidden_size": 64, "intermediate_size": 96, "moe_intermediate_size": 96}


def read(folder: Path) -> dict[str, Tensor]:
    return load_file(folder / "model.safetensors")


def write(folder: Path, tensors: dict[str, Tensor], quantization_config: dict[str, Any]) -> None:
    save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})
    config = json.loads((folder / "config.json").read_text())
    config["quantization_config"] = quantization_config
    (folder / "config.json").write_text(json.dumps(config))


def mxfp4(folder: Path, **overrides: Any) -> PreTrainedModel:
    """A tiny gpt-oss as published: `_blocks` [E, N, K / 32, 16] and `_scales` [E, N, K / 32]."""
    model = tiny_model("gpt_oss", torch.bfloat16, **{**SIZES, **overrides})
    model.save_pretrained(folder)
    tensors = {}
    for key, tensor in read(folder).items():
        if key.endswith(("experts.gate_up_proj", "experts.down_proj")):
            blocks, scales = quantization.lossy_mxfp4(tensor.transpose(1, 2))
            tensors |= {f"{key}_blocks": blocks.contiguous(), f"{key}_scales": scales.contiguous()}
        else:
            tensors[key] = tensor
    write(folder, tensors, {"quant_method": "mxfp4", "modules_to_not_convert": ["lm_head"]})
    return model


def fp8(
    folder: Path,
    family: str = "qwen3_moe",
    scale_dtype: torch.dtype = torch.float32,
    keep: tuple[str, ...] = ("lm_head", "mlp.gate"),
    **overrides: Any,
) -> PreTrainedModel:
    """e4m3 with 128 x 128 blocks: every projection but those whose name contains one of `keep`."""
    model = tiny_model(family, torch.bfloat16, **{**SIZES, **overrides})
    model.save_pretrained(folder)
    tensors, kept = {}, []
    for key, tensor in read(folder).items():
        if tensor.dim() != 2 or "proj" not in key or any(name in key for name in keep):
            tensors[key] = tensor
            if tensor.dim() == 2:
                kept.append(key.removesuffix(".weight"))
            continue
        codes, scales = quantization.lossy_fp8_block(tensor)
        tensors |= {key: codes, f"{key}_scale_inv": scales.to(scale_dtype)}
    write(
        folder,
        tensors,
        {
            "quant_method": "fp8",
            "weight_block_size": [128, 128],
            "activation_scheme": "dynamic",
            "modules_to_not_convert": kept,
        },
    )
    return model


def dequantise(folder: Path, to: Path) -> Path:
    """The same checkpoint in bfloat16, by the formats' definition: independent of any loader."""
    tensors = read(folder)
    out: dict[str, Tensor] = {}
    for key, tensor in tensors.items():
        if key.endswith("_blocks"):
            scales = tensors[key.replace("_blocks", "_scales")]
            wide = quantization.dequantise_mxfp4(tensor, scales)
            out[key.removesuffix("_blocks")] = wide.transpose(1, 2).contiguous()
        elif f"{key}_scale_inv" in tensors:
            scales = tensors[f"{key}_scale_inv"].float()
            out[key] = quantization.dequantise_fp8_block(tensor, scales, torch.bfloat16)
        elif not key.endswith(("_scales", "_scale_inv")):
            out[key] = tensor
    to.mkdir()
    save_file(out, to / "model.safetensors", metadata={"format": "pt"})
    config = json.loads((folder / "config.json").read_text())
    del config["quantization_config"]
    (to / "config.json").write_text(json.dumps(config))
    (to / "generation_config.json").write_text((folder / "generation_config.json").read_text())
    return to
