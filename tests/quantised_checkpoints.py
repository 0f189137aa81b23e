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

MIXTRAL = (".w1.weight", ".w2.weight", ".w3.weight")
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


def int4(
    folder: Path,
    family: str = "qwen3_moe",
    group: int | None = 32,
    scale_dtype: torch.dtype = torch.bfloat16,
    keep: tuple[str, ...] = ("lm_head", "mlp.gate"),
    fused: bool = False,
    **overrides: Any,
) -> PreTrainedModel:
    """compressed-tensors' W4A16: `_packed` [N, K / 8], `_scale` [N, K / group] and `_shape`.

    Every projection but those whose name contains one of `keep` and those too narrow for a group.
    group: None for whole rows, strategy "channel". fused: all experts of a layer in one tensor.
    """
    model = tiny_model(family, torch.bfloat16, **{**SIZES, **overrides})
    model.save_pretrained(folder)
    tensors, kept = {}, []
    found = fused_experts(read(folder)) if fused else read(folder)
    for key, tensor in found.items():
        matrix = tensor.dim() >= 2 and ("proj" in key or key.endswith(MIXTRAL))
        columns = tensor.shape[-1]
        if not matrix or any(name in key for name in keep) or columns % (group or 8):
            tensors[key] = tensor
            if tensor.dim() >= 2:
                kept.append(key.removesuffix(".weight"))
            continue
        tensors |= packed(key, tensor, group or columns, scale_dtype)
    write(folder, tensors, w4a16(group, kept))
    return model


def packed(key: str, tensor: Tensor, group: int, dtype: torch.dtype) -> dict[str, Tensor]:
    """The nearest int4 matrix under compressed-tensors' names; any group that divides the row."""
    groups = tensor.float().unflatten(-1, (-1, group))
    scales = (groups.abs().amax(-1) / 7.5).to(dtype)
    codes = (groups / scales.float()[..., None]).round().clamp(-8, 7).flatten(-2).int() + 8
    words = codes.unflatten(-1, (-1, 8))
    word = words[..., 0].clone()
    for place in range(1, 8):
        word |= words[..., place] << (4 * place)  # the last one reaches the sign
    shape = torch.tensor(tensor.shape, dtype=torch.int64)
    return {f"{key}_packed": word, f"{key}_scale": scales, f"{key}_shape": shape}


def w4a16(group: int | None, ignore: list[str]) -> dict[str, Any]:
    """The quantization_config that llm-compressor writes for its W4A16 presets."""
    weights = {
        "actorder": None,
        "block_structure": None,
        "dynamic": False,
        "group_size": group,
        "num_bits": 4,
        "observer": "minmax",
        "observer_kwargs": {},
        "strategy": "channel" if group is None else "group",
        "symmetric": True,
        "type": "int",
    }
    scheme = {"input_activations": None, "output_activations": None, "targets": ["Linear"]}
    return {
        "config_groups": {"group_0": {**scheme, "weights": weights}},
        "format": "pack-quantized",
        "global_compression_ratio": None,
        "ignore": ignore,
        "kv_cache_scheme": None,
        "quant_method": "compressed-tensors",
        "quantization_status": "compressed",
        "sparsity_config": {},
        "transform_config": {},
        "version": "0.11.0",
    }


def gptq(
    folder: Path,
    family: str = "qwen3_moe",
    group: int | None = 32,
    scale_dtype: torch.dtype = torch.float16,
    keep: tuple[str, ...] = ("lm_head", "mlp.gate"),
    form: str = "gptq",
    bias: bool = False,
    **overrides: Any,
) -> PreTrainedModel:
    """AutoGPTQ's qweight [K / 8, N], scales [K / group, N], qzeros [K / group, N / 8] and g_idx.

    group: None for whole rows. form: "gptq" stores zeros less one. bias: a zero bias in each layer,
    as AutoGPTQ writes.
    """
    model = tiny_model(family, torch.bfloat16, **{**SIZES, **overrides})
    model.save_pretrained(folder)
    tensors = {}
    for key, tensor in read(folder).items():
        columns = tensor.shape[-1]
        kept = tensor.dim() != 2 or "proj" not in key or any(name in key for name in keep)
        if kept or columns % (group or 8):
            tensors[key] = tensor
            continue
        module, size = key.removesuffix(".weight"), group or columns
        int4 = packed("X", tensor, size, scale_dtype)
        zero = {"gptq": 0x77777777, "gptq_v2": 0x88888888 - (1 << 32)}[form]
        tensors |= {
            f"{module}.qweight": int4["X_packed"].t().contiguous(),
            f"{module}.scales": int4["X_scale"].t().contiguous(),
            f"{module}.qzeros": torch.full(
                (columns // size, tensor.shape[0] // 8), zero, dtype=torch.int32
            ),
            f"{module}.g_idx": (torch.arange(columns) // size).int(),
        }
        if bias:
            tensors[f"{module}.bias"] = torch.zeros(tensor.shape[0], dtype=scale_dtype)
    config = {
        "bits": 4,
        "checkpoint_format": form,
        "damp_percent": 0.01,
        "desc_act": False,
        "group_size": group or -1,
        "lm_head": False,
        "quant_method": "gptq",
        "static_groups": False,
        "sym": True,
        "true_sequential": True,
    }
    write(folder, tensors, config)
    return model


def degptq(module: str, tensors: dict[str, Tensor], offset: int) -> Tensor:
    """[N, K] by the formula of AutoGPTQ's qlinear_cuda: zeros and order as stored."""
    qweight, scales = tensors[f"{module}.qweight"], tensors[f"{module}.scales"]
    qzeros, order = tensors[f"{module}.qzeros"], tensors[f"{module}.g_idx"].long()
    places = torch.arange(0, 32, 4, dtype=torch.int32)
    zeros = (qzeros[:, :, None] >> places & 15).flatten(1) + offset & 15  # [K / group, N]
    codes = (qweight[:, None] >> places[:, None] & 15).flatten(0, 1)  # [K, N]
    return (scales[order] * (codes - zeros[order]).to(scales.dtype)).t().contiguous()


def fused_experts(tensors: dict[str, Tensor]) -> dict[str, Tensor]:
    """Per-expert projections as gate_up_proj [E, 2F, H] and down_proj [E, H, F] of each layer."""
    out, parts = {}, {}
    for key, tensor in tensors.items():
        if ".experts." not in key:
            out[key] = tensor
            continue
        layer, _, rest = key.partition(".experts.")
        expert, name, _ = rest.split(".")
        parts.setdefault(layer, {})[int(expert), name] = tensor
    for layer, found in parts.items():
        ids = sorted({expert for expert, _ in found})
        gate_up = [torch.cat([found[e, "gate_proj"], found[e, "up_proj"]]) for e in ids]
        out[f"{layer}.experts.gate_up_proj"] = torch.stack(gate_up)
        out[f"{layer}.experts.down_proj"] = torch.stack([found[e, "down_proj"] for e in ids])
    return out


def stored_zero_offset(folder: Path) -> int:
    config = json.loads((folder / "config.json").read_text())["quantization_config"]
    return 1 if config["checkpoint_format"] == "gptq" else 0


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
        elif key.endswith("_packed"):
            name = key.removesuffix("_packed")
            wide = quantization.dequantise_int4_group(tensor, tensors[f"{name}_scale"])
            out[name] = wide.bfloat16()
        elif key.endswith(".qweight"):
            name = key.removesuffix(".qweight")
            out[f"{name}.weight"] = degptq(name, tensors, stored_zero_offset(folder)).bfloat16()
        elif f"{key.rpartition('.')[0]}.qweight" in tensors:
            pass  # the other parts of GPTQ's, and a bias that the model does not have
        elif not key.endswith(("_scales", "_scale_inv", "_scale", "_shape")):
            out[key] = tensor
    to.mkdir()
    save_file(out, to / "model.safetensors", metadata={"format": "pt"})
    config = json.loads((folder / "config.json").read_text())
    del config["quantization_config"]
    (to / "config.json").write_text(json.dumps(config))
    (to / "generation_config.json").write_text((folder / "generation_config.json").read_text())
    return to
