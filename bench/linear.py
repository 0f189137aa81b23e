"""Dense linear layers: this package's CPU kernels beside torch's, the evidence for `dense.PAYS`.

Shapes of attention projections and of a piece of an output head. As many copies of a weight are
multiplied in turn as are far larger than the caches: in a model, every weight comes from memory.
Variants take turns. In 16 bits an error against fp64 beyond 1.2 x torch's own ends the run; in
float32, where it is the order of summation alone, it is a column.

    python bench/linear.py                about five minutes
    python bench/linear.py --quick        does it run?
    MOE_OFFLOAD_CPU_ISA=avx2 ONEDNN_MAX_CPU_ISA=AVX2 MKL_ENABLE_INSTRUCTIONS=AVX2 \\
        ATEN_CPU_CAPABILITY=avx2 python bench/linear.py --output FILE      as an older processor
"""

from __future__ import annotations

import argparse
import json
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

from harness import Row, environment, machine_name, median, pin_to_cores, print_table, save, spread

SHAPES = {  # [N, K]
    "query, OLMoE": (2048, 2048),
    "key, Qwen3-30B-A3B": (512, 2048),
    "output, gpt-oss": (2880, 4096),
    "output head, a piece": (16384, 2048),
}
DTYPES = ("bfloat16", "float16", "float32")


@dataclass(frozen=True)
class Plan:
    rows: tuple[int, ...]
    weight_bytes: int  # of all copies of a weight
    rounds: int
    flops: float  # per sample: fewer copies where a product takes long


STANDARD = Plan((1, 2, 4, 8, 16, 32, 64, 128, 512), 256 << 20, 9, 4e9)
QUICK = Plan((1, 9), 1 << 20, 1, 1e6)


def measure(plan: Plan, name: str, dtype_name: str, rows: int) -> Row:
    """Both variants on one shape, in turn."""
    import torch
    import torch.nn.functional as F

    from moe_offload import _core

    dtype = getattr(torch, dtype_name)
    num_out, num_in = SHAPES[name]
    weight_bytes = num_out * num_in * dtype.itemsize
    by_flops = plan.flops / (2 * rows * num_out * num_in)
    count = max(1, min(plan.weight_bytes // weight_bytes, round(by_flops)))
    weights = [torch.randn(num_out, num_in).div_(num_in**0.5).to(dtype) for _ in range(count)]
    x = torch.randn(rows, num_in).to(dtype)
    y = torch.full((rows, num_out), float("nan"), dtype=dtype)
    kernels = _core.DenseKernels(dtype_name)

    def native(weight: torch.Tensor) -> torch.Tensor:
        kernels.multiply(
            *(x.data_ptr(), rows, num_in, num_out, weight.data_ptr(), num_in * dtype.itemsize),
            *(0, y.data_ptr(), torch.get_num_threads()),
        )
        return y

    def plain(weight: torch.Tensor) -> torch.Tensor:
        return F.linear(x, weight)

    exact = x.double() @ weights[0].double().T
    errors = [(f(weights[0]) - exact).abs().max().item() for f in (native, plain)]
    if dtype != torch.float32 and not errors[0] <= 1.2 * errors[1]:
        raise SystemExit(f"WRONG: {name} {dtype_name} {rows} rows: errors {errors}, so no times")
    variants: dict[str, Callable[[torch.Tensor], torch.Tensor]] = {"native": native, "torch": plain}
    times: dict[str, list[float]] = {variant: [] for variant in variants}
    for _ in range(plan.rounds + 1):  # the first does not count
        for variant, product in variants.items():
            start = time.perf_counter()
            for weight in weights:
                product(weight)
            times[variant].append((time.perf_counter() - start) / count)
    native_us, torch_us = ([1e6 * t for t in times[v][1:]] for v in ("native", "torch"))
    return {
        "shape": name,
        "dtype": dtype_name,
        "isa": kernels.isa,
        "rows": rows,
        "native_us": spread(native_us),
        "torch_us": spread(torch_us),
        "x_torch": median(b / a for a, b in zip(native_us, torch_us, strict=True)),
        "gb_per_s": weight_bytes / median(native_us) / 1e3,
        "torch_gb_per_s": weight_bytes / median(torch_us) / 1e3,
        "gflop_per_s": 2 * rows * num_out * num_in / median(native_us) / 1e3,
        "error": errors[0],
        "x_error": errors[0] / errors[1],
    }


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--quick", action="store_true", help="small; times mean nothing")
    parser.add_argument("--machine", help="name of the results folder; default: from the CPU")
    parser.add_argument("--output", type=Path, help="write the JSON here instead of bench/results")
    args = parser.parse_args()
    plan = QUICK if args.quick else STANDARD
    pin_to_cores(2)
    where = environment()
    rows = [
        measure(plan, name, dtype, rows)
        for dtype in DTYPES
        for name in SHAPES
        for rows in plan.rows
    ]
    print_table(
        rows,
        {
            "shape": "shape",
            "dtype": "dtype",
            "rows": "rows",
            "native_us": "native, us",
            "torch_us": "torch, us",
            "x_torch": "x torch",
            "gb_per_s": "native, GB/s",
            "torch_gb_per_s": "torch, GB/s",
            "gflop_per_s": "native, GFLOP/s",
            "x_error": "error, x torch's",
        },
    )
    results = {"environment": where, "rows": rows}
    if args.output:
        args.output.write_text(json.dumps(results, indent=1) + "\n")
    elif not args.quick:
        print(f"written to {save('linear', results, args.machine or machine_name())}")


if __name__ == "__main__":
    main()
