"""From predictions to copies: decides what is worth prefetching, starts it, and keeps the score.

A wrong prefetch moves as many bytes as a right one saves, so a page is fetched ahead only when the
chance that it will be used is at least `prefetch_threshold` of the configuration (1/2: expected
bytes saved >= expected bytes wasted); `csrc/predictors/ranking.h` learns that chance from the
predictor's score.

How many: what fits into the time until the layer needs it. That time is measured, and so is what
a miss costs (stall per missed page); their ratio is the budget of one event, most probable pages
and nearest layers first. One page more is begun, because a demand joins a copy on its way. What a
newer prediction no longer names is cancelled.

Policies that evict by predicted next use are told every prediction, prefetched or not.

Everything runs in the model's thread, after the layer's own misses were requested; the copies run
in the pager's threads, behind every demand.
"""

from __future__ import annotations

import math
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any

import numpy as np
from torch import Tensor, nn

from moe_offload._core import Chances, Ranking, fetch_ahead, tell_policy
from moe_offload.huggingface.observe import ModelCall, Observer, observe
from moe_offload.predictors.base import Predictions, Predictor, facts_of
from moe_offload.predictors.metrics import LiveRecall

if TYPE_CHECKING:
    from moe_offload.offloader import Offloader


class PrefetchDriver:
    """Runs one predictor for one offloaded model.

    Args:
        model: the offloaded model; not kept.
        offloader: its offloader.
        predictor: bound here.
        threshold: least chance of use for a prefetch, in (0, 1].
        max_rows: calls of more tokens than this (prompts) are not prefetched for.

    Raises:
        PredictorError: the predictor does not fit the model.
    """

    def __init__(
        self,
        model: nn.Module,
        offloader: Offloader,
        predictor: Predictor,
        *,
        threshold: float,
        max_rows: int = 64,
    ) -> None:
        self.predictor, self.threshold, self.max_rows = predictor, threshold, max_rows
        self._handles = [offloader.handle(i) for i in range(len(offloader.layers))]
        self._tells_policy = any(h.pool.pager.uses_predictions for h in self._handles)
        experts = [layer.num_experts for layer in offloader.layers]
        self.facts = facts_of(model, experts, [layer.name for layer in offloader.layers])
        self.paused = False  # while the model runs on its own parameters
        # What nobody asked for by name need not be scored either when there is nothing to fetch.
        self._rests_when_full = offloader.config.predictor == "auto"
        self._thread = 0
        self._call: ModelCall | None = None
        self._routed: tuple[int, Tensor, Tensor] | None = None
        self._standing: dict[int, _Asked] = {}  # by layer: said when the token was known
        self._asked: dict[int, list[_Asked]] = {}  # by layer, until it is routed
        self._started: dict[int, list[int]] = {}  # by layer: prefetches of this call
        self._lead_ns: dict[str, float] = {}  # by moment: from the prediction to its use
        self._miss_ns = 0.0
        self._chances: dict[str, Chances] = {}
        self._wanted = False
        self._begin_ns = self._spent_before = 0
        self._stall_seen = (0, 0)
        self.reset()
        predictor.bind(model, self.facts)
        try:
            self._observing = observe(model, _observer(self, predictor))
        except BaseException:
            predictor.close()
            raise
        for handle in self._handles:
            handle.pool.on_acquired = self._acquired
        self._pools = [(handle.pool, handle.layer) for handle in self._handles]

    @contextmanager
    def replaced_by(self, predictor: Predictor) -> Iterator[None]:
        """Let another predictor speak for a while; it must not read layer inputs."""
        mine, self.predictor = self.predictor, predictor
        try:
            yield
        finally:
            self.predictor = mine

    # --- what the model does -------------------------------------------------------------------

    def call_begins(self, call: ModelCall) -> None:
        if self.paused or (self._call is not None and self._thread != threading.get_ident()):
            return  # another thread's call: predictions follow the first one only
        begin = time.perf_counter_ns()
        self._call, self._thread = call, threading.get_ident()
        self._routed = None
        self._asked.clear()
        self._standing.clear()
        for layer in [layer for layer, started in self._started.items() if started]:
            pool, local = self._pools[layer]  # the last call ended early
            pool.pager.cancel_prefetches(local)
        self._started.clear()
        self._wanted = call.batch * call.length <= self.max_rows and not (
            self._rests_when_full
            and all(handle.pool.num_slots >= handle.pool.num_pages for handle in self._handles)
        )
        self.predictor.wanted = self._wanted
        self._note(self.predictor.token_known(call), -1, "token")
        self._schedule_standing(-1)
        self._begin_ns = begin
        self._spent_ns += time.perf_counter_ns() - begin

    def layer_begins(self, layer: int, hidden: Tensor) -> None:
        if self._call is None or self._thread != threading.get_ident():
            return
        begin = time.perf_counter_ns()
        self._note(self.predictor.layer_input_known(layer, hidden), layer, "input")
        self._spent_ns += time.perf_counter_ns() - begin

    def block_begins(self, layer: int, hidden: Tensor) -> None:
        if self._call is not None and self._thread == threading.get_ident():
            self.predictor.block_input_known(layer, hidden)

    def layer_routed(self, layer: int, topk_ids: Tensor, topk_weights: Tensor) -> None:
        if self._call is not None and self._thread == threading.get_ident():
            self._routed = (layer, topk_ids, topk_weights)

    def _acquired(self) -> None:
        """The routed layer's misses were requested: from now on the link is free for us."""
        if self._routed is None or self._thread != threading.get_ident():
            return
        begin = time.perf_counter_ns()
        (layer, ids, weights), self._routed = self._routed, None
        self._score(layer, ids, begin)
        self._note(self.predictor.layer_routed(layer, ids, weights), layer, "routed")
        self._schedule_standing(layer)
        self._spent_ns += time.perf_counter_ns() - begin

    def call_ends(self, call: ModelCall) -> None:
        if self._call is not call:
            return
        now = time.perf_counter_ns()
        self._call = None
        if self._wanted:
            self._steps += 1
            self._step_ns += now - self._begin_ns
            self._step_spent_ns += self._spent_ns - self._spent_before
            if self._steps % 4 == 1:
                self._measure_miss()
            for chances in self._chances.values():
                chances.fade()
        self._spent_before = self._spent_ns

    # --- predictions to copies -----------------------------------------------------------------

    def _note(self, predictions: Predictions, now: int, moment: str) -> None:
        """Remember what is said about layers to come; near ones are scheduled at once."""
        if self.predictor.obeyed:
            self._obey(predictions)
            if self.predictor.scored and self._wanted:
                for layer, scores in predictions:
                    asked = _Asked(f"{moment}+{layer - now}", scores)
                    self._asked.setdefault(layer, []).append(asked)
            return
        if not self._wanted:
            return
        for layer, scores in predictions:
            asked = _Asked(f"{moment}+{layer - now}" if now >= 0 else moment, scores)
            self._asked.setdefault(layer, []).append(asked)
            if self._tells_policy:
                pool, local = self._pools[layer]
                tell_policy(pool.pager, local, asked.ranking)
            if now < 0:
                self._standing[layer] = asked  # its turn comes
            else:
                self._standing.pop(layer, None)
                self._schedule(layer, asked)

    def _obey(self, predictions: Predictions) -> None:
        """Fetch what is named, as long as there are slots that hold nothing named before."""
        for layer, scores in predictions:
            pool, local = self._pools[layer]
            named: list[int] = np.flatnonzero(scores.max(axis=0) >= 0.5).tolist()
            absent = pool.pager.expect(local, named)
            started = pool.pager.prefetch(local, absent)
            self._started_pages += started
            if started < len(absent):
                break

    def _schedule_standing(self, now: int) -> None:
        """What found no slot stands on: the next layer routed frees those of the one before."""
        for layer in range(now + 1, now + 1 + self.predictor.horizon):
            asked = self._standing.get(layer)
            if asked is not None and self._schedule(layer, asked):
                del self._standing[layer]

    def _schedule(self, layer: int, asked: _Asked) -> bool:
        """Fetch what is likely and absent, within the budget; cancel what is not likely now.

        Returns:
            False when slots ran out.
        """
        pool, local = self._pools[layer]
        if pool.num_slots >= pool.num_pages:
            return True  # everything is resident
        chances = self._chances.get(asked.moment)
        if chances is None:
            chances = self._chances[asked.moment] = Chances()
        any_likely, absent, begun, complete, self._started[layer] = fetch_ahead(
            pool.pager,
            local,
            asked.ranking,
            chances,
            self.threshold,
            asked.ranking.rows * self._candidates(),
            self._budget(asked.moment),
            self._started.get(layer, []),
        )
        if any_likely:
            self._started_pages += begun
            asked.absent.update(absent)
            asked.begin_ns = asked.begin_ns or time.perf_counter_ns()
        return complete

    def _candidates(self) -> int:
        """Experts a token may have fetched: the one of rank r has a chance of A / r at most."""
        deep = max(self.recall.deep, 1)
        if self.threshold >= 0.5:
            return deep
        return max(deep, math.ceil(self.recall.top_k / self.threshold))

    def _budget(self, moment: str) -> int:
        """Pages whose copies fit into the time until they are needed, and one that may not."""
        lead_ns = self._lead_ns.get(moment)
        if lead_ns is None or self._miss_ns <= 0:
            return self.max_rows
        return 1 + round(lead_ns / self._miss_ns)

    # --- the score -----------------------------------------------------------------------------

    def _score(self, layer: int, topk_ids: Tensor, now_ns: int) -> None:
        self._started.pop(layer, None)
        asked_list = self._asked.pop(layer, None)
        if not self._wanted:
            return
        if self.recall.top_k == 0:
            self.recall.begin(topk_ids.shape[1])
        if asked_list is None:
            return
        used = topk_ids.cpu().numpy()
        for asked in asked_list:
            self.recall.add(asked.moment, layer, asked.ranking, used)
            if asked.begin_ns:
                lead = now_ns - asked.begin_ns
                before = self._lead_ns.get(asked.moment, lead)
                self._lead_ns[asked.moment] = 0.9 * before + 0.1 * lead
            if asked.absent:
                asked.ranking.teach(self._chances[asked.moment], list(asked.absent), used)

    def _measure_miss(self) -> None:
        """Seconds the model waits per page it misses, from the pagers' own counters."""
        stall = misses = 0
        for pool in {id(pool): pool for pool, _ in self._pools}.values():
            counters = pool.counters()
            stall += sum(counters["stall_ns"])
            misses += sum(counters["demand_misses"])
        before_stall, before_misses = self._stall_seen
        self._stall_seen = (stall, misses)
        if misses > before_misses:  # also false after reset_counters
            latest = (stall - before_stall) / (misses - before_misses)
            self._miss_ns = latest if self._miss_ns == 0 else 0.8 * self._miss_ns + 0.2 * latest

    # --- telemetry and life --------------------------------------------------------------------

    def reset(self) -> None:
        """Forget the counts; what was learned about chances stays."""
        self.recall = LiveRecall(self.facts.num_layers, self.facts.top_k or 0)
        self._spent_ns: int = 0  # in the predictor and here
        self._spent_before = 0
        self._steps: int = 0  # calls of few tokens, with their time and our part of it
        self._step_ns: int = 0
        self._step_spent_ns: int = 0
        self._started_pages: int = 0
        self._stall_seen = (0, 0)

    def stats(self, totals: dict[str, Any]) -> dict[str, Any]:
        """What `stats()["predictor"]` shows; `totals` are the offloader's own sums."""
        used, wasted = totals["prefetch_bytes_used"], totals["prefetch_bytes_wasted"]
        return {
            "name": self.predictor.name,
            "steps": self._steps,
            "seconds": self._spent_ns / 1e9,
            "seconds_per_step": self._step_spent_ns / 1e9 / max(self._steps, 1),
            "share_of_step": self._step_spent_ns / self._step_ns if self._step_ns else 0.0,
            "threshold": self.threshold,
            "prefetches_started": self._started_pages,
            "demand_bytes_saved": used,
            "net_bytes_saved": used - wasted,
            # a hit that a prefetch made, at what a miss costs at present; joined ones not counted
            "stall_seconds_removed_estimate": totals["prefetch_hits"] * self._miss_ns / 1e9,
            "stall_seconds_per_miss": self._miss_ns / 1e9,
            "lead_seconds": {name: ns / 1e9 for name, ns in sorted(self._lead_ns.items())},
            "recall": self.recall.summary(),
            **self.predictor.report(),
        }

    def close(self) -> None:
        """Take every hook off the model. Idempotent."""
        self._observing.close()
        self.predictor.close()
        for handle in self._handles:
            handle.pool.on_acquired = None


class _Asked:
    """One prediction, kept until its layer is routed.

    Attributes:
        moment: when it was made, see `LiveRecall`.
        ranking: what was said.
        absent: which of the likely ones were absent. begin_ns: when copies were first asked for.
    """

    __slots__ = ("absent", "begin_ns", "moment", "ranking")

    def __init__(self, moment: str, scores: np.ndarray) -> None:
        self.moment, self.ranking = moment, Ranking(scores)
        self.absent: set[int] = set()
        self.begin_ns = 0


def _observer(driver: PrefetchDriver, predictor: Predictor) -> Observer:
    """An observer that hooks what this predictor needs, and no more."""

    class Events(Observer):
        def call_begins(self, call: ModelCall) -> None:
            driver.call_begins(call)

        def layer_routed(self, layer: int, topk_ids: Tensor, topk_weights: Tensor) -> None:
            driver.layer_routed(layer, topk_ids, topk_weights)

        def call_ends(self, call: ModelCall) -> None:
            driver.call_ends(call)

    extra: dict[str, Any] = {}
    if type(predictor).layer_input_known is not Predictor.layer_input_known:
        extra["layer_begins"] = lambda self, layer, hidden: driver.layer_begins(layer, hidden)
    if type(predictor).block_input_known is not Predictor.block_input_known:
        extra["block_begins"] = lambda self, layer, hidden: driver.block_begins(layer, hidden)
    observer: Observer = type("Events", (Events,), extra)()
    return observer
