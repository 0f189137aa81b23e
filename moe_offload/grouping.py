"""Which sequences should share a batch: those that use the same experts.

A batch loads every expert that any of its sequences needs, so what a step costs is the size of the
union. ExpertFlow (arXiv 2410.17954, section 1.3 "Token Scheduler") groups by balanced K-medoids on
the Hamming similarity of routing paths. That is the start here; `refine` then swaps pairs as long
as the expected union itself gets smaller, which is the objective K-medoids only approximates, and
which moves few sequences when the groups are nearly right already.

A path is a row over all (layer, expert) pages, P = L * E columns: 0/1 for K-medoids, the
probability that the sequence's next token uses the page for everything else.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
from numpy.typing import NDArray

Floats = NDArray[np.floating]
Ints = NDArray[np.integer]


def hamming_similarity(paths: NDArray[np.bool_]) -> Floats:
    """1 - Hamming distance / P of every pair of paths, [n, P] -> [n, n]."""
    # Whole numbers: numpy multiplies those itself. A BLAS would leave its threads spinning on the
    # cores the model is about to need (csrc/predictors/dense.h).
    used = paths.astype(np.int32)
    counts = used.sum(axis=1)
    differing = counts[:, None] + counts[None, :] - 2 * (used @ used.T)
    similarity: Floats = 1.0 - differing / paths.shape[1]
    return similarity


def balanced_k_medoids(
    paths: NDArray[np.bool_], sizes: Sequence[int], max_iterations: int = 30
) -> Ints:
    """Split n sequences into groups of the given sizes, similar paths together.

    Args:
        paths: [n, P], which pages each sequence uses.
        sizes: sequences per group, summing to n.
        max_iterations: rounds of assigning and choosing medoids, as in the paper.

    Returns:
        [n] group of each sequence. Deterministic: ties go to the lower index.
    """
    similarity = hamming_similarity(paths)
    # The member most like all others, then always the one least like the medoids so far.
    medoids = [int(similarity.sum(axis=1).argmax())]
    while len(medoids) < len(sizes):
        nearest = similarity[:, medoids].max(axis=1)
        nearest[medoids] = np.inf
        medoids.append(int(nearest.argmin()))
    groups = _assign(similarity[:, medoids], sizes)
    for _ in range(max_iterations):
        chosen = []
        for group in range(len(sizes)):
            members = np.flatnonzero(groups == group)
            within = similarity[np.ix_(members, members)].sum(axis=1)
            chosen.append(int(members[within.argmax()]))
        if chosen == medoids:
            break
        medoids = chosen
        groups = _assign(similarity[:, medoids], sizes)
    return groups


def _assign(similarity: Floats, sizes: Sequence[int]) -> Ints:
    """[n, G] similarities to the medoids -> [n] groups; who would lose most chooses first."""
    if similarity.shape[1] > 1:
        best_two = np.sort(similarity, axis=1)[:, -2:]
        order = np.argsort(best_two[:, 0] - best_two[:, 1], kind="stable")
    else:
        order = np.arange(len(similarity))
    room = np.array(sizes)
    groups = np.empty(len(similarity), dtype=np.int64)
    for index in order:
        open_groups = np.where(room > 0, similarity[index], -np.inf)
        groups[index] = int(open_groups.argmax())
        room[groups[index]] -= 1
    return groups


def expected_distinct(probabilities: Floats, groups: Ints, num_groups: int) -> Floats:
    """Expected number of distinct pages each group uses in a step, [n, P], [n] -> [G].

    Tokens are taken as independent: 1 - prod(1 - p) per page.
    """
    absent = np.log1p(-np.minimum(probabilities, 0.999))
    unused = np.zeros((num_groups, probabilities.shape[1]))
    np.add.at(unused, groups, absent)
    return (1.0 - np.exp(unused)).sum(axis=1)


def refine(
    probabilities: Floats, groups: Ints, min_gain: float, max_swaps: int
) -> tuple[Ints, list[tuple[int, int]]]:
    """Swap sequences between groups while that saves pages.

    Args:
        probabilities: [n, P], chance that a sequence's next token uses a page.
        groups: [n], where they are now.
        min_gain: expected pages per step a swap has to save; what moving two sequences costs.
        max_swaps: at most this many.

    Returns:
        New groups, and the swaps in order, as pairs of sequences. The best swap goes first.
        Cost: 4 P operations for each pair whose groups the last swap changed.
    """
    groups = groups.copy()
    num_groups = int(groups.max()) + 1
    kept = 1.0 - np.minimum(probabilities, 0.999, dtype=np.float64)
    absent = np.log(kept)
    unused = np.zeros((num_groups, probabilities.shape[1]))
    np.add.at(unused, groups, absent)
    swaps: list[tuple[int, int]] = []
    best_of: dict[tuple[int, int], tuple[float, tuple[int, int]]] = {}  # by pair of groups
    while len(swaps) < max_swaps:
        best_gain, best = min_gain, None
        for a in range(num_groups):
            for b in range(a + 1, num_groups):
                if (a, b) not in best_of:
                    best_of[a, b] = _best_swap(kept, groups, unused, a, b)
                gain, pair = best_of[a, b]
                if gain > best_gain:
                    best_gain, best = gain, pair
        if best is None:
            break
        i, j = best
        changed = {int(groups[i]), int(groups[j])}
        best_of = {pair: found for pair, found in best_of.items() if not changed & set(pair)}
        moved = absent[j] - absent[i]
        unused[groups[i]] += moved
        unused[groups[j]] -= moved
        groups[i], groups[j] = groups[j], groups[i]
        swaps.append(best)
    return groups, swaps


def _best_swap(
    kept: Floats, groups: Ints, unused: Floats, a: int, b: int
) -> tuple[float, tuple[int, int]]:
    """The swap between two groups that saves most, and how many pages per step it saves."""
    in_a, in_b = np.flatnonzero(groups == a), np.flatnonzero(groups == b)
    if not len(in_a) or not len(in_b):
        return -np.inf, (0, 0)
    # Pages a group leaves alone once i has gone and j has come: all / kept[i] * kept[j], summed
    # over pages. So all pairs at once are one product, [|a|, 2 P] times [2 P, |b|].
    all_a, all_b = np.exp(unused[a]), np.exp(unused[b])
    leaving, coming = kept[in_a], kept[in_b]
    left = np.concatenate((all_a / leaving, leaving), axis=1)
    right = np.concatenate((coming, all_b / coming), axis=1)
    # Not `@`, which is a BLAS (see hamming_similarity); einsum by itself calls none.
    after = np.einsum("ip,jp->ij", left, right, optimize=False)
    gain = after - (all_a + all_b).sum()
    i, j = np.unravel_index(int(gain.argmax()), gain.shape)
    return float(gain[i, j]), (int(in_a[i]), int(in_b[j]))


def swaps_between(groups: Ints, target: Ints) -> list[tuple[int, int]]:
    """Exchanges that turn one grouping into another of the same sizes, up to the groups' names.

    Groups are renamed first so that most sequences stay: each target group takes the name of the
    present group it shares most members with.
    """
    num_groups = int(groups.max()) + 1
    shared = np.zeros((num_groups, num_groups), dtype=np.int64)
    np.add.at(shared, (target, groups), 1)
    sizes = np.bincount(groups, minlength=num_groups)
    name = np.full(num_groups, -1)
    taken: set[int] = set()
    for flat in np.argsort(-shared, axis=None, kind="stable"):
        wanted, present = divmod(int(flat), num_groups)
        fits = np.count_nonzero(target == wanted) == sizes[present]
        if name[wanted] < 0 and present not in taken and fits:
            name[wanted] = present
            taken.add(present)
    wanted_groups = name[target]
    now, swaps = groups.copy(), []
    for i in range(len(now)):
        if now[i] == wanted_groups[i]:
            continue
        candidates = np.flatnonzero((now == wanted_groups[i]) & (wanted_groups != now))
        # Someone who wants to be here, if there is one: that settles two at once.
        both = candidates[wanted_groups[candidates] == now[i]]
        j = int((both if len(both) else candidates)[0])
        swaps.append((i, j))
        now[i], now[j] = now[j], now[i]
    return swaps
