"""A predictor's word between the requests of a replay.

Live, a predictor speaks while the model runs and the driver turns chances into prefetches
(predictors/driver.py). Here both are events of the log that is replayed, so they act on the policy
and the slots as they would live; only that every copy ends at once.
"""

from __future__ import annotations

from typing import Any

import numpy as np
from numpy.typing import NDArray

from moe_offload import _core
from moe_offload.traces import Events

REQUEST, PREFETCH, PREDICT, SEQUENCE, FILL, EXPECT, ROUTES = range(7)  # csrc/paging/event_log.h
WORTH_FETCHING = 0.7  # a chance above 1/2: it is lower for absent pages than for all


class EventList:
    """Events one by one, for replays with predictions and prefetches."""

    def __init__(self) -> None:
        self._rows: list[tuple[int, int, int]] = []
        self._experts: list[NDArray[np.int32]] = []
        self._values: list[NDArray[np.float32]] = []

    def add(
        self,
        kind: int,
        layer: int,
        experts: Any = (),
        values: Any = (),
        count: int = 0,
    ) -> None:
        """Append one event; see `Events` for what `count` and `values` mean."""
        self._rows.append((kind, layer, count))
        self._experts.append(np.asarray(experts, np.int32))
        self._values.append(np.asarray(values, np.float32))

    def events(self) -> Events:
        rows = np.array(self._rows, np.int32).reshape(-1, 3)
        return Events(
            rows[:, 0].astype(np.uint8),
            np.ascontiguousarray(rows[:, 1]),
            np.ascontiguousarray(rows[:, 2]),
            _offsets(self._experts),
            np.concatenate([np.empty(0, np.int32), *self._experts]),
            _offsets(self._values),
            np.concatenate([np.empty(0, np.float32), *self._values]),
        )


def _offsets(parts: list[NDArray[Any]]) -> NDArray[np.int64]:
    return np.cumsum([0, *(len(part) for part in parts)]).astype(np.int64)


def with_predictions(
    events: Events,
    probabilities: NDArray[Any],
    *,
    prefetch: int = 0,
    layers_ahead: int = 1,
) -> Events:
    """Add a predictor's word to the requests of a trace.

    Args:
        events: of `requests`, S steps of L layers.
        probabilities: [S, L, E], that step s needs an expert, known when the step begins.
        prefetch: also prefetch this many of the most probable experts of each layer,
        layers_ahead: when the layer that many layers before it is about to be routed.
    """
    result = EventList()
    num_layers = probabilities.shape[1]
    requests_seen = 0

    def announce(step: int, layer: int) -> None:
        if layer >= num_layers or prefetch == 0:
            return
        best = np.argsort(-probabilities[step, layer], kind="stable")[:prefetch]
        result.add(PREFETCH, layer, best[probabilities[step, layer, best] > 0])

    for index, kind in enumerate(events.kinds):
        layer = int(events.layers[index])
        if kind == REQUEST:
            step, position = divmod(requests_seen, num_layers)
            requests_seen += 1
            if position == 0:
                for ahead in range(num_layers):
                    likely = np.flatnonzero(probabilities[step, ahead] > 0)
                    result.add(PREDICT, ahead, likely, probabilities[step, ahead, likely])
                for ahead in range(layers_ahead):
                    announce(step, ahead)
            announce(step, position + layers_ahead)
        result.add(
            int(kind),
            layer,
            events.experts[events.expert_offsets[index] : events.expert_offsets[index + 1]],
            events.values[events.value_offsets[index] : events.value_offsets[index + 1]],
            int(events.counts[index]),
        )
    return result.events()


def with_recall(events: Events, num_experts: list[int]) -> Events:
    """Add what the `recall` predictor would have said and fetched, one layer ahead.

    It is given the requests so far only, as in a live run. It tells the policy every chance and
    prefetches what has one of at least WORTH_FETCHING, however much time there is for it.
    """
    told = EventList()
    memory = _core.PathPredictor(num_experts)
    num_layers, began = len(num_experts), False
    routes: list[int] = []

    def announce(layer: int) -> None:
        chances = np.array(memory.predict(layer), np.float32)
        told.add(PREDICT, layer, np.arange(len(chances)), chances)
        likely = np.flatnonzero(chances >= WORTH_FETCHING)
        if len(likely):
            likely = likely[np.argsort(-chances[likely], kind="stable")]
            told.add(EXPECT, layer, likely)
            told.add(PREFETCH, layer, likely)

    for index, kind in enumerate(events.kinds):
        layer = int(events.layers[index])
        experts = events.experts[events.expert_offsets[index] : events.expert_offsets[index + 1]]
        values = events.values[events.value_offsets[index] : events.value_offsets[index + 1]]
        if kind == ROUTES:
            routes = experts.tolist()
        if kind == REQUEST and layer == 0 and began:
            announce(0)  # the token is known
        told.add(int(kind), layer, experts, values, int(events.counts[index]))
        if kind == REQUEST:
            memory.observe(layer, experts.tolist(), int(events.counts[index]), routes)
            routes, began = [], True
            if layer + 1 < num_layers:
                announce(layer + 1)
    return told.events()
