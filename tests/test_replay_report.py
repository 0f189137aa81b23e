"""The time model by hand, and figures that exist, differ and need no network."""

import numpy as np
import pytest

from moe_offload import replay, replay_events
from moe_offload.cli import main
from moe_offload.time_model import TimeModel
from moe_offload.trace_generator import generate_trace

ROUND = TimeModel(page_bytes=1000, link_bytes_per_s=1e4, memory_bytes_per_s=1e6, other_s=0.01)


def result_of(events, num_experts=(8,), slots=4, policy="lru"):
    return replay.replay_events(events, num_experts, policy, num_slots=slots)


def test_seconds_are_the_formula():
    log = replay_events.EventList()
    log.add(
        replay_events.REQUEST, 0, [0, 1], count=1
    )  # two misses: 0.2 s of copies, 1 ms for the last
    log.add(replay_events.REQUEST, 0, [0, 1], count=1)  # two hits: 2 ms of compute
    log.add(replay_events.REQUEST, 0, [1, 2], count=1)  # one of each
    result = result_of(log.events())
    assert result.steps == 3
    assert ROUND.seconds(result, 2) == pytest.approx(0.03 + 0.201 + 0.002 + 0.101)
    assert ROUND.tokens_per_second(result, 2) == pytest.approx(3 / 0.334)


def test_swapping_back_copies_twice_and_changes_nothing_else():
    log = replay_events.EventList()
    log.add(replay_events.REQUEST, 0, [0, 1], count=1)  # two misses: 0.4 s of copies
    log.add(replay_events.REQUEST, 0, [0, 1], count=1)
    log.add(replay_events.REQUEST, 0, [1, 2], count=1)  # one more: 0.2 s
    result = result_of(log.events())
    swapping = TimeModel(1000, 1e4, 1e6, 0.01, swap_back=True)
    assert swapping.seconds(result, 2) == pytest.approx(0.03 + 0.401 + 0.002 + 0.201)
    assert ROUND.bytes_per_token(result) == pytest.approx(1000)  # three pages, three tokens
    assert swapping.bytes_per_token(result) == pytest.approx(2000)
    # The disk, when slower, is read once all the same: nothing is written to it.
    disk = TimeModel(1000, 1e9, 1e6, disk_bytes_per_s=1e3, disk_share=1.0, swap_back=True)
    assert disk.copy_s(np.array([3])) == pytest.approx(3.0)


def test_prefetches_are_free_only_while_the_link_is_idle():
    def run(prefetched):
        log = replay_events.EventList()
        log.add(replay_events.REQUEST, 0, [0], count=1)
        log.add(replay_events.REQUEST, 0, [0], count=1)  # idle link for 11 ms
        log.add(replay_events.PREFETCH, 0, list(range(1, 1 + prefetched)))
        log.add(replay_events.REQUEST, 0, [1], count=1)
        return result_of(log.events())

    slow, fast = run(1), TimeModel(1000, 1e6, 1e6, 0.01)
    assert slow.prefetch_hits == 1
    # 0.1 s of copy against the 11 ms that the call before left idle.
    base = 3 * 0.01 + 0.101 + 2 * 0.001
    assert ROUND.seconds(slow, 1) == pytest.approx(base + 0.1 - 0.011)
    assert fast.seconds(slow, 1) == pytest.approx(3 * 0.01 + 0.002 + 2 * 0.001)  # hidden
    assert fast.seconds(run(3), 1) == pytest.approx(fast.seconds(slow, 1))


def test_disk_and_flops_bound_when_they_are_slower():
    log = replay_events.EventList()
    log.add(replay_events.REQUEST, 0, [0], count=100)
    result = result_of(log.events())
    disk = TimeModel(1000, 1e4, 1e6, disk_bytes_per_s=1e3, disk_share=0.5)
    assert disk.seconds(result, 1) == pytest.approx(0.5 + 0.001)
    flops = TimeModel(1000, 1e9, 1e6, flops_per_token_expert=1e3, flops_per_s=1e6)
    assert flops.seconds(result, 2) == pytest.approx(0.2)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"page_bytes": 0}, "page_bytes must be above 0, got 0"),
        ({"link_bytes_per_s": -1}, "link_bytes_per_s must be above 0, got -1"),
        ({"disk_share": 1.5}, r"disk_share in \[0, 1\] and other_s >= 0, got 1.5 and 0.0"),
    ],
)
def test_impossible_rates_are_refused(change, message):
    rates = {"page_bytes": 1, "link_bytes_per_s": 1, "memory_bytes_per_s": 1}
    with pytest.raises(ValueError, match=message):
        TimeModel(**(rates | change))


def test_rates_can_be_measured(tmp_path):
    model = TimeModel.measured(1 << 20)
    assert model.memory_bytes_per_s > 1e8
    path = tmp_path / "weights"
    path.write_bytes(np.random.default_rng(0).bytes(3 << 20))
    assert TimeModel.measured(1 << 20, path).link_bytes_per_s > 1e6


def test_the_report_is_one_page_without_network(tmp_path, capsys):
    pytest.importorskip("matplotlib", reason='needs "moe-offload[plots]"')
    from moe_offload.replay_report import copies_figure, hit_rate_figure, write_report

    trace = generate_trace("mixtral", 64, num_layers=3)
    trace.model = "<a & b>"
    trace.save(tmp_path / "t.npz")
    folder = tmp_path / "report"
    arguments = ["replay", str(tmp_path / "t.npz"), "--policy", "lru,belady-bypass"]
    assert main([*arguments, "--cap", "0.25,0.5", "--batch", "1,4", "--plot", str(folder)]) == 0
    assert "report.html" in capsys.readouterr().out
    images = {path.name: path.read_bytes() for path in folder.glob("*.png")}
    assert set(images) == {"hit_rate.png", "copies.png", "layers.png"}
    assert all(image.startswith(b"\x89PNG") for image in images.values())
    assert len(set(images.values())) == 3
    page = (folder / "report.html").read_text()
    assert page.count("data:image/png;base64,") == 3
    assert "http" not in page
    assert "&lt;a &amp; b&gt;" in page
    assert page.count("<tr>") == 1 + 8

    results = list(replay.replay_grid(trace, ["lru", "belady-bypass"], [0.25, 0.5], [1]))
    lru, bound = hit_rate_figure(results).axes[0].lines
    assert lru.get_ydata().tolist() == [100 * r.hit_rate for r in results if r.policy == "lru"]
    assert (lru.get_color(), bound.get_color(), bound.get_linestyle()) == ("C0", "black", "--")
    pages = copies_figure(results).axes[0].lines[0].get_ydata()
    bytes_moved = copies_figure(results, 2**21).axes[0].lines[0].get_ydata()
    assert bytes_moved.tolist() == pytest.approx([2 * y for y in pages])
    with pytest.raises(ValueError, match="at least one replayed row, got none"):
        write_report(trace, [], folder)


def test_figures_without_matplotlib_say_how_to_get_it(monkeypatch):
    import sys

    from moe_offload.replay_report import hit_rate_figure

    monkeypatch.setitem(sys.modules, "matplotlib.figure", None)
    trace = generate_trace("mixtral", 8, num_layers=1)
    with pytest.raises(ImportError, match=r'pip install "moe-offload\[plots\]"'):
        hit_rate_figure([replay.replay(trace)])
