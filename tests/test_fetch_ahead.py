"""From a prediction to copies: what is likely and absent is fetched, what no longer is, stopped."""

import numpy as np
import pytest
from experts import random_weights, write_page_file

from moe_offload._core import Chances, Ranking, fetch_ahead, tell_policy
from moe_offload.config import OffloadConfig
from moe_offload.offloader import Offloader

EXPERTS = 10
LIMITS = (0.5, 10, 10, [])  # threshold, most, budget, started


@pytest.fixture
def offloader(tmp_path):
    layers = [random_weights(EXPERTS, 32, 16, seed=seed) for seed in range(2)]
    described, pages = write_page_file(tmp_path / "experts.bin", layers)
    with Offloader(described, pages, OffloadConfig(device_budget="50%")) as offloader:
        yield offloader


def ranking(**scores: float) -> Ranking:
    row = np.zeros((1, EXPERTS), np.float32)
    for name, score in scores.items():
        row[0, int(name[1:])] = score
    return Ranking(row)


def residents(pager) -> set[tuple[int, int]]:
    pager.drain()
    return {(layer, expert) for layer, expert, _ in pager.residents()}


def test_likely_absent_pages_are_fetched_within_the_budget(offloader) -> None:
    pager, chances = offloader.pools[0].pager, Chances()
    given = ranking(e7=0.97, e2=0.9, e4=0.8, e1=0.2)
    found = fetch_ahead(pager, 1, given, chances, 0.5, 10, 2, [])
    assert found == (True, [7, 2, 4], 2, True, [7, 2])
    assert residents(pager) == {(1, 7), (1, 2)}
    # Again: what is resident is not absent, and is remembered once.
    found = fetch_ahead(pager, 1, given, chances, 0.5, 10, 2, [7, 2])
    assert found == (True, [4], 1, True, [7, 2, 4])
    # Of the one best only, and nothing when nothing is likely.
    assert fetch_ahead(pager, 0, given, chances, 0.5, 1, 9, []) == (True, [7], 1, True, [7])
    none = fetch_ahead(pager, 0, ranking(e7=0.1), chances, 0.5, 10, 9, [7])
    assert none == (False, [], 0, True, [])


def test_what_is_no_longer_likely_is_cancelled(offloader) -> None:
    pager = offloader.pools[0].pager
    offloader.chaos(max_delay_us=200_000)  # so that copies are still on their way
    started = fetch_ahead(pager, 1, ranking(**{f"e{i}": 0.9 for i in range(8)}), Chances(), *LIMITS)
    assert started[2] == 8
    found = fetch_ahead(pager, 1, ranking(e1=0.9), Chances(), 0.5, 10, 9, started[4])
    assert found == (True, [], 0, True, [1])
    kept = residents(pager)
    assert (1, 1) in kept
    assert len(kept) < 8, "those that had not begun are gone"


def test_it_says_when_slots_ran_out(offloader) -> None:
    pager = offloader.pools[0].pager
    with pager.acquire(0, list(range(4))) as ticket:  # of ten slots, of which none may leave
        assert ticket.next()
        given = ranking(**{f"e{i}": 0.9 for i in range(10)})
        any_likely, absent, begun, complete, started = fetch_ahead(
            pager, 1, given, Chances(), *LIMITS
        )
    assert any_likely
    assert absent == list(range(10))
    assert begun == len(started) < 10
    assert not complete


def test_policies_are_told_every_chance(tmp_path) -> None:
    layers = [random_weights(EXPERTS, 32, 16, seed=seed) for seed in range(2)]
    described, pages = write_page_file(tmp_path / "experts.bin", layers)
    config = OffloadConfig(device_budget="50%", policy="forecast")
    with Offloader(described, pages, config) as offloader:
        pager = offloader.pools[0].pager
        pager.set_recording(True)
        given = ranking(e3=0.9, e5=0.25)
        tell_policy(pager, 1, given)
        one = pager.recorded()
        pager.set_recording(True)
        pager.predict(1, given.order, [given.chance[expert] for expert in given.order])
        other = pager.recorded()
        for name, values in one.items():
            np.testing.assert_array_equal(values, other[name], err_msg=name)
        assert 5 in one["experts"].tolist()
        with pytest.raises(ValueError, match="expected a layer"):
            tell_policy(pager, 2, given)
