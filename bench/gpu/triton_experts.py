"""The Triton expert kernels on resident weights, beside transformers' grouped_mm and batched_mm.

Random weights and routing (uniform over experts; the other column has Zipf-like popularity, where
tuning on uniform routing is known to mislead). Ours is captured in a graph: sorting, both
projections and the combine; a graph's calls route differently, so weights come from HBM. The peers
run as transformers runs them, captured where that is possible and eagerly where not (they say so).
Each case is checked against fp32 arithmetic before it is timed.
"""

from __future__ import annotations

import time
import types
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any

import torch
from copy_roofs import event_seconds
from harness import Row
from routing import copy_bandwidth, graph_us
from torch import Tensor

COLUMNS = {
    "case": "case",
    "tokens": "T",
    "us": "us",
    "us_zipf": "us, skewed",
    "percent_of_floor": "% of floor",
    "tflops": "TFLOP/s",
    "us_grouped_mm": "us, grouped_mm",
    "us_batched_mm": "us, batched_mm",
    "us_liger": "us, liger",
    "note": "note",
}
TOKENS = (1, 2, 4, 8, 16, 32, 64, 256, 1024, 4096)
ROUTINGS = 4


@dataclass(frozen=True)
class Model:
    name: str
    experts: int
    top_k: int
    hidden: int
    inner: int


MODELS = (
    Model("Qwen3-30B-A3B", 128, 8, 2048, 768),
    Model("Mixtral-8x7B", 8, 2, 4096, 14336),
    Model("OLMoE", 64, 8, 2048, 1024),
)


def route(tokens: int, model: Model, zipf: bool) -> Tensor:
    """Ids [T, A]: A distinct experts per token, popularity uniform or 1 / rank."""
    rank = torch.arange(1, model.experts + 1, device="cuda", dtype=torch.float32)
    popularity = 1.0 / rank if zipf else torch.ones_like(rank)
    return torch.multinomial(popularity.expand(tokens, -1), model.top_k)


def fp32_experts(x: Tensor, weights: dict[str, Tensor], ids: Tensor, topk: Tensor) -> Tensor:
    out = torch.zeros_like(x, dtype=torch.float32)
    for expert in ids.unique().tolist():
        token, rank = (ids == expert).nonzero(as_tuple=True)
        gate, up = (x[token].float() @ weights["gate_up_proj"][expert].float().t()).chunk(2, -1)
        y = (torch.nn.functional.silu(gate) * up) @ weights["down_proj"][expert].float().t()
        out.index_add_(0, token, y * topk[token, rank, None].float())
    return out


def make_weights(model: Model) -> dict[str, Tensor]:
    shapes = {
        "gate_up_proj": (model.experts, 2 * model.inner, model.hidden),
        "down_proj": (model.experts, model.hidden, model.inner),
    }
    return {
        name: torch.empty(shape, device="cuda", dtype=torch.bfloat16).normal_(std=shape[2] ** -0.5)
        for name, shape in shapes.items()
    }


def run(budget_s: float) -> Iterator[Row]:
    deadline = time.monotonic() + budget_s - 5
    bandwidth = copy_bandwidth()
    for model in MODELS:
        weights = make_weights(model)
        for tokens in TOKENS:
            if time.monotonic() > deadline:
                return
            try:
                yield measure(model, tokens, weights, bandwidth)
            except Exception as error:  # one case must not cost the others
                failed = f"failed: {type(error).__name__}: {str(error)[:200]}"
                yield {"case": model.name, "tokens": tokens, "note": failed}
        del weights
    yield from liger(deadline)


def liger(deadline: float) -> Iterator[Row]:
    """liger-kernel's fused experts, last: it tries dozens of configurations for each new shape."""
    try:
        from liger_kernel.ops import LigerFusedMoEFunction
    except ImportError as error:
        yield {"case": "liger-kernel", "note": f"not measured: {error}"}
        return
    for model in MODELS:
        weights = make_weights(model)
        up, down = weights["gate_up_proj"], weights["down_proj"]
        for tokens in (1, 8, 64, 4096):
            if time.monotonic() > deadline:
                return
            hidden = torch.randn(tokens, model.hidden, device="cuda").bfloat16()
            topk = torch.rand(tokens, model.top_k, device="cuda")
            routings = [route(tokens, model, zipf=False).int() for _ in range(ROUTINGS)]

            def call(ids: Tensor, hidden: Tensor = hidden, topk: Tensor = topk) -> Tensor:
                out: Tensor = LigerFusedMoEFunction.apply(hidden, up, down, ids, topk)  # noqa: B023
                return out

            row: Row = {"case": model.name, "tokens": tokens}
            row["us_liger"], row["how_liger"] = time_peer(call, routings)
            yield row


def measure(model: Model, tokens: int, weights: dict[str, Tensor], bandwidth: float) -> Row:
    from moe_offload.triton_kernels.combine import combine
    from moe_offload.triton_kernels.grouped_gemm import Epilogue, grouped_gemm
    from moe_offload.triton_kernels.permute import permute

    slots = torch.arange(model.experts, dtype=torch.int32, device="cuda")
    hidden = torch.randn(tokens, model.hidden, device="cuda").bfloat16()
    topk = torch.rand(tokens, model.top_k, device="cuda")
    uniform = [route(tokens, model, zipf=False) for _ in range(ROUTINGS)]
    skewed = [route(tokens, model, zipf=True) for _ in range(ROUTINGS)]

    def ours(ids: Tensor) -> Tensor:
        rows = permute(ids, model.experts)
        up = weights["gate_up_proj"]
        inner = grouped_gemm(
            hidden, up, rows, slots, gather=True, epilogue=Epilogue("silu", "halves")
        )
        out = grouped_gemm(inner, weights["down_proj"], rows, slots)
        return combine(out, rows.route_row, topk)

    want = fp32_experts(hidden, weights, uniform[0], topk)
    got = ours(uniform[0]).float()
    error = ((got - want).norm() / want.norm()).item()
    if not error < 0.01:  # two bf16 roundings are about 0.003
        raise AssertionError(f"{model.name}, T = {tokens}: relative error {error}")

    us = graph_us(lambda i: ours(uniform[i % ROUTINGS]), 2 * ROUTINGS)
    page = 3 * model.hidden * model.inner * 2
    distinct = sum(len(ids.unique()) for ids in uniform) / ROUTINGS
    flops = 6 * tokens * model.top_k * model.hidden * model.inner
    row: Row = {
        "case": model.name,
        "tokens": tokens,
        "us": us,
        "us_zipf": graph_us(lambda i: ours(skewed[i % ROUTINGS]), 2 * ROUTINGS),
        "floor_us": distinct * page / bandwidth * 1e6,
        "percent_of_floor": 100 * distinct * page / bandwidth * 1e6 / us,
        "tflops": flops / us / 1e6,
        "relative_error": error,
    }
    try:
        others = peers(model, weights, hidden, topk)
    except ImportError as error:
        others, row["note"] = {}, f"no peers: {error}"
    for name, call in others.items():
        if name == "batched_mm" and tokens > 8:
            continue  # it copies every chosen expert: 75 GB for 4096 tokens of Qwen3
        row[f"us_{name}"], row[f"how_{name}"] = time_peer(call, uniform)
    return row


def peers(
    model: Model, weights: dict[str, Tensor], hidden: Tensor, topk: Tensor
) -> dict[str, Callable[[Tensor], Tensor]]:
    """transformers' own experts functions on the same weights."""
    from transformers.integrations import moe

    module: Any = types.SimpleNamespace(
        **weights,
        num_experts=model.experts,
        has_gate=True,
        has_bias=False,
        is_transposed=False,
        is_concatenated=True,
        act_fn=torch.nn.functional.silu,
        training=False,
    )
    module._apply_gate = lambda x: moe._default_apply_gate(module, x)
    return {
        "grouped_mm": lambda ids: moe.grouped_mm_experts_forward(module, hidden, ids, topk),
        "batched_mm": lambda ids: moe.batched_mm_experts_forward(module, hidden, ids, topk),
    }


def time_peer(call: Callable[[Tensor], Tensor], routings: list[Tensor]) -> tuple[float | None, str]:
    """Microseconds and "graph", or why it ran eagerly, or None and why it did not run."""
    try:
        return graph_us(lambda i: call(routings[i % len(routings)]), 2 * len(routings)), "graph"
    except Exception as error:  # whatever a peer does, our own row stands
        reason = (str(error).splitlines() or [type(error).__name__])[0]
    try:
        torch.cuda.synchronize()
        turn = iter(range(1 << 30))
        times = event_seconds(lambda: call(routings[next(turn) % len(routings)]), 20)  # type: ignore[arg-type]
    except Exception as error:
        return None, f"failed: {type(error).__name__}: {str(error)[:200]}"
    return sorted(times)[10] * 1e6, f"eager: {reason}"
