"""How predictions are judged: recall per token, and ExpertFlow's recall per batch.

Two numbers that are easily confused. *Recall@k per token*: of the A experts a token used in a
layer, the share among the k most probable ones for that token. *Batch recall* (arXiv 2410.17954):
both sides are first united over the tokens of a step, so the candidate set grows with the batch
and the number with it. The second always comes with the size of its candidate set here.
"""

from __future__ import annotations

import numpy as np

from moe_offload._core import FoundPerLayer, Ranking


class RecallMeter:
    """Accumulates recall over decoding steps of several sequences at once.

    Args:
        num_layers, num_experts, top_k: L, E, A.
        extra: m of recall@(A + m).
    """

    def __init__(self, num_layers: int, num_experts: int, top_k: int, *, extra: int = 2) -> None:
        self.top_k, self.extra = top_k, extra
        self.num_layers, self.num_experts = num_layers, num_experts
        self.tokens = 0
        self._found = {k: np.zeros(num_layers) for k in self._per_token()}
        self._batch: dict[tuple[int, float], list[np.ndarray]] = {}

    def _per_token(self) -> tuple[int, int]:
        return self.top_k, self.top_k + self.extra

    def add_tokens(self, scores: np.ndarray, truth: np.ndarray) -> np.ndarray:
        """Tokens that need not share a step: scores [R, L, E], truth [R, L, E] bool.

        Returns:
            [R, L, E] experts, most probable first.
        """
        self.tokens += len(scores)
        ranked = np.argsort(-scores, axis=-1, kind="stable")
        hits = np.take_along_axis(truth, ranked, -1)
        for k in self._per_token():
            self._found[k] += hits[..., :k].sum((0, 2)) / self.top_k
        return ranked

    def add_step(self, scores: np.ndarray, truth: np.ndarray) -> None:
        """The tokens of one step, one of each sequence: also counted as batches of 1, 4, 16."""
        ranked = self.add_tokens(scores, truth)
        for size in (1, 4, 16):
            for begin in range(0, len(scores) - size + 1, size):
                part = slice(begin, begin + size)
                used = truth[part].any(0)  # [L, E]
                for factor in (1.0, 1.5, 2.0):
                    k = round(self.top_k * factor)
                    chosen = np.zeros_like(truth[part])
                    np.put_along_axis(chosen, ranked[part, :, :k], True, -1)
                    union = chosen.any(0)
                    recall = (used & union).sum(-1) / used.sum(-1)
                    row = self._batch.setdefault((size, factor), [np.zeros(4), np.zeros(1)])
                    row[0] += [
                        recall.mean(),
                        union.sum(-1).mean(),
                        used.sum(-1).mean(),
                        (used & union).sum() / max(union.sum(), 1),
                    ]
                    row[1] += 1

    def summary(self) -> dict[str, object]:
        """JSON-ready: per-token recall (mean, per layer) and batch recall with candidate sets."""
        near, far = self._per_token()
        tokens = max(self.tokens, 1)
        return {
            "tokens": self.tokens,
            "top_k": self.top_k,
            "num_experts": self.num_experts,
            f"recall@{near}": float((self._found[near] / tokens).mean()),
            f"recall@{far}": float((self._found[far] / tokens).mean()),
            f"recall@{near}_per_layer": (self._found[near] / tokens).round(4).tolist(),
            f"recall@{far}_per_layer": (self._found[far] / tokens).round(4).tolist(),
            "batch": [
                {
                    "batch": size,
                    "candidates_per_token": round(self.top_k * factor),
                    "recall": float(sums[0] / count[0]),
                    "candidate_set": float(sums[1] / count[0]),
                    "experts_used": float(sums[2] / count[0]),
                    "precision": float(sums[3] / count[0]),
                    "steps": int(count[0]),
                }
                for (size, factor), (sums, count) in sorted(self._batch.items())
            ],
        }


class LiveRecall:
    """Recall of predictions against what was then routed, per layer and per moment.

    A moment is when the prediction was made: "token" (token known), "input+0" (the layer's own
    input known), "routed+1" (one layer before), ...
    """

    def __init__(self, num_layers: int, top_k: int) -> None:
        self._num_layers = num_layers
        self.top_k = self.deep = 0
        self._found: dict[str, FoundPerLayer] = {}  # by moment: tokens, found in A and in A + m
        if top_k:
            self.begin(top_k)

    def begin(self, top_k: int) -> None:
        """Set A; m is A / 2, at least one."""
        self.top_k = top_k
        self.deep = top_k + max(1, top_k // 2)

    def add(self, moment: str, layer: int, ranking: Ranking, used: np.ndarray) -> None:
        """One prediction against the ids [R, A] that were used; rows of ids >= E do not count."""
        sums = self._found.get(moment)
        if sums is None:
            sums = self._found[moment] = FoundPerLayer(self._num_layers)
        sums.add(layer, ranking, used, self.top_k, self.deep)

    def summary(self) -> dict[str, object]:
        """JSON-ready, empty before the first scored prediction."""
        found: dict[str, object] = {}
        for moment, sums in sorted(self._found.items()):
            tokens, near, deep = sums.sums()
            seen = tokens > 0
            layers = np.flatnonzero(seen).tolist()
            if not layers:  # of other tokens
                continue
            a = near[seen] / tokens[seen] / self.top_k
            am = deep[seen] / tokens[seen] / self.top_k
            found[moment] = {
                "tokens": int(tokens.max()),
                "top_k": self.top_k,
                "candidates": self.deep,
                "recall_at_top_k": float(a.mean()),
                "recall_at_candidates": float(am.mean()),
                "layers": layers,
                "recall_at_top_k_per_layer": [round(float(x), 4) for x in a],
                "recall_at_candidates_per_layer": [round(float(x), 4) for x in am],
            }
        return found
