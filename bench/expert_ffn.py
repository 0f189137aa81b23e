"""The expert FFN kernels beside their peers, one layer with all weights in memory, bf16.

Per number of tokens, every contender is first compared with fp64 on sampled tokens; one whose error
exceeds 1.2 x that of transformers' grouped_mm prints no time. Then rounds: each contender once per
round, in random order after a pause, each call with its own draw of tokens and experts, so that
nobody finds the weights another has just pulled into the cache. A short call follows 40 ms of
untimed ones on other experts, as in a model's decode loop: after a pause of 60 ms a call of one
token took 3.1 ms, and 2.4, as in a loop without pauses, only after some 30 ms of calls. Each round
also reads memory once through, in pages of 2 MiB and of 4 KiB (where torch, and so everybody but
the paged layer, has the weights): on a shared machine that rate drifts by 1.7 times within minutes
(35 to 60 GB/s seen), so a row is held against the median of the reads between its own calls. So are
multiply-adds from registers and torch's product of the shape that was its fastest at first: beside
other guests AMX ran at a third of its rate for seconds. What would take a peer longer than 20 s a
call is not run, and said.

    python bench/expert_ffn.py                     # all shapes
    python bench/expert_ffn.py --shape olmoe       # one; results of the others are kept
    python bench/expert_ffn.py --quick             # toy sizes: does it run?

Cost of a call: distinct experts x 6 H F bytes, 6 T A H F floating-point operations.
"""

from __future__ import annotations

import argparse
import json
import random
import time
from collections.abc import Callable, Sequence
from typing import Any

import torch
from ffn_contenders import Contender, Shape, contenders
from harness import (
    RESULTS,
    Row,
    environment,
    machine_name,
    median,
    pin_to_cores,
    print_table,
    save,
    spread,
)
from roofs import memory_reader, multiply_peak
from torch import Tensor

from moe_offload import reference
from moe_offload.activations import Activation

SHAPES = {
    "tiny": Shape("packaged tiny model", 256, 64, 4, 32),
    "qwen3": Shape("Qwen3-30B-A3B", 2048, 768, 8, 64),
    "olmoe": Shape("OLMoE", 2048, 1024, 8, 64),
    "mixtral": Shape("Mixtral", 4096, 14336, 2, 4),
    "gpt_oss": Shape("gpt-oss", 2880, 2880, 4, 16, gpt_oss=True),
}
TOKENS = (1, 4, 16, 64, 256, 1024, 4096)
QUICK = {
    "quick": Shape("toy", 64, 32, 2, 4),
    "quick_gpt_oss": Shape("toy gpt-oss", 64, 32, 2, 4, gpt_oss=True),
}
SILU = Activation("silu")
SAMPLED_TOKENS = 16
WARMED_TOKENS = 16  # calls of up to so many tokens take milliseconds: waking up would show
WARM_SECONDS = 0.04
ERROR_FACTOR = 1.2
SLOWEST_SECONDS = 20.0  # of a call; torch's bf16 products where there are no instructions for them
ROOFS = ("memory_gb_per_s", "memory_4k_gb_per_s", "multiply_tflops", "gemm_tflops")
BASE = "transformers grouped_mm"  # errors are told in units of its own

COLUMNS = {
    "contender": "contender",
    "tokens": "T",
    "us": "us",
    "gb_per_s": "GB/s",
    "memory_roof": "% read",
    "memory_4k_roof": "% read 4K",
    "tflops": "TFLOP/s",
    "gemm_roof": "% mm",
    "multiply_roof": "% peak",
    "speedup": "x fastest peer",
    "error": "error / grouped_mm's",
}


def gemm_roof(
    sizes: Sequence[tuple[int, int, int]], dtype: torch.dtype, repeats: int
) -> tuple[Row, Callable[[], float]]:
    """The fastest of torch's own products [M, K] x [K, N], weights row-major or transposed.

    And a function that computes the fastest three once more and returns the best TFLOP/s.
    """
    best: Row = {"tflops": 0.0}
    tried: list[tuple[float, Tensor, Tensor]] = []
    for m, k, n in sizes:
        if best["tflops"] and 2 * m * k * n / best["tflops"] / 1e12 > 1:
            continue  # a second each; smaller ones have told enough
        a, b = torch.randn(m, k).to(dtype), torch.randn(k, n).to(dtype)
        bt = b.t().contiguous().t()
        for layout, right in (("k x n", b), ("n x k transposed", bt)):
            rate = max(product_rate(a, right) for _ in range(1 + repeats))
            tried.append((rate, a, right))
            if rate > best["tflops"]:
                best = {"tflops": rate, "m": m, "k": k, "n": n, "layout": layout}
    fastest = sorted(tried, key=lambda one: -one[0])[:3]
    return best, lambda: max(product_rate(a, b) for _, a, b in fastest)


def product_rate(a: Tensor, b: Tensor) -> float:
    """TFLOP/s of torch.mm."""
    start = time.perf_counter()
    torch.mm(a, b)
    return 2 * a.shape[0] * b.numel() / (time.perf_counter() - start) / 1e12


def draw(shape: Shape, tokens: int, seed: int) -> tuple[Tensor, Tensor, Tensor]:
    """Random tokens, each routed to A distinct experts chosen uniformly.

    One token's experts are consecutive ones of a fixed permutation, so that draws of seeds in a row
    have none in common.
    """
    generator = torch.Generator().manual_seed(seed)
    hidden = torch.randn(tokens, shape.hidden, generator=generator).bfloat16()
    if tokens == 1:
        order = torch.randperm(shape.experts, generator=torch.Generator().manual_seed(0))
        ids = order.roll(-seed * shape.top_k)[: shape.top_k][None].contiguous()
    else:
        scores = torch.rand(tokens, shape.experts, generator=generator)
        ids = scores.topk(shape.top_k, dim=-1).indices
    topk = torch.rand(tokens, shape.top_k, generator=generator) + 0.1
    return hidden, ids, (topk / topk.sum(-1, keepdim=True)).bfloat16().float()


def errors(
    running: Sequence[Contender],
    base: Contender,
    shape: Shape,
    tokens: int,
    gate_up: Tensor,
    down: Tensor,
) -> dict[str, float]:
    """Root mean square error of sampled tokens against fp64, by contender and of `base`."""
    hidden, ids, topk = draw(shape, tokens, seed=10_000 + tokens)
    sample = torch.linspace(0, tokens - 1, min(tokens, SAMPLED_TOKENS)).long()
    act = Activation("clamped_swiglu", True, 1.702, 7.0, 1.0) if shape.gpt_oss else SILU
    got = {one.name: one.run(hidden, ids, topk)[sample].double() for one in running}
    if base.name not in got:  # too slow for all tokens
        got[base.name] = base.run(hidden[sample], ids[sample], topk[sample]).double()
    exact = reference.expert_ffn(hidden[sample], gate_up, down, ids[sample], topk[sample], act)
    return {name: float((out - exact).square().mean().sqrt()) for name, out in got.items()}


def measure(
    running: Sequence[Contender],
    shape: Shape,
    tokens: int,
    seconds: float,
    least: int,
    readers: Sequence[Callable[[], float]],
) -> tuple[dict[str, list[float]], dict[str, list[int]], list[list[float]]]:
    """Seconds and distinct experts of every call, by contender; by reader, each round's rate."""
    times: dict[str, list[float]] = {one.name: [] for one in running}
    distinct: dict[str, list[int]] = {one.name: [] for one in running}
    draws = [draw(shape, tokens, seed) for seed in range(8 if tokens <= 256 else 2)]
    end = time.perf_counter() + seconds
    order, call, rounds = random.Random(tokens), 0, 0
    memory: list[list[float]] = [[] for _ in readers]
    # Other libraries' threads spin after a call; without a pause whoever comes next loses a core
    # (measured: our kernels took 1.5 to 2 x as long right after kt-kernel).
    pause = min(0.1, seconds / 50)
    while rounds < least or (time.perf_counter() < end and rounds < 200):
        for one in order.sample(running, len(running)):  # a rotation keeps everyone's neighbours
            time.sleep(pause)
            awake = time.perf_counter() + WARM_SECONDS
            while tokens <= WARMED_TOKENS:
                one.run(*draws[call % len(draws)])
                call += 1
                if time.perf_counter() >= awake:
                    break
            inputs = draws[call % len(draws)]
            call += 1
            start = time.perf_counter()
            one.run(*inputs)
            times[one.name].append(time.perf_counter() - start)
            distinct[one.name].append(int(inputs[1].unique().numel()))
        time.sleep(pause)
        for read, rates in zip(readers, memory, strict=True):
            read()
            rates.append(read())
        rounds += 1
    return times, distinct, memory


def run_shape(shape: Shape, tokens: Sequence[int], seconds: float, least: int, quick: bool) -> Row:
    """All rows of one shape, with the roofs measured between them."""
    torch.manual_seed(0)
    scale = shape.hidden**-0.5
    gate_up = torch.randn(shape.experts, 2 * shape.inner, shape.hidden).mul_(scale).bfloat16()
    down = torch.randn(shape.experts, shape.hidden, shape.inner).mul_(shape.inner**-0.5).bfloat16()
    everyone, absent = contenders(shape, gate_up, down)
    buffer = 1 << 24 if quick else 1 << 29
    sizes = [(64, 64, 64)] if quick else [(1024,) * 3, (2048,) * 3, (3072,) * 3, (2048, 4096, 2048)]
    readers = [memory_reader(buffer, huge_pages=huge) for huge in (True, False)]
    readers.append(lambda: multiply_peak("bfloat16", 0.001 if quick else 0.01, repeats=1))
    gemm, product = gemm_roof(sizes, torch.bfloat16, 2)
    readers.append(product)
    rates: dict[int, list[list[float]]] = {}
    rows: list[Row] = []
    skipped = list(absent)
    base = next(one for one in everyone if one.name == BASE)
    last: dict[str, tuple[int, float]] = {}  # tokens and seconds of the largest call so far
    for count in tokens:
        running = []
        for one in everyone:
            reason = one.skip(count)
            if one.peer and one.name in last:
                expected = last[one.name][1] * count / last[one.name][0]
                if expected > SLOWEST_SECONDS:
                    reason = f"it would take about {expected:.0f} s a call"
            if reason is None:
                running.append(one)
            else:
                skipped.append(f"{one.name} at T = {count}: {reason}")
        error = errors(running, base, shape, count, gate_up, down)
        timed = measure(running, shape, count, seconds, least, readers)
        times, distinct, rates[count] = timed
        last.update({name: (count, median(taken)) for name, taken in times.items()})
        for one in running:
            row = {"shape": shape.name, "contender": one.name, "tokens": count, "peer": one.peer}
            row["error"] = error[one.name] / error[BASE]
            row["rms_error"] = error[one.name]
            if row["error"] <= ERROR_FACTOR or one.peer:  # a peer's precision is its own affair
                row["us"] = spread(1e6 * t for t in times[one.name])
                row["rounds"] = len(times[one.name])
                row["distinct_experts"] = median(distinct[one.name])
            rows.append(row)
    roofs = {
        "gemm": gemm,
        **{
            name: {T: spread(found[i]) for T, found in rates.items()}
            for i, name in enumerate(ROOFS)
        },
    }
    for row in rows:
        finish(row, rows, shape, roofs)
    return {"roofs": roofs, "rows": rows, "skipped": skipped}


def finish(row: Row, rows: Sequence[Row], shape: Shape, roofs: Row) -> None:
    """Rates, shares of the roofs, and the factor to the fastest peer at the same size."""
    if "us" not in row:
        return
    us = row["us"]["median"]
    flops = 6 * row["tokens"] * shape.top_k * shape.hidden * shape.inner
    row["gb_per_s"] = row["distinct_experts"] * shape.expert_bytes / us / 1e3
    row["tflops"] = flops / us / 1e6
    for pages in ("memory", "memory_4k"):
        roof = roofs[f"{pages}_gb_per_s"][row["tokens"]]["median"]
        row[f"{pages}_roof"] = 100 * row["gb_per_s"] / roof
    for name in ("gemm", "multiply"):
        roof = roofs[f"{name}_tflops"][row["tokens"]]["median"]
        row[f"{name}_roof"] = 100 * row["tflops"] / roof
    peers = [
        other["us"]["median"]
        for other in rows
        if other["peer"] and other["tokens"] == row["tokens"] and other is not row
    ]
    row["speedup"] = min(peers) / us if peers else None


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--shape", choices=SHAPES, action="append", help="default: all of them")
    parser.add_argument("--tokens", type=int, action="append", help="default: 1 to 4096")
    parser.add_argument("--seconds", type=float, default=5.0, help="per number of tokens")
    parser.add_argument("--rounds", type=int, default=3, help="at least")
    parser.add_argument("--quick", action="store_true")
    parser.add_argument("--no-save", action="store_true")
    arguments = parser.parse_args()
    torch.set_num_threads(len(pin_to_cores(2)))
    shapes = QUICK if arguments.quick else {key: SHAPES[key] for key in arguments.shape or SHAPES}
    tokens = arguments.tokens or ((1, 20) if arguments.quick else TOKENS)
    results: Row = {}
    path = RESULTS / machine_name() / "expert_ffn.json"
    if path.exists() and not arguments.quick:
        results = json.loads(path.read_text())  # other shapes' results stay
    with torch.no_grad():
        for key, shape in shapes.items():
            where = environment()
            seconds = 0.05 if arguments.quick else arguments.seconds
            found = run_shape(shape, tokens, seconds, arguments.rounds, arguments.quick)
            results[key] = {"environment": where, **found}
            report(shape, found)
            if not arguments.quick and not arguments.no_save:
                save("expert_ffn", results)


def report(shape: Shape, found: dict[str, Any]) -> None:
    medians = {
        name: [row["median"] for row in found["roofs"][name].values() if row] for name in ROOFS
    }
    low_high = {name: f"{min(all_):.3g} to {max(all_):.3g}" for name, all_ in medians.items()}
    title = (
        f"{shape.name}: H {shape.hidden}, F {shape.inner}, top-{shape.top_k} of {shape.experts} "
        f"experts, bf16. Roofs: {low_high['memory_gb_per_s']} GB/s read in pages of 2 MiB, "
        f"{low_high['memory_4k_gb_per_s']} of 4 KiB; {low_high['gemm_tflops']} TFLOP/s torch.mm, "
        f"{low_high['multiply_tflops']} from registers"
    )
    print_table(found["rows"], COLUMNS, title)
    for reason in found["skipped"]:
        print(f"  not run: {reason}")


if __name__ == "__main__":
    main()
