"""A decoded token's attention: the CPU kernel beside torch's, to decide `attention.PAYS_ON`.

One token a sequence behind S positions, in four models' shapes. As many layers' keys and values
are attended to in turn as are far larger than the caches: in a model, they come from memory each
time. They lie as in a cache with room, further apart than there are positions. torch gets what
transformers gives it (`enable_gqa`) and, where heads share keys, the heads of a group as rows of
one query. Variants take turns; the roofs are passes over memory in every round, in pages of 2 MiB
and of 4 KiB. In 16 bits a root mean square error against fp64 beyond 1.2 x torch's own ends the
run; in float32, where it is the order of summation alone, it is a column.

    python bench/attention.py --dtype bfloat16   a minute; all dtypes without it
    python bench/attention.py --quick        does it run?
    MOE_OFFLOAD_CPU_ISA=avx2 ONEDNN_MAX_CPU_ISA=AVX2 MKL_ENABLE_INSTRUCTIONS=AVX2 \\
        ATEN_CPU_CAPABILITY=avx2 python bench/attention.py --output FILE   as an older processor
"""

from __future__ import annotations

import argparse
import json
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

from harness import Row, environment, machine_name, median, pin_to_cores, print_table, save, spread

SHAPES = {  # query heads, heads of keys, size of a head
    "OLMoE": (16, 16, 128),
    "Qwen3-30B-A3B": (32, 4, 128),
    "Mixtral": (32, 8, 128),
    "gpt-oss": (64, 8, 64),
}
MOST_TOKENS = 8 * 2048  # of all sequences
DTYPES = ("bfloat16", "float16", "float32")


@dataclass(frozen=True)
class Plan:
    positions: tuple[int, ...]
    few_positions: tuple[int, ...]  # of other dtypes than bfloat16
    batches: tuple[int, ...]
    cache_bytes: int  # of all layers' keys and values, at least
    rounds: int
    seconds: float  # of a variant's turn


STANDARD = Plan(
    (64, 128, 256, 512, 1024, 2048, 4096, 8192), (64, 256, 1024, 4096), (1, 8), 192 << 20, 7, 0.01
)
QUICK = Plan((5, 64), (300,), (1, 2), 1 << 16, 1, 0.0)


def measure(
    plan: Plan,
    roofs: dict[str, Callable[[], float]],
    name: str,
    dtype_name: str,
    batch: int,
    positions: int,
) -> Row:
    """All variants on one shape, in turn."""
    import torch
    import torch.nn.functional as F

    from moe_offload import _core
    from moe_offload.attention import token_attention

    dtype = getattr(torch, dtype_name)
    heads, groups, size = SHAPES[name]
    num_bytes = 2 * batch * groups * positions * size * dtype.itemsize
    count = max(1, -(-plan.cache_bytes // num_bytes))
    room = positions + 64
    drawn = torch.randn(batch, groups, room, size).to(dtype)
    layers = []
    for layer in range(count):
        key = drawn.roll(layer, 2)[:, :, :positions]
        layers.append((key, drawn.roll(-layer - 1, 2)[:, :, :positions]))
    query = torch.randn(batch, heads, 1, size).to(dtype)
    rows = query.reshape(batch, groups, heads // groups, size)

    def native(key: torch.Tensor, value: torch.Tensor) -> torch.Tensor:
        return token_attention(query, key, value)

    def plain(key: torch.Tensor, value: torch.Tensor) -> torch.Tensor:
        out = F.scaled_dot_product_attention(query, key, value, enable_gqa=heads != groups)
        return out.transpose(1, 2)

    def grouped(key: torch.Tensor, value: torch.Tensor) -> torch.Tensor:
        out = F.scaled_dot_product_attention(rows, key, value)
        return out.reshape(batch, 1, heads, size)

    variants: dict[str, Callable[[torch.Tensor, torch.Tensor], torch.Tensor]]
    variants = {"native": native, "torch": plain}
    if heads != groups:
        variants["grouped"] = grouped
    wide = [t[:1].double().repeat_interleave(heads // groups, 1) for t in layers[0]]
    exact = F.scaled_dot_product_attention(query[:1].double(), *wide).transpose(1, 2)
    errors = {
        v: (f(*layers[0])[:1] - exact).square().mean().sqrt().item() for v, f in variants.items()
    }
    if dtype != torch.float32 and not errors["native"] <= 1.2 * errors["torch"]:
        raise SystemExit(f"WRONG: {name} {dtype_name} {batch} x {positions}: {errors}, so no times")
    times: dict[str, list[float]] = {variant: [] for variant in variants}
    rates: dict[str, list[float]] = {roof: [] for roof in roofs}
    at = 0
    for _ in range(plan.rounds + 1):  # the first does not count
        for variant, attend in variants.items():
            start, calls = time.perf_counter(), 0
            while calls == 0 or time.perf_counter() - start < plan.seconds:
                attend(*layers[at % count])
                at, calls = at + 1, calls + 1
            times[variant].append((time.perf_counter() - start) / calls)
        for roof, read in roofs.items():
            rates[roof].append(read())
    us = {variant: [1e6 * t for t in taken[1:]] for variant, taken in times.items()}
    best = min((us[v] for v in us if v != "native"), key=median)
    rate = num_bytes / median(us["native"]) / 1e3
    return {
        "shape": name,
        "dtype": dtype_name,
        "isa": _core.DenseKernels(dtype_name).isa,
        "batch": batch,
        "positions": positions,
        "key_value_bytes": num_bytes,
        **{f"{variant}_us": spread(taken) for variant, taken in us.items()},
        "gb_per_s": rate,
        "torch_gb_per_s": num_bytes / median(best) / 1e3,
        **{f"{roof}_gb_per_s": median(taken[1:]) for roof, taken in rates.items()},
        **{f"of_{roof}": 100 * rate / median(taken[1:]) for roof, taken in rates.items()},
        "x_torch": median(us["torch"]) / median(us["native"]),
        "x_best": median(best) / median(us["native"]),
        "x_error": errors["native"] / errors["torch"] if errors["torch"] else 1.0,
    }


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--quick", action="store_true", help="small; times mean nothing")
    parser.add_argument("--shape", choices=tuple(SHAPES), action="append", help="default: all")
    parser.add_argument("--dtype", choices=DTYPES, action="append", help="default: all")
    parser.add_argument("--machine", help="name of the results folder; default: from the CPU")
    parser.add_argument("--output", type=Path, help="write the results here instead")
    args = parser.parse_args()
    plan = QUICK if args.quick else STANDARD
    pin_to_cores(2)
    where = environment()
    from roofs import memory_reader

    num_bytes = plan.cache_bytes
    roofs = {"read": memory_reader(num_bytes), "read_4k": memory_reader(num_bytes, False)}
    rows = [
        measure(plan, roofs, name, dtype, batch, positions)
        for dtype in args.dtype or DTYPES
        for name in args.shape or SHAPES
        for batch in plan.batches
        for positions in (plan.positions if dtype == "bfloat16" else plan.few_positions)
        if batch * positions <= MOST_TOKENS
    ]
    print_table(
        rows,
        {
            "shape": "shape",
            "dtype": "dtype",
            "batch": "B",
            "positions": "S",
            "native_us": "native, us",
            "torch_us": "torch, us",
            "grouped_us": "torch grouped, us",
            "gb_per_s": "native, GB/s",
            "of_read": "% read",
            "of_read_4k": "% read 4K",
            "torch_gb_per_s": "best torch, GB/s",
            "x_torch": "x torch",
            "x_best": "x best torch",
            "x_error": "error, x torch's",
        },
    )
    results = {"environment": where, "rows": rows}
    if args.output:
        args.output.write_text(json.dumps(results, indent=1) + "\n")
    elif not args.quick:
        print(f"written to {save('attention', results, args.machine or machine_name())}")


if __name__ == "__main__":
    main()
