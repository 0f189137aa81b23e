"""`moe-offload demo`: the packaged model writes at several budgets, and every run is checked.

transformers with everything resident goes first and is the reference. Then the same prompts
at budgets from two experts in memory to all of them; tokens must be identical. Sampling is on,
with fixed seeds: bit-equal logits draw equal tokens, so this checks more than greedy text would.
Speeds are from this one run on this machine; bench/ has the measurements.
"""

from __future__ import annotations

import json
from collections.abc import Iterator
from contextlib import closing, contextmanager
from dataclasses import dataclass
from typing import Any

from moe_offload.cli_generate import (
    Completion,
    complete,
    encode,
    load_config,
    load_tokenizer,
    quiet,
    resolve_model,
    write_now,
)
from moe_offload.config import format_bytes
from moe_offload.console import aligned, progress
from moe_offload.errors import CheckpointError
from moe_offload.models import tiny_moe_path

NEW_TOKENS = 48
TEMPERATURE, TOP_P = 0.6, 0.95
SHOWN = "25%"  # the run whose text is streamed
BUDGETS = ("12.5%", "50%", "100%")  # besides the smallest and SHOWN
MAX_PROMPTS = 5  # one per domain; keeps six runs under a minute on two cores
_NOTE = """\
Resident bytes are the experts'; the dense weights are in memory in every run. Moved bytes include
the prompts' and exclude the first fill at 100%. Speeds are from this one run."""


@dataclass(frozen=True)
class Row:
    """One line of the table; None where it has no meaning."""

    budget: str
    num_slots: int | None
    resident_bytes: int
    hit_rate: float | None
    moved_bytes: int
    num_tokens: int
    seconds: float
    identical: bool | None


def demo(path: str | None = None, prompts: list[dict[str, str]] | None = None) -> int:
    """Run the demo; exit code 0 when every run wrote the reference's tokens, else 1.

    Args:
        path: another checkpoint than the packaged one, for tests.
        prompts: `[{"domain": ..., "text": ...}]` instead of the packaged ones.
    """
    path = path or resolve_model("tiny")
    prompts = prompts or _one_per_domain(_packaged_prompts())[:MAX_PROMPTS]
    print("Loading torch and transformers ...", flush=True)
    quiet()
    config = load_config(path)
    tokenizer = load_tokenizer(path)
    inputs = [encode(tokenizer, prompt["text"], config, NEW_TOKENS) for prompt in prompts]

    with _one_thread():
        reference, resident_row = _resident_run(path, tokenizer, inputs)
        rows = [resident_row, *_offloaded_runs(path, tokenizer, prompts, inputs, reference)]
    print(_table(rows))
    same = all(row.identical is not False for row in rows)
    verdict = "Every run wrote exactly" if same else "NOT every run wrote"
    print(f"\n{verdict} the resident model's tokens.\n{_NOTE}")
    return 0 if same else 1


@contextmanager
def _one_thread() -> Iterator[None]:
    """The tiny model's matrices are too small to share.

    On an idle machine a second thread gains nothing; on a busy one each operation waits until both
    threads were scheduled, and 25 seconds became five minutes.
    """
    import torch

    before = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        yield
    finally:
        torch.set_num_threads(before)


def _packaged_prompts() -> list[dict[str, str]]:
    file = tiny_moe_path().parent / "prompts.json"
    try:
        return json.loads(file.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise CheckpointError(
            f"{file}: cannot read the demo's prompts: {error}. Install the package from a complete "
            "checkout or from its wheel."
        ) from error


def _one_per_domain(prompts: list[dict[str, str]]) -> list[dict[str, str]]:
    return list({prompt["domain"]: prompt for prompt in reversed(prompts)}.values())[::-1]


def _resident_run(path: str, tokenizer: Any, inputs: list[Any]) -> tuple[list[Completion], Row]:
    """transformers, everything resident, computed by the kernels of the offloaded runs."""
    from transformers import AutoModelForCausalLM

    from moe_offload.dense import use_dense_kernels
    from moe_offload.huggingface.adapters import find_expert_layers
    from moe_offload.huggingface.experts import NAME
    from moe_offload.verification import to_aligned_memory

    model = AutoModelForCausalLM.from_pretrained(path, dtype="auto", experts_implementation=NAME)
    use_dense_kernels(model)
    to_aligned_memory(model)
    expert_bytes = sum(
        getattr(layer.module, name).nbytes
        for layer in find_expert_layers(model)
        for name in layer.tensors
    )
    _write_all(model, tokenizer, inputs[:1])
    done = _write_all(model, tokenizer, inputs)
    return done, _row("resident", None, expert_bytes, None, 0, done, None)


def _offloaded_runs(
    path: str,
    tokenizer: Any,
    prompts: list[dict[str, str]],
    inputs: list[Any],
    reference: list[Completion],
) -> list[Row]:
    from moe_offload.huggingface import from_pretrained, get_offloader

    model = from_pretrained(path, device_budget=BUDGETS[0])
    with closing(get_offloader(model)) as offloader:
        _write_all(model, tokenizer, inputs[:1])  # first calls set things up; nobody times them
        offloader.resize(SHOWN)
        offloader.reset_stats()
        stats = offloader.stats()
        print(
            f"{path.rsplit('/', 1)[-1]}: {stats['num_pages']} experts, "
            f"{format_bytes(stats['total_expert_bytes'])} on disk; "
            f"{format_bytes(stats['device_budget_bytes'])} in memory ({SHOWN}), "
            f"{stats['io_mode']} I/O\n"
        )
        smallest = offloader.smallest_budget_bytes
        rows = [_offloaded_row(SHOWN, model, offloader, tokenizer, inputs, reference, prompts)]
        others: list[int | str] = [smallest, *BUDGETS]
        for budget in progress(others, desc="Other budgets"):
            offloader.resize(budget)
            offloader.reset_stats()
            name = "smallest" if budget == smallest else str(budget)
            rows.append(_offloaded_row(name, model, offloader, tokenizer, inputs, reference))
    return sorted(rows, key=lambda row: row.resident_bytes)


def _offloaded_row(
    budget: str,
    model: Any,
    offloader: Any,
    tokenizer: Any,
    inputs: list[Any],
    reference: list[Completion],
    prompts: list[dict[str, str]] | None = None,
) -> Row:
    done = _write_all(model, tokenizer, inputs, prompts)
    stats = offloader.stats()
    moved = stats["demand_bytes"] + stats["prefetch_bytes_used"] + stats["prefetch_bytes_wasted"]
    return _row(
        budget,
        stats["num_slots"],
        stats["device_budget_bytes"],
        stats["hit_rate"],
        moved,
        done,
        [one.tokens for one in done] == [one.tokens for one in reference],
    )


def _write_all(
    model: Any,
    tokenizer: Any,
    inputs: list[Any],
    prompts: list[dict[str, str]] | None = None,
) -> list[Completion]:
    """Complete every prompt; with `prompts`, show them and stream what follows."""
    done = []
    for index, one in enumerate(inputs):
        if prompts is not None:
            shown = tokenizer.decode(one["input_ids"][0], skip_special_tokens=True)
            print(f"[{prompts[index]['domain']}] {shown.strip()}")
            write_now("    >>> ")
        done.append(
            complete(
                model,
                tokenizer,
                one,
                NEW_TOKENS,
                temperature=TEMPERATURE,
                top_p=TOP_P,
                seed=index,
                write=write_now if prompts is not None else (lambda text: None),
            )
        )
        if prompts is not None:
            print("\n")
    return done


def _row(
    budget: str,
    num_slots: int | None,
    resident_bytes: int,
    hit_rate: float | None,
    moved_bytes: int,
    done: list[Completion],
    identical: bool | None,
) -> Row:
    tokens, seconds = sum(len(one.tokens) for one in done), sum(one.seconds for one in done)
    return Row(budget, num_slots, resident_bytes, hit_rate, moved_bytes, tokens, seconds, identical)


def _table(rows: list[Row]) -> str:
    cells = [
        ("budget", "slots", "resident bytes", "hit rate", "moved/token", "tokens/s", "identical")
    ]
    for row in rows:
        cells.append(
            (
                row.budget,
                "all" if row.num_slots is None else str(row.num_slots),
                format_bytes(row.resident_bytes),
                "-" if row.hit_rate is None else f"{row.hit_rate:.1%}",
                format_bytes(row.moved_bytes / row.num_tokens),
                f"{row.num_tokens / row.seconds:.1f}",
                {None: "reference", True: "yes", False: "NO"}[row.identical],
            )
        )
    lines = aligned(cells)
    return "\n".join([lines[0], "-" * len(lines[0]), *lines[1:]])
