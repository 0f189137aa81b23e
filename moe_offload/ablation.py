"""`moe-offload ablate`: the same prompts with each predictor and without, side by side.

Every run starts from the same cache (emptied, then warmed by the first prompt), runs are
interleaved, and every run's tokens are compared with those without a predictor before a number is
shown. Demand bytes and stalls are differences between measured runs, not estimates: pages that a
prefetch pushed out and that had to be fetched again are in them.
"""

from __future__ import annotations

import argparse
import functools
import json
import statistics
import time
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch

from moe_offload.config import format_bytes
from moe_offload.console import aligned, progress
from moe_offload.errors import MoEOffloadError, PredictorError
from moe_offload.huggingface.attach import get_offloader
from moe_offload.huggingface.observe import observe
from moe_offload.predictors import make_predictor
from moe_offload.predictors.base import Predictor
from moe_offload.predictors.oracle import CallRecorder, Oracle

Inputs = dict[str, Any]
Row = dict[str, Any]
Factory = Callable[[], Predictor | None]

DEFAULT = ("previous", "lookahead", "lookahead-2", "lookahead-3")


class AblationError(MoEOffloadError, AssertionError):
    """A predictor changed the tokens. This is a bug in moe_offload; please report it."""


def ablate(
    model: Any,
    prompts: Sequence[Inputs],
    predictors: Mapping[str, Factory],
    *,
    max_new_tokens: int = 64,
    repeats: int = 3,
) -> list[Row]:
    """Measure predictors on an offloaded model.

    Args:
        model: offloaded; its predictor, if any, is replaced and taken off at the end.
        prompts: keyword arguments of `generate`, input_ids [B, T] each; the first also warms up.
        predictors: name to a function that makes one. "none" and the oracle are added.
        max_new_tokens: greedy tokens per prompt, end-of-text ignored.
        repeats: interleaved runs of each; times are medians, counts are of the last run.

    Returns:
        One row per predictor, "none" first and "oracle" last, JSON-ready.

    Raises:
        AblationError: tokens differ from those without a predictor.
    """
    offloader = get_offloader(model)
    recorder = CallRecorder()

    def run(predictor: Predictor | None) -> tuple[list[torch.Tensor], float, Row]:
        offloader.predict_with(model, predictor)
        _empty(offloader)
        _generate(model, prompts[0], max_new_tokens)
        offloader.reset_stats()
        begin = time.perf_counter()
        tokens = [_generate(model, prompt, max_new_tokens) for prompt in prompts]
        seconds = time.perf_counter() - begin
        return tokens, seconds, offloader.stats()

    with observe(model, recorder):
        reference, _, _ = run(None)
    makers: dict[str, Factory] = {
        "none": lambda: None,
        **predictors,
        "oracle": lambda: Oracle(recorder.calls),
    }
    seconds: dict[str, list[float]] = {name: [] for name in makers}
    stats: dict[str, Row] = {}
    with progress(total=repeats * len(makers), desc="Ablation", unit="run") as bar:
        for name, make in [*makers.items()] * repeats:
            tokens, taken, stats[name] = run(make())
            if not all(map(torch.equal, tokens, reference)):
                offloader.predict_with(model, None)
                raise AblationError(f"ablate: {name} changed the tokens")
            seconds[name].append(taken)
            bar.update()
    offloader.predict_with(model, None)
    generated = sum(
        int(out.numel() - prompt["input_ids"].numel())
        for out, prompt in zip(reference, prompts, strict=True)
    )
    return [
        _row(name, stats[name], stats["none"], statistics.median(seconds[name]), generated)
        for name in makers
    ]


def _empty(offloader: Any) -> None:
    for pool in offloader.pools:
        pool.resize(pool.num_slots)


def _generate(model: Any, prompt: Inputs, max_new_tokens: int) -> torch.Tensor:
    with torch.no_grad():
        out: torch.Tensor = model.generate(
            **prompt,
            max_new_tokens=max_new_tokens,
            min_new_tokens=max_new_tokens,
            do_sample=False,
        )
    return out


def _row(name: str, stats: Row, none: Row, seconds: float, generated: int) -> Row:
    predictor = stats["predictor"] or {}
    moments = predictor.get("recall", {})
    best = max(moments.values(), key=lambda found: found["recall_at_top_k"], default=None)
    saved = none["demand_bytes"] - stats["demand_bytes"]
    return {
        "predictor": name,
        "tokens_per_second": generated / seconds,
        "recall_at_top_k": None if best is None else best["recall_at_top_k"],
        "recall_at_candidates": None if best is None else best["recall_at_candidates"],
        "candidates": None if best is None else best["candidates"],
        "hit_rate": stats["hit_rate"],
        "hit_rate_without_prefetch": stats["hit_rate_without_prefetch"],
        "demand_bytes": stats["demand_bytes"],
        "prefetch_bytes_used": stats["prefetch_bytes_used"],
        "prefetch_bytes_wasted": stats["prefetch_bytes_wasted"],
        "demand_bytes_saved": saved,
        "net_bytes_saved": saved - stats["prefetch_bytes_wasted"],
        "bytes_moved": stats["demand_bytes"]
        + stats["prefetch_bytes_used"]
        + stats["prefetch_bytes_wasted"],
        "stall_seconds": stats["stall_seconds"],
        "stall_seconds_removed": none["stall_seconds"] - stats["stall_seconds"],
        "predictor_ms_per_token": 1e3 * predictor.get("seconds", 0.0) / generated,
        "predictor_share_of_step": predictor.get("share_of_step", 0.0),
        "seconds": seconds,
        "generated_tokens": generated,
        "recall": moments,
        "tokens_identical": True,
    }


COLUMNS = {
    "predictor": "predictor",
    "recall": "recall@A",
    "recall_deep": "@A+m",
    "used": "used",
    "wasted": "wasted",
    "saved": "demand saved",
    "net": "net saved",
    "stall": "stall s",
    "cost": "ms/token",
    "speed": "tokens/s",
}


def table(rows: Sequence[Row]) -> str:
    """The rows as text."""
    lines = [list(COLUMNS.values())]
    for row in rows:
        known = row["recall_at_top_k"] is not None
        lines.append(
            [
                row["predictor"],
                f"{100 * row['recall_at_top_k']:.1f} %" if known else "-",
                f"{100 * row['recall_at_candidates']:.1f} %" if known else "-",
                format_bytes(row["prefetch_bytes_used"]),
                format_bytes(row["prefetch_bytes_wasted"]),
                format_bytes(row["demand_bytes_saved"]),
                format_bytes(row["net_bytes_saved"]),
                f"{row['stall_seconds']:.3f}",
                f"{row['predictor_ms_per_token']:.2f}",
                f"{row['tokens_per_second']:.1f}",
            ]
        )
    return "\n".join(aligned(lines))


def bound(rows: Sequence[Row], num_layers: int, page_bytes: int) -> Row:
    """What the run without a predictor allows: how many pages fit behind one layer.

    A page prefetched one layer ahead is hidden as far as its copy fits into the time a layer
    takes without stalls; per missed page the model waits `stall_ms_per_miss`.
    """
    none = rows[0]
    steps = none["generated_tokens"]
    misses = none["demand_bytes"] / page_bytes
    layer_seconds = (none["seconds"] - none["stall_seconds"]) / steps / num_layers
    per_miss = none["stall_seconds"] / misses if misses else 0.0
    return {
        "layer_ms_without_stall": 1e3 * layer_seconds,
        "stall_ms_per_miss": 1e3 * per_miss,
        "misses_per_layer": misses / steps / num_layers,
        "pages_per_layer_time": layer_seconds / per_miss if per_miss else None,
        "stall_share": none["stall_seconds"] / none["seconds"],
        "largest_gain": none["seconds"] / (none["seconds"] - none["stall_seconds"]),
    }


def command(args: argparse.Namespace) -> int:
    """The command line's `ablate`."""
    import moe_offload
    from moe_offload.cli_generate import encode, load_tokenizer, quiet, resolve_model
    from moe_offload.models import tiny_moe_path

    quiet()
    path = resolve_model(args.model)
    names = args.predictor or [*DEFAULT, *_packaged(path)]
    for name in names:
        made = make_predictor(name, path)  # a wrong name fails before the model is loaded
        if made is not None and made.lossy:
            raise PredictorError(f"ablate: {name} changes tokens, and ablate compares them")
    model = moe_offload.from_pretrained(path, device_budget=args.device_budget, policy=args.policy)
    tokenizer = load_tokenizer(path)
    texts = args.prompt or _prompts(tiny_moe_path().parent / "prompts.json")
    prompts = [encode(tokenizer, text, model.config, args.max_new_tokens) for text in texts]
    makers: dict[str, Factory] = {
        label: functools.partial(make_predictor, name, path)
        for label, name in labelled(names).items()
    }
    rows = ablate(model, prompts, makers, max_new_tokens=args.max_new_tokens, repeats=args.repeats)
    offloader = get_offloader(model)
    limits = bound(rows, len(offloader.layers), offloader.pools[0].layout.payload_bytes)
    offloader.close()
    if args.json:
        print(json.dumps({"rows": rows, "bound": limits}))
        return 0
    print(table(rows))
    print(
        f"\nA layer takes {limits['layer_ms_without_stall']:.2f} ms without stalls and misses "
        f"{limits['misses_per_layer']:.2f} pages,\nwaiting {limits['stall_ms_per_miss']:.2f} ms "
        f"for each; with no stall this run would be {limits['largest_gain']:.2f} times as fast.\n"
        "Every run wrote the same tokens."
    )
    return 0


def labelled(names: Sequence[str]) -> dict[str, str]:
    """Names of rows to names of predictors: a folder by its last part, unless that is taken."""
    found: dict[str, str] = {}
    for name in names:
        short = Path(name).name if Path(name).exists() else name
        found[name if short in found else short] = name
    return found


def _packaged(path: str) -> list[str]:
    folder = Path(path) / "predictors"
    found = sorted(folder.iterdir()) if folder.is_dir() else []
    return [str(entry) for entry in found if not entry.name.startswith("lossy")]


def _prompts(file: Path) -> list[str]:
    """One packaged prompt of each domain."""
    first: dict[str, str] = {}
    for entry in json.loads(file.read_text()):
        first.setdefault(entry["domain"], entry["text"])
    return list(first.values())
