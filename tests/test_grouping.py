"""Grouping sequences by the experts they use: against brute force and hand-made cases."""

from __future__ import annotations

import itertools

import numpy as np
import pytest

from moe_offload.grouping import (
    balanced_k_medoids,
    expected_distinct,
    hamming_similarity,
    refine,
    swaps_between,
)


def two_kinds(rng: np.random.Generator, count: int = 8) -> tuple[np.ndarray, np.ndarray]:
    """Paths of two kinds that share no page, shuffled; and each path's kind."""
    kinds = np.repeat([0, 1], count // 2)
    rng.shuffle(kinds)
    paths = np.zeros((count, 40), dtype=bool)
    for row, kind in enumerate(kinds):
        paths[row, rng.choice(20, 12, replace=False) + 20 * kind] = True
    return paths, kinds


def test_similarity_is_one_minus_the_share_of_differing_pages() -> None:
    paths = np.array([[1, 1, 0, 0], [1, 0, 1, 0], [1, 1, 0, 0]], dtype=bool)
    expected = np.array([[1, 0.5, 1], [0.5, 1, 0.5], [1, 0.5, 1]])
    np.testing.assert_allclose(hamming_similarity(paths), expected)


@pytest.mark.parametrize("seed", range(5))
def test_k_medoids_separates_two_kinds(seed: int) -> None:
    paths, kinds = two_kinds(np.random.default_rng(seed))
    groups = balanced_k_medoids(paths, [4, 4])
    assert len(set(zip(groups.tolist(), kinds.tolist(), strict=True))) == 2


@pytest.mark.parametrize("sizes", [[3], [5, 2], [2, 2, 2], [1, 4, 1]])
def test_k_medoids_keeps_the_sizes(sizes: list[int]) -> None:
    paths = np.random.default_rng(0).random((sum(sizes), 30)) < 0.3
    groups = balanced_k_medoids(paths, sizes)
    assert np.bincount(groups, minlength=len(sizes)).tolist() == sizes


def test_expected_distinct_is_the_expectation() -> None:
    probabilities = np.array([[0.5, 0.0], [0.5, 1.0], [0.25, 0.0]])
    found = expected_distinct(probabilities, np.array([0, 0, 1]), 2)
    np.testing.assert_allclose(found, [0.75 + 1.0, 0.25], atol=2e-3)  # p is capped at 0.999


@pytest.mark.parametrize("seed", range(4))
def test_refine_reaches_a_grouping_no_exchange_improves(seed: int) -> None:
    rng = np.random.default_rng(seed)
    probabilities = rng.random((8, 24)) * (rng.random((8, 24)) < 0.4)
    start = np.array([0, 1] * 4)
    groups, swaps = refine(probabilities, start, min_gain=1e-9, max_swaps=100)

    def cost(candidate: np.ndarray) -> float:
        return float(expected_distinct(probabilities, candidate, 2).sum())

    replayed = start.copy()
    for i, j in swaps:
        before = cost(replayed)
        replayed[i], replayed[j] = replayed[j], replayed[i]
        assert cost(replayed) < before
    np.testing.assert_array_equal(replayed, groups)
    for i, j in itertools.combinations(range(8), 2):
        other = groups.copy()
        other[i], other[j] = other[j], other[i]
        assert cost(other) >= cost(groups) - 1e-9, (i, j)


def test_refine_leaves_what_is_not_worth_moving() -> None:
    probabilities = np.eye(4) * 0.5  # nobody shares anything: every grouping is as good
    groups, swaps = refine(probabilities, np.array([0, 0, 1, 1]), min_gain=0.1, max_swaps=10)
    assert swaps == []
    assert groups.tolist() == [0, 0, 1, 1]


@pytest.mark.parametrize("seed", range(1, 6))  # of 0 only one swap is worth it
def test_refine_makes_the_best_swap_of_all_groups_each_time(seed: int) -> None:
    """Against trying each pair; four groups, so that most pairs of groups outlive a swap."""
    rng = np.random.default_rng(seed)
    probabilities = (rng.random((12, 30)) ** 3 * (rng.random((12, 30)) < 0.6)).astype(np.float32)
    start = rng.permutation(np.repeat(range(4), 3))

    def cost(candidate: np.ndarray) -> float:
        return float(expected_distinct(probabilities.astype(float), candidate, 4).sum())

    now, expected = start.copy(), []
    while len(expected) < 5:
        tried = {}
        for i, j in itertools.combinations(range(12), 2):
            if now[i] != now[j]:
                other = now.copy()
                other[i], other[j] = other[j], other[i]
                tried[(i, j) if now[i] < now[j] else (j, i)] = cost(now) - cost(other)
        best = max(tried, key=lambda pair: tried[pair])
        if tried[best] <= 0.05:
            break
        now[best[0]], now[best[1]] = now[best[1]], now[best[0]]
        expected.append(best)
    groups, swaps = refine(probabilities, start, min_gain=0.05, max_swaps=5)
    assert swaps == expected
    assert len(swaps) > 1
    np.testing.assert_array_equal(groups, now)


@pytest.mark.parametrize("seed", range(6))
def test_swaps_reach_the_target_up_to_names(seed: int) -> None:
    rng = np.random.default_rng(seed)
    groups = rng.permutation(np.repeat([0, 1, 2], [4, 4, 3]))
    target = rng.permutation(groups)
    now = groups.copy()
    for i, j in swaps_between(groups, target):
        now[i], now[j] = now[j], now[i]
    pairs = set(zip(now.tolist(), target.tolist(), strict=True))
    assert len(pairs) == 3, "each group now is exactly one target group"


def test_a_grouping_with_other_names_needs_no_swaps() -> None:
    assert swaps_between(np.array([0, 0, 1, 1]), np.array([1, 1, 0, 0])) == []
