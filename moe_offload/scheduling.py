"""Generate for many prompts in batches, with sequences that use the same experts side by side.

ExpertFlow's token scheduler (arXiv 2410.17954) on transformers' own cache: a few batches run in
turn, and between steps sequences change places, so that each batch's union of experts is small.
`schedule="fifo"` runs the same loop without moving anybody.

Tokens do not depend on the schedule. All sequences of a window are padded on the left to one
length and share one clock, so a sequence's attention is computed on the same shapes wherever it
sits; a batch keeps its number of rows until it ends, finished and padding rows reach no expert
(their ids are replaced by one that means "nobody's"). What is left is that an expert multiplies
the rows of other neighbours, and a matrix product may round differently when it has few rows than
when it has many. So while decoding this package's CPU kernels take all rows as few
(`backends.native.rows_apart`), which makes the logits of both schedules the same bits. With another
expert backend tokens are the same up to that rounding: a tie within it could turn.
"""

from __future__ import annotations

import time
from collections.abc import Sequence
from contextlib import nullcontext
from dataclasses import dataclass, field
from typing import Any, Literal, cast

import torch

from moe_offload.errors import StateError, UnsupportedModelError
from moe_offload.huggingface.attach import find_offloader
from moe_offload.predictors.paths import GivenPaths
from moe_offload.predictors.rpp import RoutingPathPredictor
from moe_offload.presets import PRESETS
from moe_offload.running_batches import ExpertSeats, PathSource, Window

Schedule = Literal["fifo", "route"]


@dataclass
class BatchReport:
    """What `batch_generate` made and what it cost.

    Attributes:
        tokens: new tokens of each prompt, in the order of the prompts, end-of-sequence included.
        texts: decoded, when a tokenizer was given.
        schedule: "fifo" or "route".
        seconds: everything: prompts, decoding, grouping and moving of KV caches.
        decode_seconds: without the prompts' forwards.
        grouping_seconds, kv_move_seconds: spent choosing groups; moving cache rows.
        kv_moved_bytes, sequences_moved: what changed places.
        decode_steps: forwards of one batch by one token.
        distinct_experts_per_step: mean over those of the distinct (layer, expert) pairs used.
        decode_tokens: tokens those steps made.
        decode_counters: what the offloader counted meanwhile, the numbers of `stats()` without
            the prompts'; empty for a resident model.
    """

    tokens: list[list[int]]
    schedule: str
    texts: list[str] | None = None
    seconds: float = 0.0
    decode_seconds: float = 0.0
    grouping_seconds: float = 0.0
    kv_move_seconds: float = 0.0
    kv_moved_bytes: int = 0
    sequences_moved: int = 0
    decode_steps: int = 0
    decode_tokens: int = 0
    decode_counters: dict[str, float] = field(default_factory=dict)
    distinct_experts: int = field(default=0, repr=False)

    @property
    def distinct_experts_per_step(self) -> float:
        return self.distinct_experts / max(1, self.decode_steps)

    @property
    def tokens_per_second(self) -> float:
        """New tokens over everything, the prompts' forwards included."""
        return sum(map(len, self.tokens)) / self.seconds if self.seconds else 0.0


def batch_generate(
    model: Any,
    prompts: Sequence[str] | Sequence[Sequence[int]],
    batch_size: int,
    schedule: Schedule | None = None,
    *,
    max_new_tokens: int = 64,
    tokenizer: Any = None,
    eos_token_id: int | Sequence[int] | Literal["auto"] | None = "auto",
    num_running: int = 4,
    paths: PathSource | None = None,
    min_gain: float = 1.0,
) -> BatchReport:
    """Greedy generation for many prompts, `batch_size` sequences per forward.

    Args:
        model: a transformers MoE model for text, offloaded or resident, in eval mode.
        prompts: texts (give a tokenizer) or lists of token ids.
        batch_size: rows per forward.
        schedule: "fifo" takes prompts in order and leaves them where they are; "route" lets the
            `num_running` batches of a window exchange sequences before each step. None: as the
            model's preset says, else "fifo".
        max_new_tokens: per prompt, at most.
        tokenizer: transformers tokenizer, for texts.
        eos_token_id: ends a sequence. "auto": as the model's generation config says; None: never.
        num_running: batches that take turns; their KV caches exist at the same time. The paper
            has 2; 4 separate more domains, for twice the caches.
        paths: predicts the next step's routing, see `PathSource`. Default: the model's Routing
            Path Predictor when it has one (`predictor="rpp"`), which then also prefetches for each
            batch; else each sequence's own routing so far, recent tokens weighing more.
        min_gain: pages per step an exchange of two sequences must be expected to save.

    Returns:
        A BatchReport. The same tokens for both schedules; with expert backends other than "native"
        up to rounding, see the module's text.

    Raises:
        ValueError: no prompts, an empty prompt, batch_size or max_new_tokens below 1, an unknown
            schedule, or a prompt that leaves no room in the model's context.
        StateError: the model is in training mode.
        UnsupportedModelError: no experts, or a cache that is not keys and values.

    Example:
        >>> report = batch_generate(model, prompts, 16, "route", tokenizer=tokenizer)
        >>> report.texts[0], report.distinct_experts_per_step
    """
    offloader = find_offloader(model)
    if offloader is not None and offloader.lossy:
        raise StateError(
            f"batch_generate: this model runs {offloader.lossy}, which changes tokens, and the "
            "schedules are exact. Use model.generate, or an exact preset such as pregated-moe."
        )
    if schedule is None:
        preset = PRESETS.get(offloader.config.preset or "") if offloader is not None else None
        schedule = cast(Schedule, preset.schedule) if preset is not None else "fifo"
    _check_arguments(model, prompts, batch_size, schedule, max_new_tokens, num_running)
    token_ids = _token_ids(prompts, tokenizer)
    _check_lengths(model, token_ids, max_new_tokens)
    report = BatchReport(tokens=[[] for _ in token_ids], schedule=schedule)
    start = time.perf_counter()
    window_size = batch_size * num_running
    driver = offloader.predicting if offloader is not None else None
    predictor = given = None
    if driver is not None and isinstance(driver.predictor, RoutingPathPredictor):
        predictor, given = driver.predictor, GivenPaths()
    with (
        torch.no_grad(),
        ExpertSeats(model) as seats,
        driver.replaced_by(given) if driver and given else nullcontext(),
    ):
        for first in range(0, len(token_ids), window_size):
            numbers = range(first, min(first + window_size, len(token_ids)))
            batch_prompts = {n: token_ids[n] for n in numbers}
            window = Window(
                model, seats, batch_prompts, batch_size, report, paths, predictor, given
            )
            exchange = min_gain if schedule == "route" else None
            window.run(max_new_tokens, _eos_ids(model, eos_token_id), exchange)
    report.seconds = time.perf_counter() - start
    if tokenizer is not None:
        report.texts = [tokenizer.decode(new, skip_special_tokens=True) for new in report.tokens]
    return report


def _check_arguments(
    model: Any, prompts: Any, batch_size: int, schedule: str, max_new_tokens: int, num_running: int
) -> None:
    if isinstance(prompts, str) or not len(prompts):
        raise ValueError(f"batch_generate: expected a list of prompts, got {prompts!r}")
    for name, value in (
        ("batch_size", batch_size),
        ("max_new_tokens", max_new_tokens),
        ("num_running", num_running),
    ):
        if isinstance(value, bool) or not isinstance(value, int) or value < 1:
            raise ValueError(f"batch_generate: {name} must be an int >= 1, got {value!r}")
    if schedule not in ("fifo", "route"):
        raise ValueError(f'batch_generate: schedule must be "fifo" or "route", got {schedule!r}')
    if model.training:
        raise StateError("batch_generate: the model is in training mode; call model.eval() first")
    if getattr(model.config, "is_encoder_decoder", False):
        raise UnsupportedModelError(
            f"batch_generate: {type(model).__name__} is an encoder-decoder model; decoder-only "
            "models are supported"
        )


def _token_ids(prompts: Sequence[Any], tokenizer: Any) -> list[list[int]]:
    found = []
    for number, prompt in enumerate(prompts):
        if isinstance(prompt, str):
            if tokenizer is None:
                raise ValueError("batch_generate: prompts are texts; give tokenizer=...")
            prompt = tokenizer(prompt)["input_ids"]
        found.append([int(token) for token in prompt])
        if not found[-1]:
            raise ValueError(f"batch_generate: prompt {number} has no tokens")
    return found


def _check_lengths(model: Any, token_ids: list[list[int]], max_new_tokens: int) -> None:
    config = model.config.get_text_config() if hasattr(model.config, "get_text_config") else None
    limit = getattr(config, "max_position_embeddings", None)
    if not isinstance(limit, int):
        return
    for number, tokens in enumerate(token_ids):
        if len(tokens) + max_new_tokens > limit:
            raise ValueError(
                f"batch_generate: prompt {number} has {len(tokens)} tokens, which with "
                f"max_new_tokens={max_new_tokens} exceeds the model's context of {limit}. Shorten "
                "the prompt or ask for fewer tokens."
            )


def _eos_ids(model: Any, given: Any) -> set[int]:
    if given == "auto":
        given = getattr(getattr(model, "generation_config", None), "eos_token_id", None)
    if given is None:
        return set()
    return {given} if isinstance(given, int) else {int(token) for token in given}
