"""From turns to rows and targets: what end_to_end.py prints, and how each number is defined.

Round 0 of a comparison warms up and is left out everywhere but in the token check. Rates are
medians over rounds; bytes and counts are sums. A target keeps its definition in a comment beside
its arithmetic, so that nobody has to guess what "85 % of the disk" means.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from typing import Any

from checkpoints import Spec
from comparison import Comparison
from harness import Row, median, print_table, spread

PAGED, ACCELERATE = "moe_offload 25%", "accelerate disk"
DEMAND = "moe_offload 25%, predictor none"  # every page it reads is one that was missing
FULL, RESIDENT = "moe_offload 100%", "transformers resident"
ALLOWANCE_BYTES = 400_000_000  # what a process may hold beyond dense weights and budget


def check_tokens(comparisons: list[Comparison]) -> int:
    """All contenders, prompt by prompt, against the resident model; returns tokens compared.

    moe_offload against the resident model on the same expert kernels, the others against it as
    transformers ships it.
    """
    turns = {name: rows for comparison in comparisons for name, rows in comparison.turns.items()}
    compared = 0
    for name, rows in turns.items():
        for number, (row, reference) in enumerate(zip(rows, turns[RESIDENT], strict=False)):
            ours = name in (PAGED, DEMAND, FULL)
            got, expected = row["tokens"], reference["same_kernel_tokens" if ours else "tokens"]
            length = min(len(got), len(expected))
            if got[:length] != expected[:length]:
                raise SystemExit(
                    f"WRONG TOKENS, so no times: {name}, prompt {number}: expected "
                    f"{expected[:length]}, got {got[:length]}"
                )
            compared += length if name != RESIDENT else 0
    return compared


def best_disk(roofs: list[Row], kind: str = "disk") -> Row:
    """The engine, chunk size and depth with the highest median over rounds: the disk's roof.

    Of kind "disk" it reads into one buffer again and again, of kind "disk_to_memory" into memory
    far larger than the caches, as anybody must who keeps what he reads.
    """
    samples: dict[tuple[str, int, int], list[float]] = {}
    for roof in roofs:
        for row in roof[kind]:
            setting = (row["engine"], row["chunk_bytes"], row["depth"])
            samples.setdefault(setting, []).append(row["gb_per_s"])
    (engine, chunk, depth), rates = max(samples.items(), key=lambda item: median(item[1]))
    return {"engine": engine, "chunk_bytes": chunk, "depth": depth, "gb_per_s": spread(rates)}


def summarise(comparison: Comparison, spec: Spec) -> list[Row]:
    """One row per contender; medians over the rounds after the first."""
    disk_gb_per_s = best_disk(comparison.roofs[1:])["gb_per_s"]["median"]
    memory_gb_per_s = median(roof["memory_gb_per_s"] for roof in comparison.roofs[1:])
    rows = []
    for name, turns in comparison.turns.items():
        turns = turns[1:]
        tokens = sum(len(turn["decode_s"]) for turn in turns)
        prompt_rate = [turn["prompt_tokens"] / turn["prefill_s"] for turn in turns]
        rate = [len(turn["decode_s"]) / sum(turn["decode_s"]) for turn in turns]
        row: Row = {
            "contender": name,
            "decode_tokens_per_s": spread(rate),
            "prefill_tokens_per_s": spread(prompt_rate),
            "disk_mb_per_token": sum(t["decode"]["disk_read_bytes"] for t in turns) / tokens / 1e6,
            "peak_rss_mb": comparison.memory[name]["peak"] / 1e6,
            "load_s": comparison.loads[name]["seconds"],
        }
        # What a decoded token must at least read from memory: active experts and dense matrices.
        active = spec.num_layers * spec.top_k * spec.page_bytes
        embedding = spec.vocab * spec.hidden * 2
        weight_bytes = active + spec.dense_bytes - embedding
        row["memory_gb_per_s"] = median(rate) * weight_bytes / 1e9
        row["memory_roof_percent"] = 100 * row["memory_gb_per_s"] / memory_gb_per_s
        if turns[0]["decode"]["stats"] is not None:
            row.update(_paging_row(turns, tokens, spec.page_bytes, disk_gb_per_s))
            # The least a token can take: its missing bytes from disk or all its weights from
            # memory, whichever takes longer.
            disk_ms = row["needed_mb_per_token"] / disk_gb_per_s
            row["bound_ms_per_token"] = max(disk_ms, weight_bytes / memory_gb_per_s / 1e6)
        rows.append(row)
    return rows


def _paging_row(turns: list[Row], tokens: int, page_bytes: int, disk_gb_per_s: float) -> Row:
    """What the pager says about decode, and how near to the disk's roof it read."""
    stats = [turn["decode"]["stats"] for turn in turns]

    def total(name: str) -> float:
        return float(sum(row[name] for row in stats))

    row: Row = {
        "hit_percent": 100 * total("hits") / total("lookups"),
        "slots": stats[0]["num_slots"],
        "pages_per_token": total("lookups") / tokens,
        "demand_mb_per_token": total("demand_bytes") / tokens / 1e6,
        "needed_mb_per_token": sum(missing_bytes(row, page_bytes) for row in stats) / tokens / 1e6,
        "prefetch_used_mb_per_token": total("prefetch_bytes_used") / tokens / 1e6,
        "prefetch_wasted_mb_per_token": total("prefetch_bytes_wasted") / tokens / 1e6,
        "stall_ms_per_token": 1e3 * total("stall_seconds") / tokens,
        "decode_ms_per_token": 1e3 * sum(sum(turn["decode_s"]) for turn in turns) / tokens,
    }
    for phase in ("decode", "prefill"):
        rates = [
            _moved(turn[phase]["stats"]) / turn[phase]["copies"]["busy_s"] / 1e9
            for turn in turns
            if turn[phase]["copies"]["busy_s"] > 0
        ]
        if rates:
            row[f"{phase}_gb_per_s"] = spread(rates)
            row[f"{phase}_disk_roof_percent"] = 100 * median(rates) / disk_gb_per_s
    return row


def _moved(stats: Row) -> float:
    names = ("demand_bytes", "prefetch_bytes_used", "prefetch_bytes_wasted")
    return float(sum(stats[name] for name in names))


def missing_bytes(stats: Row, page_bytes: int) -> int:
    """Of pages that were used and had to come from disk, demanded or fetched ahead."""
    names = ("demand_misses", "joined_prefetches", "prefetch_hits")
    return page_bytes * sum(int(stats[name]) for name in names)


def check_targets(
    quarter: Comparison, whole: Comparison, rows: Mapping[str, Row], spec: Spec
) -> list[Row]:
    """Each promised number: what was measured, the limit, and whether it is kept."""
    targets: list[Row] = []

    def target(name: str, value: float, limit: float, at_most: bool, note: str) -> None:
        kept = value <= limit if at_most else value >= limit
        bound = f"{'<=' if at_most else '>='} {limit:g}"
        targets.append({"target": name, "value": value, "bound": bound, "kept": kept, "note": note})

    paged, full = quarter.turns[PAGED][1:], whole.turns[FULL][1:]
    demand = quarter.turns[DEMAND][1:]

    # Bytes the kernel read for this process, and bytes the pager counted, over the bytes of the
    # pages that were missing; more than 1 is alignment, read-ahead, a page read twice, or (with a
    # predictor) one that was fetched ahead for nothing or stopped on its way.
    for name, turns in ((DEMAND, demand), (PAGED, paged)):
        stats = [turn["decode"]["stats"] for turn in turns]
        missing = sum(missing_bytes(row, spec.page_bytes) for row in stats)
        wasted = rows[name]["prefetch_wasted_mb_per_token"]
        note = f"{wasted:.1f} MB a token fetched ahead for nothing" if name == PAGED else ""
        for source, read in (
            ("/proc/self/io", sum(turn["decode"]["disk_read_bytes"] for turn in turns)),
            ("disk_bytes", sum(row["disk_bytes"] for row in stats)),
        ):
            what = f"{name}: decode, disk bytes / missing bytes, {source}"
            target(what, read / missing, 1.05, True, note)
    steady = sum(t[phase]["disk_read_bytes"] for t in full for phase in ("prefill", "decode"))
    target("100%: disk bytes in steady state", steady, 0, True, "prefill and decode")

    # Medians of rounds; the same tokens from both (check_tokens). What bounds it: both wait for
    # the same disk, so the ratio of the bytes they read times our distance to the disk's roof.
    rate = {name: row["decode_tokens_per_s"]["median"] for name, row in rows.items()}
    bytes_ratio = rows[ACCELERATE]["disk_mb_per_token"] / rows[PAGED]["disk_mb_per_token"]
    note = f"identical tokens; it reads {bytes_ratio:.1f} x the bytes"
    for wanted in (5, 10):
        target("decode, 25%: x accelerate", rate[PAGED] / rate[ACCELERATE], wanted, False, note)
    for name in (PAGED, DEMAND):
        row = rows[name]
        beyond = row["decode_ms_per_token"] / row["bound_ms_per_token"]
        note = f"{row['decode_ms_per_token']:.0f} ms of at least {row['bound_ms_per_token']:.0f}"
        target(f"{name}: decode, time per token / bound", beyond, 1.15, True, note)

    # Without a predictor: demand bytes over the time in which a demand copy was under way or the
    # model waited for one, over the fastest O_DIRECT setting of the same rounds.
    # Held against the roof into one buffer; the note says what it is of the roof into memory.
    to_memory = best_disk(quarter.roofs[1:], "disk_to_memory")["gb_per_s"]["median"]
    for phase in ("decode", "prefill"):
        speed = rows[DEMAND][f"{phase}_gb_per_s"]["median"]
        note = f"{speed:.2f} GB/s, {100 * speed / to_memory:.0f} % of reads into memory"
        share = rows[DEMAND][f"{phase}_disk_roof_percent"] / 100
        for wanted in (0.85, 0.92):
            target(f"{phase}, 25%: demand reads / disk roof", share, wanted, False, note)

    # A layer is one request of distinct pages, so each page may be missing once per prefill.
    prefill = [turn["prefill"]["stats"] for turn in paged]
    read = sum(stats["disk_bytes"] for stats in prefill)
    needed = sum(missing_bytes(stats, spec.page_bytes) for stats in prefill)
    calls = max(stats["acquires"] for stats in prefill)
    note = f"{calls} requests for {spec.num_layers} layers"
    target("prefill, 25%: disk bytes / missing bytes", read / needed, 1.01, True, note)
    # Percentage points: the tokens after a prompt against those before it (of the round before).
    after = _hit_percent(turn["decode_begin"] for turn in quarter.turns[DEMAND][1:])
    before = _hit_percent(turn["decode_end"] for turn in quarter.turns[DEMAND][:-1])
    note = f"{before:.1f} % before, {after:.1f} % after"
    target("decode, 25%: hit rate after a prompt - before it", after - before, -3, False, note)

    # Paired per round (same prompt, seconds apart), then the median.
    timed: dict[str, Callable[[Row], Any]] = {
        "decode": lambda turn: sum(turn["decode_s"]),
        "prefill": lambda turn: turn["prefill_s"],
    }
    for phase, seconds in timed.items():
        pairs = zip(whole.turns[RESIDENT][1:], full, strict=True)
        ratios = spread(seconds(resident) / seconds(ours) for resident, ours in pairs)
        note = f"p10 {ratios['p10']:.3f}, p90 {ratios['p90']:.3f}"
        target(f"{phase}, 100%: x resident", ratios["median"], 1.0, False, note)

    # VmHWM less the weights it may hold. Python, torch and transformers are inside the 400 MB, and
    # so are a long prompt's activations and KV cache, which is why there are two rows; the note
    # says what plain transformers holds beyond its weights after the same prompts.
    for comparison, name, budget in (
        (quarter, PAGED, spec.expert_bytes // 4),
        (whole, FULL, spec.expert_bytes),
    ):
        imports = comparison.loads[name]["imports_memory_bytes"]["now"] / 1e6
        for when, memory, resident in (
            ("a short prompt", comparison.memory_at_first, whole.memory_at_first),
            ("long prompts", comparison.memory, whole.memory),
        ):
            beyond = memory[name]["peak"] - spec.dense_bytes - budget
            plain = resident[RESIDENT]["peak"] - spec.dense_bytes - spec.expert_bytes
            note = f"{imports:.0f} before loading; transformers resident: {plain / 1e6:.0f}"
            target(
                f"{comparison.budget}: peak RSS beyond weights, MB, after {when}",
                beyond / 1e6,
                400,
                True,
                note,
            )

    # Bytes the kernel read while loading from a cold page cache.
    load = quarter.loads[PAGED]
    dense_read = load["disk_read_bytes"] - load["stats"]["disk_bytes"]
    target("load, 25%: bytes read / dense bytes", dense_read / spec.dense_bytes, 1.01, True, "")
    load = whole.loads[FULL]
    expert_read = load["disk_read_bytes"] - spec.dense_bytes
    target(
        "load, 100%: bytes read beyond dense / expert bytes",
        expert_read / spec.expert_bytes,
        1.01,
        True,
        "",
    )
    return targets


def _hit_percent(stats: Iterable[Row]) -> float:
    rows = list(stats)
    return 100 * sum(row["hits"] for row in rows) / sum(row["lookups"] for row in rows)


COLUMNS = {
    "contender": "contender",
    "decode_tokens_per_s": "decode tok/s",
    "prefill_tokens_per_s": "prefill tok/s",
    "hit_percent": "hit %",
    "slots": "slots",
    "pages_per_token": "pages/tok",
    "disk_mb_per_token": "disk MB/tok",
    "stall_ms_per_token": "stall ms/tok",
    "prefetch_used_mb_per_token": "ahead, used",
    "prefetch_wasted_mb_per_token": "ahead, wasted",
    "decode_gb_per_s": "read GB/s",
    "decode_disk_roof_percent": "% disk roof",
    "memory_roof_percent": "% mem roof",
    "peak_rss_mb": "peak RSS MB",
}


def show(comparison: Comparison, rows: list[Row]) -> None:
    """Print one comparison's rows with the roofs of its rounds."""
    disk = best_disk(comparison.roofs[1:])
    to_memory = best_disk(comparison.roofs[1:], "disk_to_memory")["gb_per_s"]["median"]
    memory = median(roof["memory_gb_per_s"] for roof in comparison.roofs[1:])
    print_table(rows, COLUMNS, f"Budget {comparison.budget}; {comparison.isolation}")
    setting = f"{disk['engine']}, {disk['chunk_bytes'] >> 10} KiB x {disk['depth']}"
    print(
        f"  roofs: disk {disk['gb_per_s']['median']:.2f} GB/s (O_DIRECT, {setting}; "
        f"into memory {to_memory:.2f}), "
        f"memory {memory:.1f} GB/s"
    )
