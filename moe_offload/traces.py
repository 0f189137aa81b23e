"""Routing traces: which experts each token used, recorded from a model or read from a file.

    with moe_offload.record(model) as trace:
        model.generate(...)
    trace.save("run.npz")

A trace has one row per token and model call, [N] rows in the order the model saw them, and one
entry per row, MoE layer and choice of the router. `record` watches any model that
`huggingface.observe` can, offloaded or resident. From an offloaded model it also keeps what the
pager was asked (`events`), so that a replay can repeat the run exactly. docs/traces.md describes
the file.
"""

from __future__ import annotations

import json
import zipfile
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from types import TracebackType
from typing import Any

import numpy as np
from numpy.typing import NDArray

from moe_offload.errors import TraceError

FORMAT = "moe_offload trace 1"
PREFILL, DECODE = 0, 1
_ROWS = ("ids", "weights", "sequence", "token_id", "phase", "call")
_PART_ROWS = 8192  # rows that a streaming writer keeps in memory


@dataclass
class Trace:
    """Routing of N rows (a row is one token in one model call) through L layers.

    Attributes:
        ids: [N, L, A] int16, expert of each choice, highest weight first; -1 for none.
        weights: [N, L, A] float16 router weights, or None where the source has none.
        sequence: [N] int32, running number of the sequence; -1 for padding.
        token_id: [N] int32, the token fed to the model; -1 where unknown.
        phase: [N] uint8, PREFILL or DECODE.
        call: [N] int64, the model call the row was part of; never decreases.
        num_experts: [L] experts of each layer.
        model: what was traced, for people.
        layer_names: [L] module names; may be empty.
        events: what the pager was asked, when the traced model was offloaded: see `Events`.
    """

    ids: NDArray[np.int16]
    weights: NDArray[np.float16] | None
    sequence: NDArray[np.int32]
    token_id: NDArray[np.int32]
    phase: NDArray[np.uint8]
    call: NDArray[np.int64]
    num_experts: list[int]
    model: str = ""
    layer_names: list[str] = field(default_factory=list)
    events: Events | None = None

    def __len__(self) -> int:
        return len(self.ids)

    @property
    def num_layers(self) -> int:
        return len(self.num_experts)

    @property
    def top_k(self) -> int:
        return int(self.ids.shape[2])

    @property
    def num_sequences(self) -> int:
        return int(np.unique(self.sequence[self.sequence >= 0]).size)

    def check(self, where: str = "trace") -> Trace:
        """Raise TraceError unless shapes fit together and every id names an expert."""
        rows = len(self.ids)
        if self.ids.ndim != 3 or self.ids.shape[1] != len(self.num_experts):
            raise TraceError(
                f"{where}: ids must be [rows, layers, choices] with {len(self.num_experts)} "
                f"layers, got shape {tuple(self.ids.shape)}"
            )
        if rows == 0 or self.ids.shape[2] == 0:
            raise TraceError(f"{where}: the trace is empty; record at least one model call")
        if self.weights is not None and self.weights.shape != self.ids.shape:
            raise TraceError(
                f"{where}: weights must have the shape of ids {tuple(self.ids.shape)}, got "
                f"{tuple(self.weights.shape)}"
            )
        for name in ("sequence", "token_id", "phase", "call"):
            shape = getattr(self, name).shape
            if shape != (rows,):
                raise TraceError(f"{where}: {name} must be [{rows}], got shape {tuple(shape)}")
        if (np.diff(self.call) < 0).any():
            raise TraceError(f"{where}: call must never decrease from row to row")
        highest = self.ids.max(axis=(0, 2))
        for layer, (top, count) in enumerate(zip(highest, self.num_experts, strict=True)):
            if top >= count:
                raise TraceError(
                    f"{where}: layer {layer} has experts [0, {count}), got expert {int(top)}"
                )
        if int(self.ids.min()) < -1:
            raise TraceError(f"{where}: expert ids must be -1 (none) or more")
        return self

    def check_model(self, num_experts: Sequence[int], name: str = "the model") -> None:
        """Raise TraceError unless the trace is of a model with these experts per layer."""
        if list(num_experts) != list(self.num_experts):
            raise TraceError(
                f"the trace is of another model: {self.model or 'unnamed'} with "
                f"{_shape(self.num_experts)}, but {name} has {_shape(num_experts)}"
            )

    def rows(self, keep: NDArray[Any] | slice) -> Trace:
        """The trace of some rows only (a boolean mask, indices in order, or a slice)."""
        return Trace(
            self.ids[keep],
            None if self.weights is None else self.weights[keep],
            self.sequence[keep],
            self.token_id[keep],
            self.phase[keep],
            self.call[keep],
            self.num_experts,
            self.model,
            self.layer_names,
        )

    def save(self, path: str | Path) -> None:
        """Write one .npz; see docs/traces.md."""
        with TraceWriter(path, self.num_experts, self.model, self.layer_names) as writer:
            for start in range(0, len(self), _PART_ROWS):
                part = self.rows(slice(start, start + _PART_ROWS))
                writer.append(*(getattr(part, name) for name in _ROWS))
            writer.events = self.events

    @staticmethod
    def load(path: str | Path) -> Trace:
        """Read a file that `save` or `record` wrote.

        Raises:
            TraceError: not such a file, truncated, or its arrays do not fit together.
        """
        try:
            with np.load(path, allow_pickle=False) as arrays:
                return _from_arrays(arrays, str(path))
        except (OSError, ValueError, zipfile.BadZipFile, EOFError, KeyError) as error:
            if isinstance(error, TraceError | FileNotFoundError):
                raise
            raise TraceError(f"{path}: not a complete trace file: {error}") from error


@dataclass
class Events:
    """What one pager was asked, in order; the arrays of csrc/paging/event_log.h.

    Attributes:
        kinds: [n] uint8: 0 request, 1 prefetch, 2 predict, 3 new sequences, 4 fill,
            5 expect, 6 routes of the layer's next request.
        layers: [n] int32.
        counts: [n] int32: tokens of a request or of routes; visits ahead of a prediction.
        expert_offsets: [n + 1] int64 into `experts`.
        experts: int32; of routes [tokens, A], -1 for none.
        value_offsets: [n + 1] int64 into `values`.
        values: float32: router weights of a request, probabilities of a prediction.
        num_slots: of the pager.
        policy: of the pager.
        kept: for "static": pages that stay, layer * max(num_experts) + expert.
    """

    kinds: NDArray[np.uint8]
    layers: NDArray[np.int32]
    counts: NDArray[np.int32]
    expert_offsets: NDArray[np.int64]
    experts: NDArray[np.int32]
    value_offsets: NDArray[np.int64]
    values: NDArray[np.float32]
    num_slots: int = 0
    policy: str = ""
    kept: list[int] | None = None

    ARRAYS = (
        "kinds",
        "layers",
        "counts",
        "expert_offsets",
        "experts",
        "value_offsets",
        "values",
    )

    def arrays(self) -> dict[str, NDArray[Any]]:
        return {name: getattr(self, name) for name in self.ARRAYS}


class TraceWriter:
    """Writes a trace part by part, so that a run of any length needs little memory.

    The file takes its name when it is complete; until then it is `<name>.partial`.

    Args:
        path: the .npz to write; replaced if it exists.
        num_experts: [L] experts of each layer.
        model, layer_names: as in `Trace`.
    """

    def __init__(
        self,
        path: str | Path,
        num_experts: Sequence[int],
        model: str = "",
        layer_names: Sequence[str] = (),
    ) -> None:
        self.path = Path(path)
        self.events: Events | None = None
        self._partial = self.path.with_name(f"{self.path.name}.partial")
        self._zip = zipfile.ZipFile(self._partial, "w", zipfile.ZIP_DEFLATED, compresslevel=1)
        self._header: dict[str, Any] = {
            "format": FORMAT,
            "num_experts": list(num_experts),
            "model": model,
            "layer_names": list(layer_names),
        }
        self._parts = 0

    def append(
        self,
        ids: NDArray[Any],
        weights: NDArray[Any] | None,
        sequence: NDArray[Any],
        token_id: NDArray[Any],
        phase: NDArray[Any],
        call: NDArray[Any],
    ) -> None:
        """Add rows; arrays as in `Trace`."""
        if len(ids) == 0:
            return
        part = _trace(ids, weights, sequence, token_id, phase, call, self._header["num_experts"])
        part.check(str(self.path))
        for name in _ROWS:
            array = getattr(part, name)
            if array is not None:
                self._write(f"{name}.{self._parts:05d}", array)
        self._parts += 1

    def close(self) -> None:
        """Finish the file. Idempotent."""
        if self._zip.fp is None:
            return
        if self.events is not None:
            for name, array in self.events.arrays().items():
                self._write(f"events.{name}", array)
            self._header["num_slots"] = self.events.num_slots
            self._header["policy"] = self.events.policy
            self._header["kept"] = self.events.kept
        self._header["parts"] = self._parts
        self._write("header", np.array(json.dumps(self._header)))
        self._zip.close()
        self._partial.replace(self.path)

    def _write(self, name: str, array: NDArray[Any]) -> None:
        with self._zip.open(f"{name}.npy", "w", force_zip64=True) as member:
            np.lib.format.write_array(member, np.asarray(array, order="C"), allow_pickle=False)

    def __enter__(self) -> TraceWriter:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        traceback: TracebackType | None,
    ) -> None:
        self.close()


def _trace(
    ids: Any,
    weights: Any,
    sequence: Any,
    token_id: Any,
    phase: Any,
    call: Any,
    num_experts: Any,
    **rest: Any,
) -> Trace:
    """A Trace in the dtypes it promises."""
    return Trace(
        np.asarray(ids, np.int16),
        None if weights is None else np.asarray(weights, np.float16),
        np.asarray(sequence, np.int32),
        np.asarray(token_id, np.int32),
        np.asarray(phase, np.uint8),
        np.asarray(call, np.int64),
        [int(count) for count in num_experts],
        **rest,
    )


def _from_arrays(arrays: Any, where: str) -> Trace:
    if "header" not in arrays.files:
        raise TraceError(
            f"{where}: not a trace of this package (it has no header, only "
            f"{', '.join(arrays.files[:4])}); known foreign formats are read by read_trace"
        )
    header = json.loads(str(arrays["header"]))
    if header.get("format") != FORMAT:
        raise TraceError(f"{where}: expected format {FORMAT!r}, got {header.get('format')!r}")
    if header["parts"] == 0:
        raise TraceError(f"{where}: the trace is empty; record at least one model call")
    columns: dict[str, Any] = {}
    for name in _ROWS:
        parts = [f"{name}.{part:05d}" for part in range(header["parts"])]
        if name == "weights" and parts[0] not in arrays.files:
            columns[name] = None
            continue
        columns[name] = np.concatenate([arrays[part] for part in parts])
    trace = _trace(
        **columns,
        num_experts=header["num_experts"],
        model=header["model"],
        layer_names=header["layer_names"],
    )
    if "events.kinds" in arrays.files:
        trace.events = Events(
            **{name: arrays[f"events.{name}"] for name in Events.ARRAYS},
            num_slots=header["num_slots"],
            policy=header["policy"],
            kept=header["kept"],
        )
    return trace.check(where)


def _shape(num_experts: Sequence[int]) -> str:
    counts = sorted(set(num_experts))
    return f"{len(num_experts)} MoE layers of {' or '.join(map(str, counts))} experts"
