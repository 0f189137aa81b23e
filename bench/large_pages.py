"""Which policy and which predictor pay on pages of megabytes: a trained model's routing, live.

Random weights route alike everywhere, so no policy can help there (end_to_end.py, full_size.py),
and the packaged model, whose routing is learned, has pages of 98 kB. Here its experts' inner size
is padded with zeros: every token takes the same experts as before and gets the same result, but a
page is FACTOR times as large, to read and to compute. Policies and predictors take turns on the
same prompts (Alpaca, WMT16, SciTLDR and AIME 2024 in turn), in one process, in alternating order;
every model's tokens are compared. Ratios are of the same prompt, seconds apart; the first prompts,
while the caches fill, do not count.

    python bench/large_pages.py --data FOLDER          about a quarter of an hour, 4 GB in --workdir
    python bench/large_pages.py --data FOLDER --quick  does it run?
"""

from __future__ import annotations

import argparse
import gc
import json
import shutil
import sys
import tempfile
from dataclasses import dataclass
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parent / "expertflow"))

from harness import Row, environment, machine_name, pin_to_cores, print_table, save, spread, workdir
from workloads import prompts

BASE = "lru"  # what the others are compared with, without a predictor
VARIANTS = (
    (BASE, "none"),
    ("lru-per-layer", "none"),
    ("auto", "none"),
    ("auto", "lookahead-0"),
    ("auto", "lookahead"),
    ("auto", "rpp"),
)
WARM_UP = 2  # prompts


@dataclass(frozen=True)
class Setting:
    """Pages FACTOR times 98,304 bytes, a share of them in slots, and how much is generated."""

    factor: int
    cap: float
    batch: int
    num_prompts: int  # batches
    new_tokens: int


SETTINGS = (
    Setting(1, 0.25, 1, 12, 96),
    Setting(8, 0.25, 1, 12, 96),
    Setting(32, 0.25, 1, 12, 96),
    Setting(32, 0.25, 4, 8, 48),
    Setting(32, 0.5, 1, 12, 96),
    Setting(128, 0.25, 1, 8, 64),
)
QUICK = (Setting(2, 0.25, 2, 3, 4),)


def inflate(factor: int, folder: Path) -> Path:
    """The packaged model with its experts' inner size times `factor`, padded with zeros."""
    import torch
    from safetensors.torch import load_file, save_file

    from moe_offload.models import tiny_moe_path

    source = Path(tiny_moe_path())
    config = json.loads((source / "config.json").read_text())
    config["moe_intermediate_size"] *= factor
    shutil.copytree(source, folder, dirs_exist_ok=True)
    (folder / "config.json").write_text(json.dumps(config))
    tensors = load_file(source / "model.safetensors")
    for name in [name for name in tensors if ".experts." in name]:
        weight = tensors[name]
        rows, columns = weight.shape
        down = "down_proj" in name
        padded = torch.zeros(
            rows * (1 if down else factor), columns * (factor if down else 1), dtype=weight.dtype
        )
        padded[:rows, :columns] = weight
        tensors[name] = padded
    save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})
    return folder


def run(setting: Setting, folder: Path, data: Path) -> list[Row]:
    from transformers import AutoTokenizer

    import moe_offload

    tokenizer = AutoTokenizer.from_pretrained(folder)
    texts = prompts("mixed", setting.batch * setting.num_prompts, data)
    models = {
        (policy, predictor): moe_offload.from_pretrained(
            folder, device_budget=f"{100 * setting.cap}%", policy=policy, predictor=predictor
        )
        for policy, predictor in VARIANTS
    }
    reports: dict[tuple[str, str], list[Any]] = {variant: [] for variant in VARIANTS}
    for number in range(setting.num_prompts):
        given = texts[number * setting.batch : (number + 1) * setting.batch]
        tokens = None
        for variant in VARIANTS if number % 2 == 0 else reversed(VARIANTS):
            report = moe_offload.batch_generate(
                models[variant],
                given,
                setting.batch,
                "fifo",
                max_new_tokens=setting.new_tokens,
                tokenizer=tokenizer,
                eos_token_id=None,
                num_running=1,
            )
            tokens = tokens or report.tokens
            if report.tokens != tokens:
                raise SystemExit(f"WRONG TOKENS, so no times: {variant} at {setting}")
            reports[variant].append(report)
    first = moe_offload.get_offloader(models[VARIANTS[0]])
    page_bytes = first.pools[0].layout.page_bytes
    rows = [
        _row(setting, page_bytes, variant, reports[variant], reports[VARIANTS[0]])
        for variant in VARIANTS
    ]
    for model in models.values():
        moe_offload.get_offloader(model).close()
    return rows


def _row(
    setting: Setting, page_bytes: int, variant: tuple[str, str], reports: list[Any], base: list[Any]
) -> Row:
    reports, base = reports[WARM_UP:], base[WARM_UP:]
    tokens = sum(report.decode_tokens for report in reports)

    def total(name: str) -> float:
        return float(sum(report.decode_counters[name] for report in reports))

    ratios = [
        theirs.decode_seconds / ours.decode_seconds
        for ours, theirs in zip(reports, base, strict=True)
    ]
    return {
        "page_mb": page_bytes / 1e6,
        "cap": setting.cap,
        "batch": setting.batch,
        "policy": variant[0],
        "predictor": variant[1],
        "tokens_per_s": spread(r.decode_tokens / r.decode_seconds for r in reports),
        "speedup": spread(ratios),
        "hit_rate": (total("hits") + total("joined_prefetches")) / total("lookups"),
        "demand_mb_per_token": total("demand_bytes") / tokens / 1e6,
        "ahead_used_mb_per_token": total("prefetch_bytes_used") / tokens / 1e6,
        "ahead_wasted_mb_per_token": total("prefetch_bytes_wasted") / tokens / 1e6,
        "stall_ms_per_token": 1e3 * total("stall_seconds") / tokens,
    }


COLUMNS = {
    "page_mb": "page, MB",
    "cap": "slots",
    "batch": "batch",
    "policy": "policy",
    "predictor": "predictor",
    "tokens_per_s": "tokens/s",
    "speedup": "x lru",
    "hit_rate": "hit rate",
    "demand_mb_per_token": "demand MB/token",
    "ahead_used_mb_per_token": "ahead, used",
    "ahead_wasted_mb_per_token": "ahead, wasted",
    "stall_ms_per_token": "stall ms/token",
}


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--data", type=Path, required=True, help="folder of the workloads' prompts")
    parser.add_argument("--factors", help="only pages of these factors, as in 32,128")
    parser.add_argument("--quick", action="store_true", help="a few tokens; times mean nothing")
    parser.add_argument("--workdir", type=Path, help="for checkpoints; default: a cache folder")
    parser.add_argument("--machine", help="name of the results folder; default: from the CPU")
    arguments = parser.parse_args()
    pin_to_cores(2)
    record = environment()
    import transformers

    transformers.logging.disable_progress_bar()
    settings = QUICK if arguments.quick else SETTINGS
    if arguments.factors:
        wanted = {int(factor) for factor in arguments.factors.split(",")}
        settings = tuple(setting for setting in settings if setting.factor in wanted)
    rows: list[Row] = []
    with (
        workdir(arguments.workdir, temporary=arguments.quick) as folder,
        tempfile.TemporaryDirectory(prefix="large-pages-", dir=folder) as models,
    ):
        for setting in settings:
            path = Path(models, str(setting.factor))
            if not path.exists():
                shutil.rmtree(models, ignore_errors=True)  # one at a time
                inflate(setting.factor, path)
            print(setting, file=sys.stderr, flush=True)
            found = run(setting, path, arguments.data)
            print_table(found, COLUMNS, "")
            rows += found
            gc.collect()
    if not arguments.quick:
        save(
            "large_pages",
            {"environment": record, "rows": rows},
            arguments.machine or machine_name(),
        )


if __name__ == "__main__":
    main()
