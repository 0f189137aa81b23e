"""What quantised pages save: MXFP4, fp8 and int4 checkpoints beside their weights in bfloat16.

Two random-weight checkpoints per shape hold the same numbers, quantised and dequantised, so every
logit must be equal, and is compared before a time counts.

*One layer*, its experts in memory: what unpacking costs, or what reading fewer bytes saves.
*Whole model*, its experts on disk: a few layers at 25 % of the bfloat16 experts, against the
quantised ones at as many bytes, and at as large a share. Turns alternate, each prompt is new, files
are read past the page cache, slots keep what earlier turns left.

    python bench/quantised.py                 all shapes: 20 GB in --workdir
    python bench/quantised.py --quick         toy sizes: does it run?
"""

from __future__ import annotations

import argparse
import json
import tempfile
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from harness import Row, environment, machine_name, pin_to_cores, print_table, save, spread
from safetensors.torch import save_file
from torch import Tensor

import moe_offload
from moe_offload import quantization
from moe_offload.activations import Activation
from moe_offload.backends.native import BoundLayer, NativeRun
from moe_offload.pages import pack_experts
from moe_offload.quantization import SCALES

NUM_CORES = 2


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


# ---- one layer, in memory --------------------------------------------------------------------


def layers_in_memory(shape: Shape) -> dict[str, tuple[BoundLayer, dict[str, Tensor]]]:
    """The same experts in bfloat16 and quantised, in pages as slots hold them."""
    generator = torch.Generator().manual_seed(1)
    parts: dict[str, list[Tensor]] = {}
    rows_of_first = 2 * shape.inner
    for _ in range(shape.resident):
        for name, rows, columns in (
            ("gate_up_proj", rows_of_first, shape.hidden),
            ("down_proj", shape.hidden, shape.inner),
        ):
            halves = 2 if name == "gate_up_proj" and not shape.gpt_oss else 1
            drawn = [draw_matrix(shape, rows // halves, columns, generator) for _ in range(halves)]
            codes, scales = (torch.cat(tensors) for tensors in zip(*drawn, strict=True))
            matrix = torch.cat(
                [quantization.dequantise(shape.form, *pair, torch.bfloat16) for pair in drawn]
            )
            parts.setdefault(name, []).append(codes)
            parts.setdefault(name + SCALES, []).append(scales)
            wide = matrix.t().contiguous() if shape.gpt_oss else matrix
            parts.setdefault(f"wide {name}", []).append(wide)
    stacked = {name: torch.stack(tensors) for name, tensors in parts.items()}
    wide = {n.removeprefix("wide "): t for n, t in stacked.items() if n.startswith("wide ")}
    stored = {name: t for name, t in stacked.items() if not name.startswith("wide ")}
    clamped = Activation("clamped_swiglu", True, 1.702, 7.0, 1.0)
    sizes = (shape.hidden, shape.inner, shape.resident, torch.bfloat16)
    activation = clamped if shape.gpt_oss else Activation("silu")
    concatenated = not shape.gpt_oss
    return {
        "bf16": (
            BoundLayer(activation, *sizes, concatenated, transposed=shape.gpt_oss),
            pack_experts(wide),
        ),
        shape.form: (
            BoundLayer(activation, *sizes, concatenated, weight_format=shape.form),
            pack_experts(stored),
        ),
    }


def time_layers(shape: Shape, tokens: tuple[int, ...], rounds: int) -> list[Row]:
    """Microseconds of one call, contenders in turn, each call with its own tokens and experts."""
    contenders = layers_in_memory(shape)
    bound = {name: (layer, layer.weights(tensors)) for name, (layer, tensors) in contenders.items()}
    page_bytes = {
        name: sum(t[0].nbytes for t in tensors.values())
        for name, (_, tensors) in contenders.items()
    }
    generator = torch.Generator().manual_seed(2)
    rows: list[Row] = []
    for count in tokens:
        times: dict[str, list[float]] = {name: [] for name in bound}
        distinct: list[int] = []
        for number in range(rounds + 1):
            hidden = torch.randn(count, shape.hidden, generator=generator).bfloat16()
            scores = torch.randn(count, shape.resident, generator=generator).softmax(-1)
            weights, ids = scores.topk(min(shape.top_k, shape.resident))
            outputs = []
            for name, (layer, views) in bound.items():
                start = time.perf_counter()
                call = NativeRun(layer, hidden, ids, weights)
                call.run.compute_all(views)
                outputs.append(call.finish())
                if number:  # the first warms up
                    times[name].append((time.perf_counter() - start) * 1e6)
            if not torch.equal(*outputs):
                raise SystemExit(f"{shape.name}, T = {count}: the layers differ")
            distinct.append(len(ids.unique()))
        plain = spread(times["bf16"])["median"]
        for name in bound:
            us = spread(times[name])
            experts = sum(distinct) / len(distinct)
            rows.append(
                {
                    "shape": shape.name,
                    "pages": name,
                    "T": count,
                    "us": us,
                    "us_per_expert": us["median"] / experts,
                    "gb_per_s": experts * page_bytes[name] / us["median"] / 1e3,
                    "page_mb": page_bytes[name] / 1e6,
                    "x_bf16": plain / us["median"],
                }
            )
    return rows


# ---- a whole model, from disk ----------------------------------------------------------------


class Contender:
    """One offloaded model and what its turns took."""

    def __init__(self, name: str, folder: Path, budget: int | str) -> None:
        self.name = name
        self.model = moe_offload.from_pretrained(folder, device_budget=budget)
        self.offloader = moe_offload.get_offloader(self.model)
        self.prefill_s: list[float] = []
        self.step_s: list[float] = []

    @torch.no_grad()
    def turn(self, prompt: Tensor, steps: int, counted: bool) -> list[Tensor]:
        """Prefill and greedy decoding; returns the logits of each step."""
        if counted and not self.prefill_s:
            self.offloader.reset_stats()
        found, ids, past = [], prompt, None
        for step in range(steps + 1):
            start = time.perf_counter()
            out = self.model(ids, past_key_values=past, use_cache=True)
            seconds = time.perf_counter() - start
            past, last = out.past_key_values, out.logits[:, -1]
            found.append(last)
            ids = last.argmax(-1, keepdim=True)
            if counted:
                (self.step_s if step else self.prefill_s).append(seconds)
        return found

    def row(self, shape: Shape) -> Row:
        stats = self.offloader.stats()
        step = spread(self.step_s)
        lookups = stats["lookups"]
        return {
            "shape": shape.name,
            "contender": self.name,
            "weight_format": stats["weight_format"],
            "slots_mb": stats["device_budget_bytes"] / 1e6,
            "slots": stats["num_slots"] / stats["num_pages"],
            "hit_rate": stats["hit_rate"],
            "lookups": lookups,
            "disk_mb": stats["disk_bytes"] / 1e6,
            "stall_s": stats["stall_seconds"],
            "wall_s": sum(self.step_s) + sum(self.prefill_s),
            "decode_ms": {k: v if k == "samples" else v * 1e3 for k, v in step.items()},
            "decode_tok_s": 1 / step["median"],
            "prefill_ms": spread([seconds * 1e3 for seconds in self.prefill_s]),
        }


def time_models(
    shape: Shape, workdir: Path, rounds: int, prompt_tokens: int, steps: int
) -> list[Row]:
    """Contenders at one budget in bytes and at one share, in turn."""
    quantised, plain = write(shape, workdir)
    budget = shape.layers * shape.experts * shape.bf16_bytes // 4
    makers: list[Callable[[], Contender]] = [
        lambda: Contender("bf16, 25 %", plain, budget),
        lambda: Contender(f"{shape.form}, as many bytes", quantised, budget),
        lambda: Contender(f"{shape.form}, 25 %", quantised, "25%"),
    ]
    contenders = [make() for make in makers]
    generator = torch.Generator().manual_seed(3)
    for number in range(rounds + 1):
        prompt = torch.randint(8192, (1, prompt_tokens), generator=generator)
        order = contenders if number % 2 else contenders[::-1]
        answers = [one.turn(prompt, steps, counted=number > 0) for one in order]
        for other in answers[1:]:
            if not all(torch.equal(a, b) for a, b in zip(answers[0], other, strict=True)):
                raise SystemExit(f"{shape.name}: logits differ in round {number}")
    rows = [one.row(shape) for one in contenders]
    for row in rows:
        row["x_bf16"] = row["decode_tok_s"] / rows[0]["decode_tok_s"]
        row["prefill_x_bf16"] = rows[0]["prefill_ms"]["median"] / row["prefill_ms"]["median"]
    for one in contenders:
        one.offloader.close()
    return rows


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--quick", action="store_true", help="toy sizes; times mean nothing")
    parser.add_argument("--shape", choices=list(SHAPES), help="one of them")
    parser.add_argument("--part", choices=["layer", "model", "write"], help="one part only")
    parser.add_argument("--workdir", type=Path, help="for checkpoints; default: a cache folder")
    parser.add_argument("--output", type=Path, help="write the JSON here instead of bench/results")
    given = parser.parse_args()
    pin_to_cores(NUM_CORES)
    torch.set_num_threads(NUM_CORES)
    record = environment()
    known = QUICK if given.quick else SHAPES
    shapes = [shape for key, shape in known.items() if given.shape in (None, key)]
    layer_rows: list[Row] = []
    model_rows: list[Row] = []
    with tempfile.TemporaryDirectory() as temporary:
        workdir = given.workdir or Path.home() / ".cache" / "moe_offload_bench"
        workdir = Path(temporary) if given.quick and given.workdir is None else workdir
        for shape in shapes:
            if given.part == "write":
                write(shape, workdir)
            if given.part in (None, "layer"):
                sizes = (1, 20) if given.quick else (1, 4, 16, 64, 256)
                layer_rows += time_layers(shape, sizes, 3 if given.quick else 9)
            if given.part in (None, "model"):
                counts = (2, 6, 3) if given.quick else (4, 64, 16)
                model_rows += time_models(shape, workdir, *counts)
    show(layer_rows, model_rows)
    results = {"environment": record, "layer": layer_rows, "model": model_rows}
    if given.output is not None:
        given.output.write_text(json.dumps(results, indent=1) + "\n")
    elif not given.quick and given.part is None and given.shape is None:
        print(f"\nwritten to {save('quantised', results, machine_name())}")


def show(layer_rows: list[Row], model_rows: list[Row]) -> None:
    layer = {
        "shape": "shape",
        "pages": "pages",
        "T": "T",
        "us": "us",
        "us_per_expert": "us/expert",
        "page_mb": "MB/expert",
        "gb_per_s": "GB/s",
        "x_bf16": "x bf16",
    }
    model = {
        "shape": "shape",
        "contender": "contender",
        "slots_mb": "slots MB",
        "slots": "share",
        "hit_rate": "hit rate",
        "disk_mb": "disk MB",
        "stall_s": "stall s",
        "wall_s": "wall s",
        "decode_ms": "decode ms",
        "decode_tok_s": "tok/s",
        "x_bf16": "x bf16",
        "prefill_ms": "prefill ms",
        "prefill_x_bf16": "x bf16 ",
    }
    if layer_rows:
        print_table(layer_rows, layer, "One layer, experts in memory; outputs equal")
    if model_rows:
        print_table(model_rows, model, "Whole model, experts on disk; logits equal")


if __name__ == "__main__":
    main()
