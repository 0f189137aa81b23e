"""Compiles kernels for GPUs that are not there: a script, run by test_triton_compile.py.

    python tests/triton_compile.py 80,90,100 quick

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

from moe_offload.triton_kernels.next_layer import NextLayerPredictor  # noqa: E402
from moe_offload.triton_kernels.permute import permute  # noqa: E402
from moe_offload.triton_kernels.route_predict_permute import route_predict_permute  # noqa: E402
from moe_offload.triton_kernels.scoring import Scoring  # noqa: E402

CUOBJDUMP = Path(triton.__file__).parent / "backends" / "nvidia" / "bin" / "cuobjdump"
BF16 = torch.bfloat16


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


QWEN3 = Scoring(normalize=True)
DEEPSEEK = Scoring("sigmoid", True, 8, 4, 2.5)
QUICK: dict[str, Callable[[], object]] = {
    "route Qwen3 T=1": lambda: route(1, 128, 8, 2048, QWEN3, BF16),
    "route DeepSeek-V3 T=64": lambda: route(64, 256, 8, 7168, DEEPSEEK, BF16),
    "route Qwen3 T=1024": lambda: route(1024, 128, 8, 2048, QWEN3, BF16),
}
SLOW: dict[str, Callable[[], object]] = {
    "route Mixtral T=4": lambda: route(4, 8, 2, 4096, QWEN3, BF16),
    "route gpt-oss T=16": lambda: route(16, 128, 4, 2880, Scoring("softmax_topk"), torch.float16),
    "route 512 experts T=64": lambda: route(64, 512, 10, 2048, QWEN3, BF16),
    "route 512 experts T=4096": lambda: route(4096, 512, 10, 2048, QWEN3, BF16),
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


def main(archs: list[int], which: str) -> None:
    compiled: list[Any] = []
    run = JITFunction.run

    def compile_only(self: Any, *args: Any, grid: Any, warmup: bool, **options: Any) -> Any:
        kernel = run(self, *args, grid=grid, warmup=True, **options)
        compiled.append(kernel)
        return kernel

    JITFunction.run = compile_only
    for arch in archs:
        driver.set_active(AbsentGpu(arch))
        for case, call in {"quick": QUICK, "slow": SLOW}[which].items():
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
    main([int(arch) for arch in sys.argv[1].split(",")], sys.argv[2])
