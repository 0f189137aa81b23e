"""What the prefetch driver does with scores natively, against the same in numpy and Python."""

import numpy as np
import pytest

from moe_offload._core import Chances, FoundPerLayer, Ranking
from moe_offload.predictors.metrics import LiveRecall

SHAPES = [(1, 32, 4), (4, 32, 4), (16, 64, 8), (3, 5, 2), (2, 1, 1)]  # R, E, A


def case(rows: int, experts: int, top_k: int, seed: int) -> tuple[np.ndarray, np.ndarray]:
    """Scores [R, E], a third of them equal, and ids [R, A], some rows of them padding."""
    random = np.random.default_rng(seed)
    scores = random.random((rows, experts)).astype(np.float32)
    scores[random.random(scores.shape) < 0.3] = 0.25
    used = np.argsort(random.random((rows, experts)), axis=1)[:, :top_k]
    used[random.random(rows) < 0.2] = experts
    return scores, used


class PythonChances:
    """Used and seen per bin, as lists."""

    def __init__(self) -> None:
        self.used = [(i + 0.5) / 20 * 4.0 for i in range(20)]
        self.total = [4.0] * 20

    def chance(self, score: float) -> float:
        return self.used[min(int(score * 20), 19)] / self.total[min(int(score * 20), 19)]

    def learn(self, score: float, used: bool) -> None:
        self.total[min(int(score * 20), 19)] += 1
        self.used[min(int(score * 20), 19)] += used

    def fade(self) -> None:
        for i in range(20):
            prior = (i + 0.5) / 20 * 4.0
            self.used[i] = prior + (self.used[i] - prior) * 0.998
            self.total[i] = 4.0 + (self.total[i] - 4.0) * 0.998


@pytest.mark.parametrize(("rows", "experts", "top_k"), SHAPES)
def test_ranks_and_recall_are_those_of_numpy(rows: int, experts: int, top_k: int) -> None:
    live = LiveRecall(2, top_k)
    sums = np.zeros((3, 2))
    for seed in range(50):
        scores, used = case(rows, experts, top_k, seed)
        wide = np.full((rows, 3, experts), np.nan, np.float32)
        wide[:, 1] = scores
        ranking = Ranking(wide[:, 1])  # a view, as a predictor of all layers gives it
        live.add("token", seed % 2, ranking, used)

        any_row = scores[0] if rows == 1 else 1 - np.prod(1 - scores, axis=0)
        assert ranking.chance == any_row.tolist()
        assert ranking.order == np.argsort(-any_row, kind="stable").tolist()
        ranked = np.argsort(-scores, axis=1, kind="stable")
        hits = (ranked[:, : live.deep, None] == used[:, None, :]).any(-1)
        sums[0, seed % 2] += sum(min(row) < experts for row in used.tolist())
        sums[1, seed % 2] += hits[:, :top_k].sum()
        sums[2, seed % 2] += hits.sum()
    np.testing.assert_array_equal(live._found["token"].sums(), sums)
    if sums[0].all():
        mean = (sums[1] / sums[0] / top_k).mean()
        assert live.summary()["token"]["recall_at_top_k"] == pytest.approx(mean)


def test_a_prediction_for_other_tokens_is_not_scored() -> None:
    live = LiveRecall(1, 2)
    live.add("token", 0, Ranking(np.ones((3, 8))), np.array([[1, 2]]))
    assert live.summary() == {}


def test_what_is_likely_is_learned_as_in_python() -> None:
    chances, oracle = Chances(), PythonChances()
    random = np.random.default_rng(0)
    for step in range(300):
        scores, used = case(4, 32, 4, step)
        ranking = Ranking(scores)
        threshold, count = float(random.choice([0.3, 0.5, 0.7])), int(random.integers(0, 40))
        likely = ranking.likely(chances, threshold, count)
        best = ranking.order[:count]
        assert likely == [e for e in best if oracle.chance(ranking.chance[e]) >= threshold]
        absent = random.permutation(32)[:7].tolist()
        ranking.teach(chances, absent, used)
        for expert in absent:
            oracle.learn(ranking.chance[expert], expert in used)
        chances.fade()
        oracle.fade()
    for score in np.linspace(0, 1, 101, dtype=np.float32).tolist():
        assert chances.chance(score) == oracle.chance(score)


def test_wrong_shapes_are_refused() -> None:
    with pytest.raises(ValueError, match=r"expected scores \[rows, experts\], got \(3,\)"):
        Ranking(np.zeros(3))
    with pytest.raises(ValueError, match=r"expected scores \[rows, experts\], got \(0, 4\)"):
        Ranking(np.zeros((0, 4)))
    ranking = Ranking(np.zeros((2, 4)))
    with pytest.raises(ValueError, match=r"expected ids \[rows, top_k\], got \(2,\)"):
        FoundPerLayer(1).add(0, ranking, np.zeros(2), 1, 2)
    with pytest.raises(IndexError):
        FoundPerLayer(1).add(1, ranking, np.zeros((2, 1)), 1, 2)
    with pytest.raises(ValueError, match=r"expected experts in \[0, 4\), got 4"):
        ranking.teach(Chances(), [4], np.zeros((2, 1)))
