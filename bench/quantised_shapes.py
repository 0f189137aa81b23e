"""Shapes of quantised models, and random checkpoints of them, quantised and in bfloat16.

Both checkpoints hold the same numbers, so every kernel must make the same of both.
"""

from __future__ import annotations

import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file
from torch import Tensor

from moe_offload import quantization


@dataclass(frozen=True)
class Shape:
    """Layers of one model; `layers` of them are written, `resident` experts are timed in memory."""

    name: str
    family: str
    form: str
    hidden: int
    inner: int
    experts: int
    top_k: int
    layers: int
    resident: int
    group: int = 0  # of int4_group

    @property
    def key(self) -> str:
        return f"{self.family}-{self.form}"

    @property
    def gpt_oss(self) -> bool:
        return self.family == "gpt_oss"

    @property
    def bf16_bytes(self) -> int:
        return 6 * self.hidden * self.inner

    def config(self) -> Any:
        from transformers import AutoConfig

        heads = max(1, self.hidden // 128)
        inner = {"intermediate_size": self.inner, "moe_intermediate_size": self.inner}
        experts = {"num_local_experts": self.experts, "num_experts": self.experts}
        return AutoConfig.for_model(
            self.family,
            vocab_size=8192,
            hidden_size=self.hidden,
            num_hidden_layers=self.layers,
            num_attention_heads=heads,
            num_key_value_heads=heads,
            head_dim=64,
            num_experts_per_tok=self.top_k,
            tie_word_embeddings=False,
            eos_token_id=None,
            pad_token_id=None,
            bos_token_id=None,
            **(inner | experts),
            dtype="bfloat16",
        )


SHAPES = {
    "gpt_oss": Shape("gpt-oss-20b", "gpt_oss", "mxfp4", 2880, 2880, 32, 4, 3, 16),
    "qwen3": Shape("Qwen3-30B-A3B", "qwen3_moe", "fp8_block", 2048, 768, 128, 8, 4, 64),
    "qwen3_int4": Shape(
        "Qwen3-30B-A3B W4A16", "qwen3_moe", "int4_group", 2048, 768, 128, 8, 4, 64, 128
    ),
}
QUICK = {
    "gpt_oss": Shape("toy gpt-oss", "gpt_oss", "mxfp4", 128, 96, 8, 2, 2, 8),
    "qwen3": Shape("toy Qwen3", "qwen3_moe", "fp8_block", 128, 144, 8, 2, 2, 8),
    "qwen3_int4": Shape("toy Qwen3 W4A16", "qwen3_moe", "int4_group", 128, 160, 8, 2, 2, 8, 32),
}


# ---- weights ---------------------------------------------------------------------------------


def draw_matrix(shape: Shape, rows: int, columns: int, generator: torch.Generator) -> list[Tensor]:
    """Random codes and scales of weights of about columns ** -0.5."""
    form = shape.form
    specs = quantization.specs(form, rows, columns, torch.bfloat16, shape.group)
    assert specs[1] is not None
    (codes_shape, codes_dtype), (scales_shape, _) = specs
    if form == "int4_group":  # -8 to 7, whose r.m.s. is 4.6
        size = (rows, columns // 2)
        nibbles = torch.randint(256, size, dtype=torch.uint8, generator=generator)
        scales = (torch.rand(scales_shape, generator=generator) + 0.5) * columns**-0.5 / 4.6
        return [nibbles.view(codes_dtype), scales.bfloat16()]
    codes = torch.randint(256, codes_shape, dtype=torch.uint8, generator=generator)
    if form == "mxfp4":
        scales = torch.randint(118, 121, scales_shape, dtype=torch.uint8, generator=generator)
        return [codes, scales]
    codes[(codes & 127) > 120] -= 8  # neither NaN nor the largest
    return [codes.view(codes_dtype), (torch.rand(scales_shape, generator=generator) + 0.5) * 1e-4]


def write(shape: Shape, folder: Path) -> tuple[Path, Path]:
    """The quantised checkpoint and its bfloat16 twin, unless they are there."""
    from transformers import AutoModelForCausalLM

    quantised, plain = folder / shape.key, folder / f"{shape.key}-bf16"
    stamp = folder / f"{shape.key}.json"
    if stamp.is_file() and stamp.read_text() == json.dumps(shape.__dict__):
        return quantised, plain
    config = shape.config()
    with torch.device("meta"):
        model = AutoModelForCausalLM.from_config(config)
    config.architectures = [type(model).__name__]
    generator = torch.Generator().manual_seed(0)
    dense = {}
    for name, tensor in model.state_dict().items():
        if ".experts." in name:
            continue
        values = torch.randn(tensor.shape, generator=generator)
        wide = name.endswith("embed_tokens.weight")
        ones = tensor.dim() == 1 and "norm" in name
        scale = 0.5 if wide else tensor.shape[-1] ** -0.5
        dense[name] = (torch.ones_like(values) if ones else values * scale).bfloat16()
    for path in (quantised, plain):
        path.mkdir(parents=True, exist_ok=True)
        config.save_pretrained(path)
        save_file(dense, path / "dense.safetensors", metadata={"format": "pt"})
    kept = [name.removesuffix(".weight") for name in dense]
    values = json.loads((quantised / "config.json").read_text())
    values["quantization_config"] = quantization_config(shape, kept)
    (quantised / "config.json").write_text(json.dumps(values))
    places: tuple[dict[str, str], dict[str, str]] = ({}, {})
    for place in places:
        place.update(dict.fromkeys(dense, "dense.safetensors"))
    for layer in range(shape.layers):
        prefix = f"model.layers.{layer}.mlp.experts."
        parts = write_layer(shape, prefix, generator)
        for path, place, tensors in zip((quantised, plain), places, parts, strict=True):
            name = f"layer-{layer}.safetensors"
            save_file(tensors, path / name, metadata={"format": "pt"})
            place.update(dict.fromkeys(tensors, name))
        del parts
    for path, place in zip((quantised, plain), places, strict=True):
        index = {"metadata": {}, "weight_map": place}
        (path / "model.safetensors.index.json").write_text(json.dumps(index))
    stamp.write_text(json.dumps(shape.__dict__))
    return quantised, plain


def quantization_config(shape: Shape, kept: list[str]) -> dict[str, Any]:
    """What config.json says of it; `kept` are the modules that are not quantised."""
    if shape.form == "int4_group":
        weights = {
            "num_bits": 4,
            "type": "int",
            "symmetric": True,
            "strategy": "group",
            "group_size": shape.group,
        }
        return {
            "quant_method": "compressed-tensors",
            "format": "pack-quantized",
            "config_groups": {"group_0": {"targets": ["Linear"], "weights": weights}},
            "ignore": kept,
        }
    if shape.form == "mxfp4":
        return {"quant_method": "mxfp4", "modules_to_not_convert": kept}
    block = {"weight_block_size": [128, 128]}
    return {"quant_method": "fp8", "modules_to_not_convert": kept, **block}


def write_layer(
    shape: Shape, prefix: str, generator: torch.Generator
) -> tuple[dict[str, Tensor], dict[str, Tensor]]:
    """One layer's experts, quantised and in bfloat16, under the names of the hub."""
    stored: dict[str, Tensor] = {}
    wide: dict[str, Tensor] = {}
    hidden, inner = shape.hidden, shape.inner
    if shape.gpt_oss:
        for name, rows, columns in (
            ("gate_up_proj", 2 * inner, hidden),
            ("down_proj", hidden, inner),
        ):
            drawn = [draw_matrix(shape, rows, columns, generator) for _ in range(shape.experts)]
            stored[f"{prefix}{name}_blocks"] = torch.stack([codes for codes, _ in drawn])
            stored[f"{prefix}{name}_scales"] = torch.stack([scales for _, scales in drawn])
            twin = torch.empty(shape.experts, columns, rows, dtype=torch.bfloat16)
            for expert, (codes, scales) in enumerate(drawn):
                twin[expert] = quantization.dequantise_mxfp4(codes, scales).t()
            wide[f"{prefix}{name}"] = twin
            bias = torch.randn(shape.experts, rows, generator=generator).mul(0.1).bfloat16()
            stored[f"{prefix}{name}_bias"] = wide[f"{prefix}{name}_bias"] = bias
        return stored, wide
    for expert in range(shape.experts):
        for name in ("gate_proj", "up_proj", "down_proj"):
            rows, columns = (hidden, inner) if name == "down_proj" else (inner, hidden)
            key = f"{prefix}{expert}.{name}.weight"
            codes, scales = draw_matrix(shape, rows, columns, generator)
            wide[key] = quantization.dequantise(shape.form, codes, scales, torch.bfloat16)
            if shape.form == "fp8_block":
                stored |= {key: codes, f"{key}_scale_inv": scales}
            else:
                size = torch.tensor([rows, columns])
                stored |= {f"{key}_packed": codes, f"{key}_scale": scales, f"{key}_shape": size}
    return stored, wide
