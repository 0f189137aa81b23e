"""`record`: write down the routing of a live model while it runs."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np
from torch import Tensor, nn

from moe_offload.errors import StateError
from moe_offload.huggingface.attach import find_offloader
from moe_offload.huggingface.observe import ModelCall, Observer, RoutedLayer, observe
from moe_offload.layer import OffloadedExperts
from moe_offload.traces import _PART_ROWS, DECODE, PREFILL, Events, Trace, TraceWriter, _trace


@contextmanager
def record(model: nn.Module, path: str | Path | None = None) -> Iterator[Trace]:
    """Record the routing of `model` until the block ends.

    Args:
        model: a transformers MoE model, offloaded or resident; one thread runs it.
        path: stream the rows to this .npz instead of keeping them; the trace yielded then has no
            rows, `Trace.load(path)` has.

    Yields:
        A Trace whose rows are there when the block has ended. For an offloaded model with one page
        layout (nearly all) `events` holds every request to the pager.

    Raises:
        UnsupportedModelError: no routed experts.
        StateError: the block ended with no complete model call.

    Cost: one copy of ids and weights to the host per layer and call, N * L * A * 4 bytes in all.
    """
    observer = _Recorder()
    with observe(model, observer) as observation:
        observer.prepare(observation.layers)
        name = type(model).__name__
        writer = None
        if path is not None:
            writer = TraceWriter(path, observer.num_experts, name, observer.names)
            observer.writer = writer
        trace = _trace(
            np.zeros((0, len(observer.names), 1)), None, [], [], [], [], observer.num_experts
        )
        trace.model, trace.layer_names = name, observer.names
        pool = _only_pool(model, observation.layers)
        if pool is not None:
            pool.pager.set_recording(True)
        try:
            yield trace
        finally:
            if pool is not None:
                trace.events = _events(pool)
                pool.pager.set_recording(False)
            if writer is not None:
                observer.flush()
                writer.events = trace.events
                writer.close()
    if observer.num_rows == 0:
        raise StateError("record: the model was not called; call it inside the with block")
    if writer is None:
        rows = observer.columns()
        for column, values in rows.items():
            setattr(trace, column, values)
        trace.check("record")


class _Recorder(Observer):
    """Gathers one call's layers and appends its rows when the call is complete."""

    def __init__(self) -> None:
        self.writer: TraceWriter | None = None
        self.num_rows = 0
        self.num_experts: list[int] = []
        self.names: list[str] = []
        self._pending = 0
        self._parts: list[tuple[Any, ...]] = []
        self._layers: dict[int, tuple[Any, Any]] = {}
        self._first_sequence = 0
        self._next_sequence = 0

    def prepare(self, layers: list[RoutedLayer]) -> None:
        self.names = [layer.name for layer in layers]
        self.num_experts = [_num_experts(layer.experts) for layer in layers]

    def call_begins(self, call: ModelCall) -> None:
        self._layers.clear()
        if call.position == 0:
            self._first_sequence = self._next_sequence
            self._next_sequence += call.batch

    def layer_routed(self, layer: int, topk_ids: Tensor, topk_weights: Tensor) -> None:
        ids = topk_ids.detach().cpu().numpy().astype(np.int16)
        outside = (ids < 0) | (ids >= self.num_experts[layer])  # expert parallelism's "not mine"
        weights = topk_weights.detach().float().cpu().numpy().astype(np.float16)
        self._layers[layer] = (np.where(outside, np.int16(-1), ids), weights)

    def call_ends(self, call: ModelCall) -> None:
        if len(self._layers) != len(self.names):
            return  # the call raised before its last layer
        order = range(len(self.names))
        ids = np.stack([self._layers[layer][0] for layer in order], axis=1)  # [R, L, A]
        weights = np.stack([self._layers[layer][1] for layer in order], axis=1)
        rows = len(ids)
        sequence = np.repeat(np.arange(call.batch) + self._first_sequence, rows // call.batch)
        if call.attention_mask is not None and call.attention_mask.dim() == 2:
            mask = call.attention_mask[:, -call.length :].reshape(-1).cpu().numpy()
            if len(mask) == rows:
                sequence = np.where(mask != 0, sequence, -1)
        tokens = np.full(rows, -1)
        if call.input_ids is not None and call.input_ids.numel() == rows:
            tokens = call.input_ids.reshape(-1).cpu().numpy()
        phase = np.full(rows, DECODE if call.phase == "decode" else PREFILL)
        self._parts.append((ids, weights, sequence, tokens, phase, np.full(rows, call.number)))
        self.num_rows += rows
        self._pending += rows
        if self.writer is not None and self._pending >= _PART_ROWS:
            self.flush()

    def columns(self) -> dict[str, Any]:
        ids, weights, sequence, token_id, phase, call = (
            np.concatenate(column) for column in zip(*self._parts, strict=True)
        )
        part = _trace(ids, weights, sequence, token_id, phase, call, self.num_experts)
        names = ("ids", "weights", "sequence", "token_id", "phase", "call")
        return {name: getattr(part, name) for name in names}

    def flush(self) -> None:
        if self._parts and self.writer is not None:
            self.writer.append(**self.columns())
        self._parts.clear()
        self._pending = 0


def _num_experts(experts: Any) -> int:
    if isinstance(experts, OffloadedExperts):
        return experts._handle.num_experts
    tensor = experts.gate_up_proj if experts.has_gate else experts.up_proj
    return int(tensor.shape[0])


def _only_pool(model: nn.Module, layers: list[RoutedLayer]) -> Any:
    """The pool of an offloaded model, when one serves all its layers."""
    offloader = find_offloader(model)
    if offloader is None and isinstance(layers[0].experts, OffloadedExperts):
        offloader = layers[0].experts.offloader
    if offloader is None or offloader.closed or len(offloader.pools) != 1:
        return None
    return offloader.pools[0]


def _events(pool: Any) -> Events:
    kept = None
    if pool.policy == "static":
        kept = [layer * max(pool.num_experts) + expert for layer, expert in pool.kept_pages()]
    recorded = pool.pager.recorded()
    return Events(**recorded, num_slots=pool.num_slots, policy=pool.policy, kept=kept)
