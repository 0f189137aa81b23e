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
from pathlib import Path

import torch
from harness import Row, environment, machine_name, pin_to_cores, print_table, save, spread
from quantised_shapes import QUICK, SHAPES, Shape, draw_matrix, write
from torch import Tensor

import moe_offload
from moe_offload import quantization
from moe_offload.activations import Activation
from moe_offload.backends.native import BoundLayer, NativeRun
from moe_offload.pages import pack_experts
from moe_offload.quantization import SCALES

NUM_CORES = 2


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
