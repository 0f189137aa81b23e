"""Batches that run in turn, whose sequences may change places: the inside of scheduling.py.

A `Window` holds the sequences of a few batches from their prompts to their last tokens. All share
one clock: prompts are padded on the left to one length and every batch makes the same steps, so a
sequence's cache row has the same shape wherever it sits and an exchange is a swap of rows.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from torch import Tensor, nn

from moe_offload.backends.native import rows_apart
from moe_offload.errors import UnsupportedModelError
from moe_offload.grouping import (
    Floats,
    Ints,
    balanced_k_medoids,
    expected_distinct,
    refine,
    swaps_between,
)
from moe_offload.huggingface.attach import find_offloader
from moe_offload.huggingface.observe import routed_layers
from moe_offload.predictors.paths import GivenPaths, WindowPaths
from moe_offload.predictors.rpp import RoutingPathPredictor
from moe_offload.telemetry import total_counters

if TYPE_CHECKING:
    from moe_offload.scheduling import BatchReport

# [n] newest token of each sequence, [n] sequence number -> [n, L, E], the chance that the
# sequence's next step uses an expert
PathSource = Callable[[Sequence[int], Sequence[int]], Floats]

_CACHE_PARTS = ("keys", "values")  # of a layer of transformers' cache, [B, heads, past, head size]
_HALF_LIFE = 8.0  # tokens; of the routing history that stands for a sequence's next token


class ExpertSeats:
    """Hooks on the experts modules: mutes rows, and notes which experts the others chose."""

    def __init__(self, model: nn.Module) -> None:
        self.layers = routed_layers(model)
        self.num_experts = [_num_experts(layer.experts) for layer in self.layers]
        self._handles: list[Any] = []
        self._live: Tensor | None = None  # [B * T], rows whose choice counts
        self.chosen: list[Tensor] = []  # per layer [B * T, A]; ids of muted rows are out of range

    def __enter__(self) -> ExpertSeats:
        for index, layer in enumerate(self.layers):
            hook = self._hook(index)
            self._handles.append(
                layer.experts.register_forward_pre_hook(hook, with_kwargs=True, prepend=True)
            )
        return self

    def __exit__(self, *_: object) -> None:
        for handle in self._handles:
            handle.remove()

    def begin(self, live: Tensor) -> None:
        """Rows of the next forward that count, [B, T] bool."""
        self._live = live.reshape(-1)
        self.chosen = []

    def _hook(self, index: int) -> Callable:
        nobody = self.num_experts[index]  # transformers' mark for "not one of my experts"

        def hook(module: nn.Module, args: tuple, kwargs: dict[str, Any]) -> tuple[tuple, dict]:
            values = [*args, *kwargs.values()]
            ids = values[1]
            assert self._live is not None, "begin() comes before each forward"
            assert len(ids) == len(self._live), "one row per sequence and position"
            ids = torch.where(self._live[:, None], ids, nobody)
            self.chosen.append(ids)
            if len(args) > 1:
                return (args[0], ids, *args[2:]), kwargs
            name = list(kwargs)[1 - len(args)]
            return args, {**kwargs, name: ids}

        return hook


def _num_experts(experts: nn.Module) -> int:
    for name in ("gate_up_proj", "up_proj"):
        weight = getattr(experts, name, None)
        if isinstance(weight, Tensor):
            return int(weight.shape[0])
    count: int = experts._handle.num_experts  # type: ignore[union-attr, assignment]
    return count


class _Batch:
    """Rows that run together: who sits where, their cache and what they are fed next."""

    def __init__(self, sequences: list[int]) -> None:
        self.sequences = sequences  # [B] sequence numbers
        self.cache: Any = None
        self.mask: Tensor  # [B, past] 1 = a token, 0 = padding on the left
        self.next_tokens: Tensor  # [B, 1]


class Window:
    """The batches that run at the same time, from their prompts to their last tokens."""

    def __init__(
        self,
        model: Any,
        seats: ExpertSeats,
        prompts: dict[int, list[int]],
        batch_size: int,
        report: BatchReport,
        paths: PathSource | None,
        predictor: RoutingPathPredictor | None = None,
        given: GivenPaths | None = None,
    ) -> None:
        self._model, self._seats, self._report, self._paths = model, seats, report, paths
        self._prompts = prompts
        self._numbers = list(prompts)
        self._live = dict.fromkeys(prompts, True)
        self._batches = [
            _Batch(self._numbers[first : first + batch_size])
            for first in range(0, len(self._numbers), batch_size)
        ]
        self._length = max(map(len, prompts.values()))
        self._given = given  # where each batch's rows of the predicted paths are put
        self._ahead = None if predictor is None else WindowPaths(predictor, list(prompts.values()))
        self._coming: Floats | None = None  # [n, L, E], what the coming step is expected to use
        num_experts = max(seats.num_experts)
        self._history = np.zeros((len(prompts), len(seats.layers), num_experts))

    def run(self, max_new_tokens: int, eos_ids: set[int], min_gain: float | None) -> None:
        """Generate; with `min_gain`, sequences change places between steps."""
        for batch in self._batches:
            self._prefill(batch)
            self._take(batch, eos_ids)
        start, before = time.perf_counter(), _counters(self._model)
        grouped = False
        for _ in range(max_new_tokens - 1):
            if not any(self._live.values()):
                break
            if self._ahead is not None:
                newest = [self._report.tokens[n][-1] for n in self._numbers]
                self._coming = self._ahead.step(newest)
            if min_gain is not None and len(self._batches) > 1:
                self._regroup(min_gain, from_scratch=not grouped)
                grouped = True
            for batch in self._batches:
                if any(self._live[n] for n in batch.sequences):
                    self._decode(batch)
                    self._take(batch, eos_ids)
        self._report.decode_seconds += time.perf_counter() - start
        counters = self._report.decode_counters
        for name, value in _counters(self._model).items():
            counters[name] = counters.get(name, 0) + value - before[name]

    def _prefill(self, batch: _Batch) -> None:
        device = self._model.device
        rows = [self._prompts[n] for n in batch.sequences]
        tokens = torch.zeros((len(rows), self._length), dtype=torch.long)
        mask = torch.zeros_like(tokens)
        for row, prompt in enumerate(rows):
            tokens[row, self._length - len(prompt) :] = torch.tensor(prompt)
            mask[row, self._length - len(prompt) :] = 1
        batch.mask = mask.to(device)
        self._forward(batch, tokens.to(device), batch.mask.bool())

    def _decode(self, batch: _Batch) -> None:
        live = torch.tensor([[self._live[n]] for n in batch.sequences], device=batch.mask.device)
        batch.mask = torch.cat([batch.mask, torch.ones_like(batch.mask[:, :1])], dim=1)
        if self._given is not None and self._coming is not None:
            rows = self._coming[[n - self._numbers[0] for n in batch.sequences]]
            self._given.rows = rows * live.cpu().numpy()[..., None]
        with rows_apart():  # whoever else is in the batch
            self._forward(batch, batch.next_tokens, live)
        self._report.decode_steps += 1
        self._report.decode_tokens += int(live.sum())
        self._report.distinct_experts += self._count_distinct()

    def _count_distinct(self) -> int:
        """(layer, expert) pairs of the last forward."""
        num_experts = self._seats.num_experts
        used = np.zeros((len(num_experts), max(num_experts) + 1), dtype=bool)
        for layer, ids in enumerate(self._seats.chosen):
            used[layer, ids.cpu().numpy()] = True  # torch.unique takes three times as long
        used[np.arange(len(used)), num_experts] = False  # nobody's
        return int(used.sum())

    def _forward(self, batch: _Batch, tokens: Tensor, live: Tensor) -> None:
        """Feed tokens [B, T]; updates cache, next tokens and routing history."""
        self._seats.begin(live)
        positions = (batch.mask.cumsum(dim=1) - 1).clamp(min=0)[:, -tokens.shape[1] :]
        out = self._model(
            input_ids=tokens,
            attention_mask=batch.mask,
            position_ids=positions,
            past_key_values=batch.cache,
            use_cache=True,
            logits_to_keep=1,
        )
        batch.cache = out.past_key_values
        batch.next_tokens = out.logits[:, -1].argmax(dim=-1, keepdim=True)
        if self._paths is None and self._ahead is None and len(self._batches) > 1:
            self._remember(batch, tokens.shape[1])

    def _remember(self, batch: _Batch, length: int) -> None:
        """Fold the experts just chosen into the sequences' histories: p <- d p + (1 - d) used."""
        decay = 0.5 ** (1.0 / _HALF_LIFE)
        weights = (1.0 - decay) * decay ** np.arange(length - 1, -1, -1.0)  # newest weighs most
        rows = [n - self._numbers[0] for n in batch.sequences]
        for layer, ids in enumerate(self._seats.chosen):
            chosen = ids.view(len(rows), length, -1).cpu().numpy()  # [B, T, A]
            used = np.zeros((len(rows), self._history.shape[2] + 1))
            row_of = np.broadcast_to(np.arange(len(rows))[:, None, None], chosen.shape)
            weight_of = np.broadcast_to(weights[None, :, None], chosen.shape)
            valid = chosen < self._seats.num_experts[layer]
            np.add.at(used, (row_of[valid], chosen[valid]), weight_of[valid])
            past = self._history[rows, layer] * decay**length
            self._history[rows, layer] = past + used[:, :-1]

    def _take(self, batch: _Batch, eos_ids: set[int]) -> None:
        """Hand the new tokens to their sequences."""
        for number, (token,) in zip(batch.sequences, batch.next_tokens.tolist(), strict=True):
            if self._live[number]:
                self._report.tokens[number].append(token)
                self._live[number] = token not in eos_ids

    # --- changing places ----------------------------------------------------------------------

    def _regroup(self, min_gain: float, from_scratch: bool) -> None:
        start = time.perf_counter()
        probabilities = self._probabilities()
        groups: Ints = np.empty(len(self._numbers), dtype=np.int64)
        for index, batch in enumerate(self._batches):
            groups[[n - self._numbers[0] for n in batch.sequences]] = index
        # From where they sit, the best single exchanges; and once, the paper's clustering, which
        # finds groupings that no single exchange leads to.
        target, swaps = refine(probabilities, groups, min_gain, len(groups))
        if from_scratch:
            sizes = [len(batch.sequences) for batch in self._batches]
            top = np.sort(probabilities, axis=1)[:, -self._pages_per_token()][:, None]
            clustered = balanced_k_medoids((probabilities >= top) & (probabilities > 0), sizes)
            clustered, _ = refine(probabilities, clustered, min_gain, len(groups))
            costs = [
                expected_distinct(probabilities, g, len(sizes)).sum() for g in (target, clustered)
            ]
            if costs[1] < costs[0]:
                swaps = swaps_between(groups, clustered)
        self._report.grouping_seconds += time.perf_counter() - start
        start = time.perf_counter()
        for i, j in swaps:
            self._swap(self._numbers[0] + i, self._numbers[0] + j)
        self._report.kv_move_seconds += time.perf_counter() - start

    def _pages_per_token(self) -> int:
        return sum(ids.shape[1] for ids in self._seats.chosen)

    def _probabilities(self) -> Floats:
        """[n, L * E]; finished sequences use nothing."""
        if self._paths is None:
            found = self._history if self._coming is None else self._coming
        else:
            newest = [self._report.tokens[n][-1] for n in self._numbers]
            found = np.asarray(self._paths(newest, self._numbers), dtype=np.float64)
            if found.shape != self._history.shape:
                raise ValueError(
                    f"batch_generate: paths returned shape {found.shape}, expected "
                    f"{self._history.shape} (sequences, layers, experts)"
                )
        live = np.array([self._live[n] for n in self._numbers])
        masked: Floats = (found * live[:, None, None]).reshape(len(live), -1)
        return masked

    def _swap(self, a: int, b: int) -> None:
        """Exchange the seats of two sequences: cache rows, mask and next token."""
        (batch_a, row_a), (batch_b, row_b) = self._seat(a), self._seat(b)
        for layer_a, layer_b in zip(batch_a.cache.layers, batch_b.cache.layers, strict=True):
            for name in _CACHE_PARTS:
                rows_a, rows_b = getattr(layer_a, name, None), getattr(layer_b, name, None)
                if not isinstance(rows_a, Tensor) or rows_b is None:
                    raise UnsupportedModelError(
                        f'batch_generate: schedule="route" moves rows of a key/value cache; '
                        f"{type(layer_a).__name__} has no {name}. Use schedule='fifo'."
                    )
                _exchange(rows_a, row_a, rows_b, row_b)
                self._report.kv_moved_bytes += 2 * rows_a[row_a].numel() * rows_a.element_size()
        _exchange(batch_a.mask, row_a, batch_b.mask, row_b)
        _exchange(batch_a.next_tokens, row_a, batch_b.next_tokens, row_b)
        batch_a.sequences[row_a], batch_b.sequences[row_b] = b, a
        self._report.sequences_moved += 2

    def _seat(self, number: int) -> tuple[_Batch, int]:
        for batch in self._batches:
            if number in batch.sequences:
                return batch, batch.sequences.index(number)
        raise AssertionError(f"sequence {number} sits in no batch")


def _counters(model: Any) -> dict[str, float]:
    """The offloader's sums at this moment; nothing for a resident model."""
    offloader = find_offloader(model)
    return {} if offloader is None else total_counters(offloader.pools)


def _exchange(a: Tensor, row_a: int, b: Tensor, row_b: int) -> None:
    kept = a[row_a].clone()
    a[row_a] = b[row_b]
    b[row_b] = kept
