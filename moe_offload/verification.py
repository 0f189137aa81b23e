"""verify: is the offloaded model the resident model? Tokens and logits, under hostile timing.

The reference is transformers on resident weights, its experts computed by the kernels that the
slots use (experts_implementation "moe_offload", or "grouped_mm" where that was configured). Timing
is what paging could get wrong, so the offloaded side runs with copies delayed and reordered and
pages dropped at random, at its present budget and at the smallest there is. Weights of a reference
loaded from files are moved to aligned memory first: transformers maps files, and CPU matrix kernels
sum in another order on weights that start at an odd multiple of 8 bytes.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn

from moe_offload.config import format_bytes
from moe_offload.console import aligned
from moe_offload.errors import MoEOffloadError, StateError
from moe_offload.memory import available_memory_bytes
from moe_offload.offloader import Offloader

_COUNTED = ("hits", "demand_misses", "evictions", "demand_bytes")


@dataclass(frozen=True)
class VerifyRow:
    """One prompt at one setting.

    Attributes:
        setting: budget and timing the offloaded model ran with.
        prompt: position in the list of prompts.
        new_tokens: tokens compared.
        first_difference: index of the first token that differs, None when all agree.
        max_abs_logit_diff: over the whole prompt and every step up to that token; inf when one
            side is NaN and the other is not.
        stats: what the pager did meanwhile: hits, demand_misses, evictions, demand_bytes.
    """

    setting: str
    prompt: int
    new_tokens: int
    first_difference: int | None
    max_abs_logit_diff: float
    stats: dict[str, int] = field(default_factory=dict)


@dataclass(frozen=True)
class VerifyReport:
    """What `verify` found; `str(report)` is a table, `raise_if_different()` is for scripts."""

    model: str
    reference: str
    rows: tuple[VerifyRow, ...]

    @property
    def identical_tokens(self) -> bool:
        """Did every prompt give the reference's tokens at every setting?"""
        return all(row.first_difference is None for row in self.rows)

    @property
    def max_abs_logit_diff(self) -> float:
        """Largest difference of any logit; 0.0 means bit for bit."""
        return max((row.max_abs_logit_diff for row in self.rows), default=0.0)

    @property
    def stats(self) -> dict[str, int]:
        """Sums of the rows' counters."""
        return {name: sum(row.stats.get(name, 0) for row in self.rows) for name in _COUNTED}

    def raise_if_different(self) -> None:
        """Raise MoEOffloadError with the table unless tokens and logits are identical."""
        if not self.identical_tokens or self.max_abs_logit_diff != 0.0:
            raise MoEOffloadError(f"the offloaded model differs from the resident one\n{self}")

    def __str__(self) -> str:
        header = ("setting", "prompt", "tokens", "identical", "max |logit diff|", "misses")
        table = [header]
        for row in self.rows:
            where = "yes" if row.first_difference is None else f"no, from {row.first_difference}"
            misses = f"{row.stats.get('demand_misses', 0)}"
            diff = f"{row.max_abs_logit_diff:.3g}"
            table.append((row.setting, f"{row.prompt}", f"{row.new_tokens}", where, diff, misses))
        verdict = "identical" if self.identical_tokens else "DIFFERENT"
        return "\n".join(
            [
                f"{self.model}, offloaded against {self.reference}",
                *aligned(table, left=range(len(header))),
                f"tokens {verdict}, max |logit difference| {self.max_abs_logit_diff:.3g}",
            ]
        )


@dataclass(frozen=True)
class _Answer:
    """What a model says to one prompt."""

    tokens: Tensor  # [N] new tokens
    prompt_logits: Tensor  # [T, V]
    step_logits: Tensor  # [N, V]


def verify(
    model: Any,
    prompts: Sequence[str | Tensor | Sequence[int]],
    max_new_tokens: int = 32,
    reference: Any = None,
    tokenizer: Any = None,
    hostile: bool = True,
) -> VerifyReport:
    """Compare an offloaded model with its resident self on real prompts.

    Args:
        model: a model made by `offload` or `from_pretrained`.
        prompts: texts (then give `tokenizer`), or token ids: int lists or tensors [T] or [1, T].
        max_new_tokens: tokens to generate per prompt, greedily.
        reference: the resident model to compare with. Default: for a live model, the model itself
            on its own parameters; for a checkpoint model, the checkpoint loaded by transformers,
            which needs memory for all of it.
        tokenizer: callable as transformers' tokenizers are.
        hostile: also run with delayed and reordered copies and random evictions, at the present
            and at the smallest budget. False: once, as the model is.

    Returns:
        A VerifyReport. Budget and timing are afterwards as before, resident pages are other ones,
        and the counters of `stats()` have gone on counting.

    Raises:
        StateError: not offloaded, lossy, on a GPU, or not enough memory for the reference.
        ValueError: no prompts, no new token, texts without a tokenizer, or a batch as one prompt.

    Example:
        >>> report = moe_offload.verify(model, ["Once upon a time"], tokenizer=tokenizer)
        >>> print(report)
        >>> report.raise_if_different()
    """
    from moe_offload.huggingface.attach import get_attachment, get_offloader
    from moe_offload.huggingface.experts import implementation_of

    offloader = get_offloader(model)
    if offloader.device.torch_device.type != "cpu":
        raise StateError(
            f"verify compares on the CPU, this model computes on {offloader.device.torch_device}: "
            'kernels there round in another order. Offload it with device="cpu" to verify it, or '
            "compare its tokens at two budgets (Offloader.resize)."
        )
    if offloader.lossy:
        raise StateError(
            f"verify: this model runs {offloader.lossy}, which changes tokens on purpose: there is "
            "nothing to verify. Use an exact preset such as pregated-moe."
        )
    encoded = [_encode(prompt, tokenizer) for prompt in prompts]
    if not encoded or max_new_tokens < 1:
        raise ValueError("verify: expected at least one prompt and one new token")
    implementation = implementation_of(offloader.config.expert_backend)
    native_dense = offloader.config.native_dense
    with _reference(get_attachment(model), model, reference, implementation, native_dense) as found:
        resident, described = found
        expected = [_answer(resident, ids, max_new_tokens) for ids in encoded]
    rows = []
    for setting in _settings(offloader, hostile):
        for index, ids in enumerate(encoded):
            before = offloader.stats()
            got = _answer(model, ids, max_new_tokens)
            after = offloader.stats()
            counted = {name: after[name] - before[name] for name in _COUNTED}
            rows.append(_compare(setting, index, expected[index], got, counted))
    return VerifyReport(type(model).__name__, described, tuple(rows))


def _encode(prompt: str | Tensor | Sequence[int], tokenizer: Any) -> Tensor:
    if isinstance(prompt, str):
        if tokenizer is None:
            raise ValueError("verify: prompts are texts; pass tokenizer=..., or pass token ids")
        return tokenizer(prompt, return_tensors="pt").input_ids
    ids = torch.as_tensor(prompt, dtype=torch.long)
    ids = ids[None] if ids.dim() == 1 else ids
    if ids.dim() != 2 or ids.shape[0] != 1 or ids.shape[1] < 1:
        raise ValueError(
            f"verify: expected token ids of shape [T] or [1, T], got {tuple(ids.shape)}; pass the "
            "rows of a batch one by one"
        )
    return ids


def _settings(offloader: Offloader, hostile: bool) -> Iterator[str]:
    """Put the offloader into each setting in turn; afterwards everything is as it was."""
    if not hostile:
        yield f"budget {format_bytes(offloader.device_budget_bytes)}"
        return
    slots = [pool.num_slots for pool in offloader.pools]
    try:
        for seed, smallest in enumerate((False, True)):
            if smallest:
                offloader.resize(offloader.smallest_budget_bytes)
            offloader.chaos(seed, max_delay_us=300, reorder=True, evict_probability=0.2)
            budget = format_bytes(offloader.device_budget_bytes)
            yield f"{'smallest ' if smallest else ''}budget {budget}, hostile timing"
    finally:
        offloader.chaos()
        for pool, num_slots in zip(offloader.pools, slots, strict=True):
            if pool.num_slots != num_slots:
                pool.resize(num_slots)
        offloader.resize(offloader.device_budget_bytes)  # fills again, if it was filled


@contextmanager
def _reference(
    attachment: Any, model: Any, given: Any, implementation: str, native_dense: bool
) -> Iterator[tuple[Any, str]]:
    """The resident model, computing as the offloaded one does, and a description of it."""
    if given is not None:
        with _computing_by(implementation, native_dense, given):
            yield given, f"the given {type(given).__name__}"
    elif attachment.holds_parameters:
        with attachment.resident(), _computing_by(implementation, native_dense, model):
            yield model, "itself on its resident parameters"
    else:
        resident = _load_resident(attachment)
        with _computing_by(implementation, native_dense, resident):
            yield resident, f"transformers on {attachment.origin.path}"


def _load_resident(attachment: Any) -> Any:
    origin = attachment.origin
    dense = sum(tensor.nbytes for tensor in attachment.model().state_dict().values())
    needed = sum(layer.resident_bytes for layer in attachment.layers) + dense
    available = available_memory_bytes()
    if needed > available:
        raise StateError(
            f"verify needs the resident model in memory, {format_bytes(needed)}; only "
            f"{format_bytes(available)} are available. Pass reference=..., or verify a smaller "
            "checkpoint of the same family."
        )
    resident = origin.load_resident()
    to_aligned_memory(resident)
    return resident


def to_aligned_memory(model: nn.Module) -> None:
    """Move the weights of a model that transformers loaded out of the mapped file, see above."""
    for tensor in [*model.parameters(), *model.buffers()]:
        tensor.data = tensor.data.clone()


@contextmanager
def _computing_by(implementation: str, native_dense: bool, model: Any) -> Iterator[None]:
    """Let a transformers model compute its experts and linear layers as offloaded for a while."""
    from moe_offload.dense import use_dense_kernels
    from moe_offload.huggingface import llama4

    before = model.get_experts_implementation()
    model.set_experts_implementation(implementation)
    taught = llama4.teach(model)
    llama4.set_implementation(model, implementation)
    undo = use_dense_kernels(model) if native_dense else None
    try:
        yield
    finally:
        if undo is not None:
            undo()
        model.set_experts_implementation(before)
        if taught:
            llama4.unteach(model)


def _answer(model: Any, ids: Tensor, max_new_tokens: int) -> _Answer:
    with torch.no_grad():
        prompt_logits = model(ids).logits[0]
        generated = model.generate(
            ids,
            attention_mask=torch.ones_like(ids),
            max_new_tokens=max_new_tokens,
            do_sample=False,
            num_beams=1,
            output_logits=True,
            return_dict_in_generate=True,
        )
    steps = torch.cat([step[:1] for step in generated.logits])
    return _Answer(generated.sequences[0, ids.shape[1] :], prompt_logits, steps)


def _compare(
    setting: str, prompt: int, expected: _Answer, got: _Answer, counted: dict[str, int]
) -> VerifyRow:
    count = min(len(expected.tokens), len(got.tokens))
    differs = (expected.tokens[:count] != got.tokens[:count]).nonzero()
    first = int(differs[0]) if len(differs) else None
    if first is None and len(expected.tokens) != len(got.tokens):
        first = count
    comparable = count if first is None else min(first + 1, count)  # later steps saw other tokens
    diff = max(
        _max_diff(expected.prompt_logits, got.prompt_logits),
        _max_diff(expected.step_logits[:comparable], got.step_logits[:comparable]),
    )
    return VerifyRow(setting, prompt, len(expected.tokens), first, diff, counted)


def _max_diff(a: Tensor, b: Tensor) -> float:
    """Largest absolute difference; equal infinities and NaN on both sides count as equal."""
    a, b = a.double(), b.double()
    same = (a == b) | (a.isnan() & b.isnan())
    diff = (a - b).abs().masked_fill(same, 0.0).nan_to_num(nan=float("inf"))
    return float(diff.max()) if diff.numel() else 0.0
