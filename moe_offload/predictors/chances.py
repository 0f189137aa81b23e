"""What a predictor's score is worth: the chance that an absent page will be used, learned live.

Scores are not chances, and a page that is absent is less likely to be used than a resident one of
the same score: popular experts are the resident ones. So for each moment of prediction the range
of scores is cut into bins, and each bin counts how often its absent pages were then used. The
score itself counts as a few observations, and old counts fade, so what was given up is tried
again after a while.
"""

from __future__ import annotations

_BINS = 20  # of scores in [0, 1]
_PRIOR_WEIGHT = 4.0  # observations that the score itself counts as
_MEMORY = 0.998  # of the counts, per model call: half is forgotten after 350 calls


class Chances:
    """Learned chances for one moment of prediction."""

    def __init__(self) -> None:
        self._used = [(i + 0.5) / _BINS * _PRIOR_WEIGHT for i in range(_BINS)]
        self._total = [_PRIOR_WEIGHT] * _BINS

    def chance(self, score: float) -> float:
        """Chance in [0, 1] that an absent page with this score is used."""
        bin_ = min(int(score * _BINS), _BINS - 1)
        return self._used[bin_] / self._total[bin_]

    def learn(self, score: float, used: bool) -> None:
        """An absent page with this score was, or was not, used."""
        bin_ = min(int(score * _BINS), _BINS - 1)
        self._total[bin_] += 1
        self._used[bin_] += used

    def fade(self) -> None:
        """Forget a little; called once per model call."""
        for i in range(_BINS):
            prior = (i + 0.5) / _BINS * _PRIOR_WEIGHT
            self._used[i] = prior + (self._used[i] - prior) * _MEMORY
            self._total[i] = _PRIOR_WEIGHT + (self._total[i] - _PRIOR_WEIGHT) * _MEMORY
