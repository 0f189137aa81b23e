"""Resident experts: our CUDA kernels beside torch and transformers, decode and prefill.

Every case is checked against float64 first, on a subset of tokens; a contender that is wrong prints
no time. Routing is uniform, weights are random, several sets of experts rotate so that L2 is cold,
and each variant is timed as a captured graph, variants alternating. The floor is the larger of
(distinct experts' bytes / measured copy rate) and (FLOPs / measured GEMM rate) of this session.
Quantised pages have the same columns; their bytes include the scales, their FLOPs are bf16's.
"""

from __future__ import annotations

import math
import statistics
import time
from collections.abc import Callable, Iterator

import torch
from harness import Row
from torch import Tensor

COLUMNS = {
    "case": "case",
    "variant": "variant",
    "us": "us",
    "floor_percent": "% of floor",
    "gb_s": "GB/s",
    "tflops": "TFLOP/s",
    "error": "error / torch's",
    "note": "note",
}
# E, A, H, F of one layer's routed experts; DeepSeek-V3 as one of eight shards.
MODELS = {
    "Mixtral-8x7B": (8, 2, 4096, 14336),
    "Qwen3-30B-A3B": (128, 8, 2048, 768),
    "OLMoE": (64, 8, 2048, 1024),
    "gpt-oss-20b": (32, 4, 2880, 2880),
    "DeepSeek-V3 shard": (32, 8, 7168, 2048),
}
DECODE = (1, 2, 4, 8, 16, 32, 64)
PREFILL = (256, 1024, 4096, 16384)
# Matrices stored [K, N], as transformers has them in bf16; torch's grouped product reads both.
TRANSPOSED = ("gpt-oss-20b",)
# Quantised pages: shapes, format, int4's group, as published; at fewer token counts.
QUANTISED = (
    ("gpt-oss-20b", "mxfp4", 0),
    ("Qwen3-30B-A3B", "fp8_block", 0),
    ("DeepSeek-V3 shard", "fp8_block", 0),
    ("DeepSeek-V3 shard", "int4_group", 32),
)
QUANTISED_TOKENS = (1, 8, 64, 4096)
SETS_BYTES = 3 << 30  # weights that rotate: many times any L2

Work = Callable[[], Tensor]
Replay = Callable[[], object]


def roofs() -> tuple[float, float]:
    """Bytes per second of a device copy (read plus written) and FLOP/s of a bf16 product."""
    a = torch.randn(8192, 8192, device="cuda", dtype=torch.bfloat16)
    b, c = torch.randn_like(a), torch.empty_like(a)
    big = torch.empty(4, 1 << 29, dtype=torch.uint8, device="cuda")
    copy = median_seconds([lambda: big[1].copy_(big[0]), lambda: big[3].copy_(big[2])], 10)
    gemm = median_seconds([lambda: torch.mm(a, b, out=c)], 10)
    return 2 * big[0].numel() / copy, 2 * 8192**3 / gemm


def median_seconds(works: list[Callable[[], object]], rounds: int) -> float:
    times = []
    for _ in range(rounds):
        for work in works:
            begin, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
            begin.record()
            work()
            end.record()
            end.synchronize()
            times.append(begin.elapsed_time(end) / 1e3)
    return statistics.median(times[len(works) :] or times)


def fill(form: str, codes: Tensor, scales: Tensor | None, columns: int) -> None:
    """Random weights of about 1 / sqrt(columns): uniform codes, which no cache can compress."""
    size = columns**-0.5
    if form == "plain":
        codes.normal_(std=size)
    elif form == "fp8_block" and scales is not None:
        codes.view(torch.uint8).random_(256)
        codes.view(torch.uint8).masked_fill_((codes.view(torch.uint8) & 127) == 127, 0)  # NaN
        scales.uniform_(0.5, 1.5).mul_(size / 100)  # the root mean square of the codes
    elif form == "mxfp4" and scales is not None:
        codes.random_(256)
        scales.fill_(round(127 + math.log2(size / 2.9)))
    elif form == "int4_group" and scales is not None:
        codes.random_(-(2**31), 2**31 - 1)
        scales.uniform_(0.5, 1.5).mul_(size / 4.6)


class Layer:
    """One set of experts and a routing, in the layouts the contenders want."""

    def __init__(self, model: str, tokens: int, form: str = "plain", group: int = 0) -> None:
        from moe_offload.cuda_kernels import CudaExperts
        from moe_offload.cuda_pages import ExpertShape, SlabPages
        from moe_offload.pages import PageLayout
        from moe_offload.quantization import specs

        experts, top_k, hidden, inner = MODELS[model]
        dtype = torch.bfloat16
        self.form = form
        transposed = form == "plain" and model in TRANSPOSED
        sizes = {"up": (2 * inner, hidden), "down": (hidden, inner)}
        sections = {}
        for name, (rows, columns) in sizes.items():
            (size, kind), scales = specs(form, rows, columns, dtype, group)
            sections[name] = (size[::-1] if transposed else size), kind
            if scales is not None:
                sections[f"{name}_scales"] = scales
        layout = PageLayout.build(sections)
        self.slab = torch.empty(experts * layout.slot_stride, dtype=torch.uint8, device="cuda")
        self.views = layout.views(self.slab)
        for name, (_, columns) in sizes.items():
            fill(form, self.views[name], self.views.get(f"{name}_scales"), columns)
        if transposed:
            for name in sizes:
                self.views[name] = self.views[name].transpose(1, 2)
        self.gate_up, self.down = self.views["up"], self.views["down"]  # [E, 2F, H], strided
        self.slot_of = torch.arange(experts, dtype=torch.int32, device="cuda")
        self.pages = SlabPages(self.slab, layout.slot_stride, self.slot_of)
        names = {name: name for name in sections}
        options = {"weight_format": form, "group_size": group, "transposed": transposed}
        shape = ExpertShape.of_layout(layout, hidden, inner, dtype, **names, **options)
        self.kernels = CudaExperts(shape, experts)
        self.x = torch.randn(tokens, hidden, device="cuda", dtype=dtype)
        scores = torch.rand(tokens, experts, device="cuda")
        self.weights, self.ids = scores.topk(top_k, dim=-1)
        self.weights = (self.weights / self.weights.sum(-1, keepdim=True)).contiguous()
        flat = self.ids.reshape(-1)
        self.order = torch.argsort(flat, stable=True)
        self.route_of_row = self.order.int()
        self.row_of_route = torch.empty_like(self.route_of_row)
        self.row_of_route[self.order] = torch.arange(len(flat), dtype=torch.int32, device="cuda")
        found, counts = flat.unique(return_counts=True)
        ends = counts.cumsum(0)
        self.groups = torch.stack([ends - counts, ends, found], 1).int().contiguous()
        self.all_ends = torch.bincount(flat, minlength=experts).cumsum(0).int()
        self.bytes = len(found) * layout.payload_bytes
        self.flops = 6 * len(flat) * hidden * inner

    def ours(self) -> Tensor:
        call = self.kernels.begin(self.x, self.weights, self.route_of_row, self.row_of_route)
        call.compute(self.pages, self.groups)
        return call.finish()

    def grouped_mm(self) -> Tensor:
        """transformers' grouped_mm experts with the sort left out, by torch's grouped product."""
        rows = self.x[self.order // self.ids.shape[1]]
        both = torch._grouped_mm(rows, self.gate_up.transpose(1, 2), offs=self.all_ends)
        gate, up = both.chunk(2, -1)
        inner = torch.nn.functional.silu(gate) * up
        y = torch._grouped_mm(inner, self.down.transpose(1, 2), offs=self.all_ends)
        y = y * self.weights.reshape(-1)[self.order, None]
        out = y[self.row_of_route].view(*self.ids.shape, -1).sum(1)
        return out.to(self.x.dtype)

    def batched_mm(self) -> Tensor:
        """transformers' batched_mm experts: gathers the weights of every route."""
        flat = self.ids.reshape(-1)
        x = self.x.repeat_interleave(self.ids.shape[1], 0)[..., None]
        gate, up = torch.bmm(self.gate_up[flat], x).squeeze(-1).chunk(2, -1)
        inner = torch.nn.functional.silu(gate) * up
        y = torch.bmm(self.down[flat], inner[..., None]).squeeze(-1)
        y = y * self.weights.reshape(-1, 1)
        return y.view(*self.ids.shape, -1).sum(1).to(self.x.dtype)

    def matrix(self, name: str, expert: int, dtype: torch.dtype) -> Tensor:
        from moe_offload.quantization import dequantise

        scales = self.views.get(f"{name}_scales")
        codes = self.views[name][expert]
        return dequantise(self.form, codes, None if scales is None else scales[expert], dtype)

    def reference(self, tokens: int, dtype: torch.dtype) -> Tensor:
        """The first tokens by plain loops, in float64 or, for torch's own error, in bf16."""
        out = torch.zeros(tokens, self.x.shape[1], device="cuda", dtype=torch.float64)
        for token in range(tokens):
            for rank, expert in enumerate(self.ids[token].tolist()):
                gate, up = (self.matrix("up", expert, dtype) @ self.x[token].to(dtype)).chunk(2)
                inner = torch.nn.functional.silu(gate) * up
                y = self.matrix("down", expert, dtype) @ inner
                out[token] += y.double() * self.weights[token, rank].double()
        return out


def error_ratio(layer: Layer, work: Work) -> float:
    """Error against float64 over torch's own bf16 error, on up to eight tokens."""
    tokens = min(8, len(layer.x))
    got = work()[:tokens].double()
    exact = layer.reference(tokens, torch.float64)
    own = layer.reference(tokens, torch.bfloat16).to(torch.bfloat16).double()
    return float((got - exact).norm() / (own - exact).norm())


def captured(works: list[Work], repeats: int) -> tuple[Replay, str]:
    """All works in turn, some times over, as one graph's replay; eagerly where not capturable.

    One graph of many calls: the gaps between launches of separate graphs would be timed too.
    """

    def all_works() -> None:
        for _ in range(repeats):
            for work in works:
                work()

    side = torch.cuda.Stream()
    side.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(side):
        all_works()
    torch.cuda.current_stream().wait_stream(side)
    graph = torch.cuda.CUDAGraph()
    try:
        with torch.cuda.graph(graph):
            all_works()
    except RuntimeError:
        torch.cuda.synchronize()
        return all_works, "eager: cannot be captured"
    return graph.replay, "graph"


def prepare(
    layers: list[Layer], name: str, repeats: int
) -> tuple[Row, Callable[[], object] | None]:
    """Check one variant on its first layer; what to time, or None and a note that says why not."""
    try:
        error = error_ratio(layers[0], getattr(layers[0], name))
        if not error <= (1.2 if name == "ours" else 2.0):
            return {"error": error, "note": "WRONG: not timed"}, None
        work, note = captured([getattr(layer, name) for layer in layers], repeats)
    except (RuntimeError, torch.OutOfMemoryError) as problem:
        return {"note": f"cannot run: {str(problem).splitlines()[0][:80]}"}, None
    return {"error": error, "note": note}, work


def run_decode(budget_s: float) -> Iterator[Row]:
    """Token by token count, so that a short run has something of every model."""
    yield from run([(model, tokens, "plain", 0) for tokens in DECODE for model in MODELS], budget_s)


def run_prefill(budget_s: float) -> Iterator[Row]:
    yield from run(
        [(model, tokens, "plain", 0) for tokens in PREFILL for model in MODELS], budget_s
    )


def run_quantised(budget_s: float) -> Iterator[Row]:
    cases = [
        (model, tokens, form, group)
        for tokens in QUANTISED_TOKENS
        for model, form, group in QUANTISED
    ]
    yield from run(cases, budget_s)


def run(cases: list[tuple[str, int, str, int]], budget_s: float) -> Iterator[Row]:
    """(model, tokens, format, group) each; what fails or does not fit the budget is a row too."""
    stop = time.perf_counter() + budget_s
    copy_rate, gemm_rate = roofs()
    yield {"case": "roofs", "gb_s": copy_rate / 1e9, "tflops": gemm_rate / 1e12}
    for model, tokens, form, group in cases:
        name = case_name(model, tokens, form)
        if time.perf_counter() > stop:
            yield {"case": name, "note": "left out: the part's time is up"}
            continue
        try:
            yield from measure(model, tokens, form, group, copy_rate, gemm_rate)
        except Exception as error:  # one case must not cost the others
            yield {"case": name, "note": f"failed: {type(error).__name__}: {str(error)[:200]}"}
        torch.cuda.empty_cache()


def case_name(model: str, tokens: int, form: str) -> str:
    return f"{model} T{tokens}" + ("" if form == "plain" else f" {form}")


def measure(
    model: str, tokens: int, form: str, group: int, copy_rate: float, gemm_rate: float
) -> Iterator[Row]:
    experts, _, hidden, inner = MODELS[model]
    bits = {"plain": 16, "fp8_block": 8}.get(form, 4)
    sets = max(1, min(4, SETS_BYTES * 8 // (experts * 3 * bits * hidden * inner)))
    layers = [Layer(model, tokens, form, group) for _ in range(sets)]
    moved, flops = layers[0].bytes, layers[0].flops
    floor = max(moved / copy_rate, flops / gemm_rate)
    repeats = max(1, int(1e-3 / (floor * sets)))  # a graph of a millisecond or more
    names = ["ours"]
    if form == "plain":  # torch has no grouped product of these quantised formats
        names += ["grouped_mm"] + (["batched_mm"] if tokens <= 8 else [])
    found = {name: prepare(layers, name, repeats) for name in names}
    times: dict[str, list[float]] = {name: [] for name in names}
    for _ in range(12):  # alternating, so that clocks and neighbours treat all alike
        for name, (_, work) in found.items():
            if work is not None:
                times[name].append(median_seconds([work], 1) / (repeats * sets))
    for name, (row, work) in found.items():
        case = case_name(model, tokens, form)
        row = {"case": case, "variant": name, "floor_us": floor * 1e6, **row}
        if work is not None:
            ordered = sorted(times[name][1:])
            seconds = statistics.median(ordered)
            row |= {
                "us": seconds * 1e6,
                "us_p10": ordered[1] * 1e6,
                "us_p90": ordered[-2] * 1e6,
                "floor_percent": 100 * floor / seconds,
                "gb_s": moved / seconds / 1e9,
                "tflops": flops / seconds / 1e12,
                "sets": sets,
            }
        yield row
