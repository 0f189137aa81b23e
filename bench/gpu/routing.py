"""route_predict_permute on a GPU: all of it in a CUDA graph, beside the same steps in torch.

Target (issue 4): under 6 us for up to 64 tokens, routing, prediction, slots and sorting together.
A graph holds enough calls, each with heads, hidden states and logits of its own, that the heads
come from HBM as they do between two layers of a model. Each case is compared with the PyTorch twin
before it is timed; the torch line does the same work without the twin's synchronisation.
"""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any

import torch
from harness import Row
from torch import Tensor

COLUMNS = {
    "case": "case",
    "tokens": "T",
    "us": "us",
    "us_no_predictor": "us, no predictor",
    "us_torch": "us, torch",
    "floor_us": "floor us",
    "note": "note",
}
TOKENS = (1, 2, 4, 8, 16, 32, 64, 256, 1024, 4096)
COLD_BYTES = 256 << 20  # several times the L2 of any GPU


@dataclass(frozen=True)
class Model:
    """A router's shape; hidden is what the predictor reads."""

    name: str
    experts: int
    top_k: int
    hidden: int
    scoring: dict[str, Any]


MODELS = (
    Model("Qwen3-30B-A3B", 128, 8, 2048, {"normalize": True}),
    Model("Mixtral-8x7B", 8, 2, 4096, {"normalize": True}),
    Model("gpt-oss-120b", 128, 4, 2880, {"kind": "softmax_topk"}),
    Model(
        "DeepSeek-V3",
        256,
        8,
        7168,
        {"kind": "sigmoid", "normalize": True, "num_groups": 8, "top_groups": 4, "scale": 2.5},
    ),
)


def graph_us(call: Callable[[int], object], calls: int) -> float:
    """Median time of one of `calls` different calls, captured together in one graph."""
    stream = torch.cuda.Stream()
    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream):
        for index in range(2):  # compiles, and warms the allocator
            call(index)
    torch.cuda.current_stream().wait_stream(stream)
    torch.cuda.synchronize()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        kept = [call(index) for index in range(calls)]
    graph.replay()
    times = []
    for _ in range(15):
        begin, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        begin.record()
        graph.replay()
        end.record()
        end.synchronize()
        times.append(begin.elapsed_time(end) * 1e3 / calls)
    del kept
    return statistics.median(times)


def torch_steps(
    logits: Tensor, hidden: Tensor, head: Tensor, slots: Tensor, model: Model
) -> tuple[Tensor, ...]:
    """The same results by torch operations that do not wait for the host."""
    scoring = model.scoring
    if scoring.get("kind") == "sigmoid":
        scores = logits.float().sigmoid()
        grouped = scores.view(len(scores), scoring["num_groups"], -1)
        best = grouped.topk(2, dim=-1).values.sum(-1).topk(scoring["top_groups"], dim=-1).indices
        mask = torch.zeros_like(grouped[..., 0]).scatter_(1, best, 1.0)
        choice = grouped.masked_fill(mask[..., None] == 0, -torch.inf).flatten(1)
        ids = choice.topk(model.top_k, dim=-1).indices
        weights = scores.gather(1, ids)
    else:
        weights, ids = logits.float().softmax(-1).topk(model.top_k, dim=-1)
    weights = weights / weights.sum(-1, keepdim=True)
    order = ids.flatten().argsort(stable=True)
    inverse = torch.empty_like(order)
    inverse[order] = torch.arange(len(order), device=order.device)
    counts = torch.zeros(model.experts, dtype=torch.int64, device=order.device)
    counts.scatter_add_(0, ids.flatten(), torch.ones_like(order))
    offsets = counts.cumsum(0)
    next_scores, next_ids = (hidden @ head[0].t()).float().softmax(-1).topk(model.top_k, dim=-1)
    wanted = torch.full((model.experts,), -1.0, device=order.device)
    wanted.scatter_reduce_(0, next_ids.flatten(), next_scores.flatten(), "amax")
    listed = wanted.argsort(descending=True)
    return weights, slots[0][ids], inverse, offsets, listed, slots[1][listed]


def check(got: Any, want: Any, where: str = "") -> None:
    """Equal integers; floats to what another order of fp32 additions may change.

    The list's order is compared through its probabilities: near equals may change places.
    """
    for name, ours, theirs in zip(want._fields, got, want, strict=True):
        if theirs is None or name in ("prefetch_ids", "prefetch_slots", "next_ids", "num_prefetch"):
            continue
        if not isinstance(theirs, Tensor):
            check(ours, theirs, f"{where}.{name}")
        elif theirs.is_floating_point():
            torch.testing.assert_close(ours, theirs, rtol=2e-3, atol=1e-5)
        elif not torch.equal(ours, theirs):
            raise AssertionError(f"routing differs from the twin in {where}.{name}")


def run(budget_s: float) -> Iterator[Row]:
    deadline = time.monotonic() + budget_s - 5
    bandwidth = copy_bandwidth()
    for model in MODELS:
        for tokens in TOKENS:
            if time.monotonic() > deadline:
                return
            try:
                yield measure(model, tokens, bandwidth)
            except Exception as error:  # one case must not cost the others
                failed = f"failed: {type(error).__name__}: {str(error)[:200]}"
                yield {"case": model.name, "tokens": tokens, "note": failed}


def measure(model: Model, tokens: int, bandwidth: float) -> Row:
    from moe_offload.triton_kernels import reference
    from moe_offload.triton_kernels.next_layer import NextLayerPredictor
    from moe_offload.triton_kernels.route_predict_permute import (
        route_predict_permute,
        routing_workspace,
    )
    from moe_offload.triton_kernels.scoring import Scoring

    device, dtype = torch.device("cuda"), torch.bfloat16
    scoring = Scoring(**model.scoring)
    head_bytes = model.experts * model.hidden * 2
    calls = max(16, min(64, COLD_BYTES // head_bytes)) if tokens <= 64 else 16
    logits = torch.randn(calls, tokens, model.experts, device=device)
    if scoring.kind != "sigmoid":  # those routers compute in the model's dtype
        logits = logits.to(dtype)
    hidden = torch.randn(calls, tokens, model.hidden, device=device).to(dtype)
    heads = torch.randn(calls, 1, model.experts, model.hidden, device=device).to(dtype)
    heads *= model.hidden**-0.5
    predictors = [NextLayerPredictor(head, model.top_k, scoring) for head in heads]
    slots = torch.randint(-1, 4000, (2, model.experts), device=device, dtype=torch.int32)
    workspace = routing_workspace(predictors[0], device)

    def whole(i: int) -> object:
        return route_predict_permute(
            logits[i],
            model.top_k,
            scoring,
            slot_of=slots,
            hidden=hidden[i],
            predictor=predictors[i],
            workspace=workspace,
        )

    def routing_only(i: int) -> object:
        return route_predict_permute(
            logits[i], model.top_k, scoring, slot_of=slots, workspace=workspace
        )

    want = reference.route_predict_permute(
        logits[0],
        model.top_k,
        scoring,
        slot_of=slots,
        hidden=hidden[0],
        predictor=predictors[0],
    )
    check(whole(0), want)
    moved = head_bytes + tokens * (model.experts * logits.element_size() + model.hidden * 2)
    return {
        "case": model.name,
        "tokens": tokens,
        "us": graph_us(whole, calls),
        "us_no_predictor": graph_us(routing_only, calls),
        "us_torch": graph_us(
            lambda i: torch_steps(logits[i], hidden[i], heads[i], slots, model), calls
        ),
        "floor_us": moved / bandwidth * 1e6,
        "bytes": moved,
        "calls_per_graph": calls,
    }


def copy_bandwidth() -> float:
    """Bytes per second of a large device copy, read plus written: the roof of this part."""
    source = torch.empty(512 << 20, dtype=torch.uint8, device="cuda")
    target = torch.empty_like(source)
    target.copy_(source)
    times = []
    for _ in range(5):
        begin, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        begin.record()
        target.copy_(source)
        end.record()
        end.synchronize()
        times.append(begin.elapsed_time(end) / 1e3)
    return 2 * source.numel() / statistics.median(times)
