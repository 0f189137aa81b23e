"""Compiles kernels for GPUs that are not there: a script, run by test_triton_compile.py.

    python tests/triton_compile.py 80:slow 90:all

The public ops are called with CPU tensors while every launch is replaced by compilation for the
wanted architecture, so what is compiled is exactly what a launch there would compile: same types,
same alignment hints, same constants. Prints one JSON line per kernel with what cuobjdump (from the
triton wheel) says about it. It needs a process without TRITON_INTERPRET.
"""

from __future__ import annotations

import contextlib
import json
import re
import subprocess
import sys
import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
import triton
from triton.backends.compiler import GPUTarget
from triton.runtime import driver
from triton.runtime.jit import JITFunction

from moe_offload.triton_kernels import launch

sys.modules[launch.__name__].require_device = lambda op, tensor: contextlib.nullcontext()  # type: ignore[attr-defined]

from moe_offload.triton_kernels.combine import combine  # noqa: E402
from moe_offload.triton_kernels.grouped_gemm import Epilogue, grouped_gemm  # noqa: E402
from moe_offload.triton_kernels.next_layer import NextLayerPredictor  # noqa: E402
from moe_offload.triton_kernels.permute import Permutation, permute  # noqa: E402
from moe_offload.triton_kernels.route_predict_permute import route_predict_permute  # noqa: E402
from moe_offload.triton_kernels.scoring import Scoring  # noqa: E402

CUOBJDUMP = Path(triton.__file__).parent / "backends" / "nvidia" / "bin" / "cuobjdump"
BF16 = torch.bfloat16
SWIGLU = Epilogue("silu", "halves")
GPT_OSS = Epilogue("clamped_swiglu", "interleaved", 1.702, 7.0, 1.0)


class AbsentGpu:
    """The driver's answers that the compiler asks for."""

    def __init__(self, arch: int) -> None:
        self.arch = arch

    def get_current_target(self) -> GPUTarget:
        return GPUTarget("cuda", self.arch, 32)

    def get_current_device(self) -> int:
        return self.arch

    def get_current_stream(self, device: int) -> int:
        return 0


def route(
    tokens: int, experts: int, top_k: int, hidden_size: int, scoring: Scoring, dtype: torch.dtype
) -> None:
    head = torch.empty(1, experts, hidden_size, dtype=dtype)
    sigmoid = scoring.kind == "sigmoid"
    route_predict_permute(
        torch.empty(tokens, experts, dtype=torch.float32 if sigmoid else dtype),
        top_k,
        scoring,
        correction_bias=torch.empty(experts) if sigmoid else None,
        slot_of=torch.empty(3, experts, dtype=torch.int32),
        layer=1,
        hidden=torch.empty(tokens, hidden_size, dtype=dtype),
        predictor=NextLayerPredictor(head, top_k, scoring),
    )


def experts(
    tokens: int,
    experts: int,
    top_k: int,
    sizes: tuple[int, int],
    dtype: torch.dtype = BF16,
    epilogue: Epilogue = SWIGLU,
    transposed: bool = False,
) -> None:
    """Both projections and the combine; slots are views into a slab, as pages are."""
    hidden_size, inner = sizes
    rows = Permutation.empty(tokens, top_k, experts, torch.device("cpu"))
    slots = torch.empty(experts, dtype=torch.int32)

    def weight(out: int, inner: int) -> tuple[torch.Tensor, torch.Tensor | None]:
        shape = (inner, out) if transposed else (out, inner)
        slab = torch.empty(2, out * inner + 2048, dtype=dtype)
        bias = torch.empty(2, out, dtype=dtype) if transposed else None
        return slab[:, : out * inner].unflatten(1, shape), bias

    x = torch.empty(tokens, hidden_size, dtype=dtype)
    up, bias = weight(2 * inner, hidden_size)
    options = {"bias": bias, "epilogue": epilogue, "transposed": transposed}
    y = grouped_gemm(x, up, rows, slots, gather=True, **options)
    down, bias = weight(hidden_size, inner)
    y = grouped_gemm(y, down, rows, slots, bias=bias, transposed=transposed)
    combine(y, rows.route_row, torch.empty(tokens, top_k))


QWEN3 = Scoring(normalize=True)
DEEPSEEK = Scoring("sigmoid", True, 8, 4, 2.5)
QUICK: dict[str, Callable[[], object]] = {
    "route Qwen3 T=1": lambda: route(1, 128, 8, 2048, QWEN3, BF16),
    "route DeepSeek-V3 T=64": lambda: route(64, 256, 8, 7168, DEEPSEEK, BF16),
    "route Qwen3 T=1024": lambda: route(1024, 128, 8, 2048, QWEN3, BF16),
    "experts Qwen3 T=1": lambda: experts(1, 128, 8, (2048, 768)),
    "experts Qwen3 T=4096": lambda: experts(4096, 128, 8, (2048, 768)),
}
SLOW: dict[str, Callable[[], object]] = {
    "route Mixtral T=4": lambda: route(4, 8, 2, 4096, QWEN3, BF16),
    "route gpt-oss T=16": lambda: route(16, 128, 4, 2880, Scoring("softmax_topk"), torch.float16),
    "route 512 experts T=64": lambda: route(64, 512, 10, 2048, QWEN3, BF16),
    "route 512 experts T=4096": lambda: route(4096, 512, 10, 2048, QWEN3, BF16),
    "experts Mixtral T=64": lambda: experts(64, 8, 2, (4096, 14336)),
    "experts Mixtral T=128": lambda: experts(128, 8, 2, (4096, 14336)),
    "experts OLMoE T=512": lambda: experts(512, 64, 8, (2048, 1024), torch.float16),
    "experts gpt-oss T=4": lambda: experts(4, 32, 4, (2880, 2880), BF16, GPT_OSS, True),
    "experts gpt-oss T=4096": lambda: experts(4096, 32, 4, (2880, 2880), BF16, GPT_OSS, True),
    "experts fp32 T=1": lambda: experts(1, 8, 2, (1024, 512), torch.float32),
    "permute T=1": lambda: permute(torch.empty(1, 8, dtype=torch.int64), 128),
    "permute slots T=4096": lambda: permute(torch.empty(4096, 8, dtype=torch.int32), 4096),
}


def resources(cubin: bytes) -> dict[str, int]:
    """Registers, stack and local bytes per thread, as the assembler left them."""
    with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
        file.write(cubin)
        file.flush()
        command = [str(CUOBJDUMP), "-res-usage", file.name]
        text = subprocess.run(command, capture_output=True, text=True, check=True).stdout
    found = re.search(r"REG:(\d+) STACK:(\d+) SHARED:(\d+) LOCAL:(\d+)", text)
    assert found is not None, text
    registers, stack, shared, local = map(int, found.groups())
    return {"registers": registers, "stack": stack, "shared": shared, "local": local}


CASES = {"quick": QUICK, "slow": SLOW, "all": QUICK | SLOW}


def main(wanted: list[tuple[int, str]]) -> None:
    compiled: list[Any] = []
    run = JITFunction.run

    def compile_only(self: Any, *args: Any, grid: Any, warmup: bool, **options: Any) -> Any:
        kernel = run(self, *args, grid=grid, warmup=True, **options)
        compiled.append(kernel)
        return kernel

    JITFunction.run = compile_only
    for arch, which in wanted:
        driver.set_active(AbsentGpu(arch))
        for case, call in CASES[which].items():
            compiled.clear()
            call()
            for kernel in compiled:
                record = {
                    "case": case,
                    "arch": kernel.metadata.target.arch,
                    "kernel": kernel.name,
                    "warps": kernel.metadata.num_warps,
                    "dynamic_shared": kernel.metadata.shared,
                    "ptx_target": re.search(r"\.target (\w+)", kernel.asm["ptx"]).group(1),  # type: ignore[union-attr]
                    **resources(kernel.asm["cubin"]),
                }
                print(json.dumps(record), flush=True)


if __name__ == "__main__":
    main([(int(arch), which) for arch, _, which in (a.partition(":") for a in sys.argv[1:])])
