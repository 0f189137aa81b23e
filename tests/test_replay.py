"""Replay: a live run is repeated exactly, requests are the model's, Belady's line holds."""

import json
from collections import OrderedDict

import numpy as np
import pytest
from tiny_models import prompt_ids, tiny_model

import moe_offload
from moe_offload import _core, replay, replay_events
from moe_offload.cli import main
from moe_offload.errors import TraceError
from moe_offload.policies import LIVE_POLICIES, POLICIES
from moe_offload.trace_generator import generate_trace
from moe_offload.traces import Trace

COUNTERS = ("lookups", "prefetch_hits", "demand_misses", "bypasses", "evictions")


def live_counters(offloader):
    stats = offloader.stats()
    names = [*COUNTERS, "hits"]
    counters = {name: [row[name] for row in stats["per_layer"]] for name in names}
    joined = [row["joined_prefetches"] for row in stats["per_layer"]]
    assert sum(joined) == 0  # the test waits for its prefetches
    return counters


@pytest.mark.parametrize("policy", LIVE_POLICIES)
@pytest.mark.parametrize("budget", ["13%", "40%"])
def test_a_recorded_run_is_reproduced_exactly(policy, budget, tmp_path):
    model = tiny_model("qwen3_moe", num_hidden_layers=3)
    with moe_offload.offload(model, budget, policy=policy) as offloader:
        pool = offloader.pools[0]

        def prefetch(module, args):  # a bad predictor: what the last layers hardly need
            pool.pager.predict(2, [1, 5], [0.9, 0.4])
            offloader.prefetch(2, [1, 5])
            pool.pager.drain()

        handle = model.model.layers[1].register_forward_pre_hook(prefetch)
        with moe_offload.record(model) as trace:
            for seed in range(2):
                inputs = prompt_ids(length=7, batch=2, seed=seed)
                model.generate(inputs, max_new_tokens=12, do_sample=False)
        handle.remove()
        live = live_counters(offloader)
    trace.save(tmp_path / "run.npz")
    loaded = Trace.load(tmp_path / "run.npz")
    result = replay.replay_recorded(loaded)
    assert {name: result.per_layer[name] for name in live} == live
    assert result.prefetches > 0
    assert result.steps == 2 * 12
    assert result.num_slots == pool.num_slots


@pytest.mark.parametrize("policy", ["learned", "auto"])
def test_what_a_policy_learns_live_it_learns_in_the_replay(policy):
    """Long enough for fitted weights, at batches that are kept whole and ones that stream."""
    model = tiny_model("qwen3_moe", num_hidden_layers=3)
    with moe_offload.offload(model, "40%", policy=policy) as offloader:
        with moe_offload.record(model) as trace:
            for seed, batch in enumerate((1, 6, 2)):
                inputs = prompt_ids(length=5, batch=batch, seed=seed)
                model.generate(inputs, max_new_tokens=50, do_sample=False)
        live = live_counters(offloader)
    result = replay.replay_recorded(trace)
    assert {name: result.per_layer[name] for name in live} == live
    assert result.steps == 3 * 50
    other = replay.replay_recorded(trace, "lru-per-layer")
    assert other.per_layer["demand_misses"] != live["demand_misses"]


@pytest.mark.parametrize("policy", ["lru", "lfu-per-layer", "forecast", "learned"])
def test_rows_alone_give_the_same_counters(policy):
    """Without the pager's log: requests rebuilt from the routing of prefill and decode calls."""
    model = tiny_model("mixtral", num_hidden_layers=3)
    with moe_offload.offload(model, "30%", policy=policy) as offloader:
        with moe_offload.record(model) as trace:
            model.generate(prompt_ids(length=9, batch=3), max_new_tokens=20, do_sample=False)
        live = live_counters(offloader)
        slots = offloader.pools[0].num_slots
    events = replay.requests(trace, "recorded", routes=policy == "learned")
    result = replay.replay_events(events, trace.num_experts, policy, num_slots=slots)
    assert {name: result.per_layer[name] for name in live} == live
    logged = trace.events
    np.testing.assert_array_equal(events.experts, logged.experts)
    np.testing.assert_array_equal(events.kinds, logged.kinds)
    np.testing.assert_array_equal(events.counts, logged.counts)


def naive_steps(trace, batch):
    """Lists of rows: B streams of consecutive tokens, cut as evenly as whole tokens allow."""
    bounds = [-(-len(trace) * lane // batch) for lane in range(batch + 1)]
    lanes = [list(range(bounds[lane], bounds[lane + 1])) for lane in range(batch)]
    return [
        [lane[step] for lane in lanes if step < len(lane)] for step in range(max(map(len, lanes)))
    ]


@pytest.mark.parametrize("batch", [1, 3, 7, 45])
def test_requests_are_the_distinct_experts_of_a_step(batch, monkeypatch):
    monkeypatch.setattr(replay, "_CELLS", 100)  # several pieces
    trace = generate_trace("mixtral", 50, 12, num_layers=3, seed=batch)
    trace.ids[4, 1, 0] = -1
    events = replay.requests(trace, batch)
    index, announced, begun = 0, 0, 0
    starts = {0, 12, 24, 36, 48}
    for rows in naive_steps(trace, batch):
        begun += len(starts & set(rows))
        if begun // batch > announced:
            announced = begun // batch
            assert events.kinds[index] == replay_events.SEQUENCE
            index += 1
        for layer in range(3):
            if 1 < len(rows) <= replay.MAX_ROUTED_TOKENS:
                assert (events.kinds[index], events.layers[index]) == (replay_events.ROUTES, layer)
                assert events.counts[index] == len(rows)
                span = slice(*events.expert_offsets[index : index + 2])
                assert events.experts[span].tolist() == trace.ids[rows, layer].reshape(-1).tolist()
                assert events.value_offsets[index] == events.value_offsets[index + 1]
                index += 1
            assert (events.kinds[index], events.layers[index]) == (replay_events.REQUEST, layer)
            assert events.counts[index] == len(rows)
            weights = {}
            for row in rows:
                for expert, w in zip(trace.ids[row, layer], trace.weights[row, layer], strict=True):
                    if expert >= 0:
                        weights[int(expert)] = weights.get(int(expert), 0.0) + float(w)
            span = slice(*events.expert_offsets[index : index + 2])
            assert events.experts[span].tolist() == sorted(weights)
            expected = [weights[expert] for expert in sorted(weights)]
            span = slice(*events.value_offsets[index : index + 2])
            assert events.values[span] == pytest.approx(expected, rel=1e-6)
            index += 1
    assert index == len(events.kinds)


def test_lru_agrees_with_a_dictionary():
    trace = generate_trace("mixtral", 400, 100, num_layers=4, seed=1)
    result = replay.replay(trace, "lru", 0.5, 1)
    slots, cache, hits = 16, OrderedDict(), 0
    for row in trace.ids:
        for layer in range(4):
            pages = [(layer, int(expert)) for expert in sorted(row[layer])]
            missed = [page for page in pages if page not in cache]
            for page in pages:
                if page in cache:
                    hits += 1
                    cache.move_to_end(page)
            for page in missed:
                if len(cache) == slots:
                    cache.popitem(last=False)
                cache[page] = None
    assert result.num_slots == slots
    assert result.hits == hits
    assert result.lookups == 400 * 4 * 2
    assert result.misses.sum() == result.demand_misses == result.lookups - hits


@pytest.mark.parametrize("preset", ["mixtral", "switch", "flat"])
@pytest.mark.parametrize("batch", [1, 8])
def test_nobody_beats_belady_with_bypass(preset, batch):
    trace = generate_trace(preset, 600, 150, num_layers=4, seed=2)
    results = {
        r.policy: r.demand_misses
        for cap in (0.125, 0.5)
        for r in replay.replay_grid(trace, list(POLICIES), [cap], [batch])
    }
    assert min(results, key=results.get) == "belady-bypass" or (
        min(results.values()) == results["belady-bypass"]
    )
    assert results["belady-bypass"] < results["lru"]


@pytest.mark.parametrize("policy", ["static", "lru", "predictive"])
def test_routes_change_nothing_for_policies_that_do_not_ask(policy):
    trace = generate_trace("mixtral", 600, num_layers=3, seed=4)
    trace.ids[::7, :, 1] = -1
    told, plain = (replay.requests(trace, 4, routes=routes) for routes in (True, False))
    assert len(told.kinds) > len(plain.kinds)
    results = [replay.replay_events(e, trace.num_experts, policy, 0.25) for e in (told, plain)]
    assert results[0].per_layer == results[1].per_layer


def test_everything_hits_when_everything_fits():
    trace = generate_trace("mixtral", 300, num_layers=2)
    for result in replay.replay_grid(trace, list(POLICIES), [1.0], [4]):
        assert result.demand_misses == 16
        assert result.evictions == 0


def test_an_oracle_that_prefetches_removes_demand_misses():
    trace = generate_trace("switch", 300, 100, num_layers=4, seed=5)
    events = replay.requests(trace, 2)
    truth = np.zeros((150, 4, 32))
    for step, rows in enumerate(naive_steps(trace, 2)):
        for row in rows:
            for layer in range(4):
                truth[step, layer, trace.ids[row, layer]] = 1.0
    plain = replay.replay_events(events, trace.num_experts, "predictive", 0.25)
    told = replay_events.with_predictions(events, truth, prefetch=2, layers_ahead=1)
    result = replay.replay_events(told, trace.num_experts, "predictive", 0.25)
    assert result.lookups == plain.lookups
    assert result.demand_misses < 0.1 * plain.demand_misses
    assert result.prefetch_hits > 0
    assert result.wasted_prefetches == 0
    assert result.demand_misses + result.prefetches <= 1.05 * plain.demand_misses


@pytest.mark.parametrize("batch", [1, 4])
def test_recall_prefetches_by_name(batch):
    """On a text that repeats; each of the rows is its policy's own where none is asked."""
    trace = generate_trace("switch", 60, 60, num_layers=4, seed=7)
    trace = trace.rows(np.tile(np.arange(60), 10))
    trace.call = np.arange(600)
    names = ["lru", "lru+recall", "auto", "auto+recall"]
    rows = {r.policy: r for r in replay.replay_grid(trace, names, [0.25], [batch])}
    assert list(rows) == names
    for name in ("lru", "auto"):
        plain, told = rows[name], rows[f"{name}+recall"]
        assert plain.prefetches == 0
        assert plain.demand_misses == replay.replay(trace, name, 0.25, batch).demand_misses
        assert told.lookups == plain.lookups
        assert told.prefetch_hits > told.wasted_prefetches
        assert told.demand_misses + told.wasted_prefetches < 0.9 * plain.demand_misses


def test_wrong_prefetches_are_counted_as_wasted():
    trace = generate_trace("switch", 100, 100, num_layers=2, seed=6)
    events = replay.requests(trace, 1)
    wrong = np.ones((100, 2, 32))
    for step in range(100):
        for layer in range(2):
            wrong[step, layer, trace.ids[step, layer]] = 0.0
    told = replay_events.with_predictions(events, wrong, prefetch=3)
    result = replay.replay_events(told, trace.num_experts, "lru", 0.25)
    assert result.wasted_prefetches > 0
    assert result.copies_per_token > replay.replay(trace, "lru", 0.25).copies_per_token


def test_bad_input_is_one_clear_error():
    trace = generate_trace("mixtral", 5, num_layers=2)
    for policies, caps, batches, message in [
        (["mru"], [0.5], [1], "policy: expected one of lru, .* got 'mru'"),
        (["mru+recall"], [0.5], [1], "policy: expected one of lru, .* got 'mru.recall'"),
        (["lru"], [0], [1], "cap: expected a share of all experts above 0 and at most 1, got 0"),
        (["lru"], [1.5], [1], "cap: .* got 1.5"),
        (["lru"], [0.5], [0], 'batch: expected a whole number of at least 1 or "recorded", got 0'),
        (["lru"], [0.5], [6], "batch: 6 streams need as many tokens, the trace has 5"),
    ]:
        with pytest.raises(ValueError, match=message):
            list(replay.replay_grid(trace, policies, caps, batches))
    with pytest.raises(TraceError, match="the trace is empty"):
        replay.replay(trace.rows(slice(0, 0)))
    with pytest.raises(TraceError, match="the trace holds no pager events"):
        replay.replay_recorded(trace)
    events = replay.requests(trace)
    with pytest.raises(ValueError, match="names layer 1 of 1"):
        replay.replay_events(events, [8], "lru")
    arrays = events.arrays() | {"expert_offsets": events.expert_offsets[:-1]}
    with pytest.raises(ValueError, match="expert_offsets must rise from 0 to 20"):
        _core.replay(
            policy="lru", num_experts=[8, 8], num_slots=4, kept=[], admit_limit=0, **arrays
        )


def test_the_command_prints_one_row_per_combination(tmp_path, capsys):
    path = tmp_path / "t.npz"
    generate_trace("mixtral", 64, num_layers=2).save(path)
    arguments = ["replay", str(path), "--policy", "lru,belady-bypass", "--cap", "0.25,0.5"]
    assert main([*arguments, "--batch", "1,4", "--json"]) == 0
    rows = json.loads(capsys.readouterr().out)
    assert [(r["batch"], r["cap"], r["policy"]) for r in rows] == [
        (batch, cap, policy)
        for batch in (1, 4)
        for cap in (0.25, 0.5)
        for policy in ("lru", "belady-bypass")
    ]
    for row in rows:
        assert row["lookups"] == row["hits"] + row["demand_misses"]
        assert row["hit_rate"] == pytest.approx(row["hits"] / row["lookups"], abs=1e-6)
        assert {"prefetch_hits", "wasted_prefetches"} <= set(row)
    assert main(arguments) == 0
    assert "64 tokens, 1 sequences, 2 MoE layers of 8 experts" in capsys.readouterr().out


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--policy", "mru"], "policy: expected one of lru"),
        (["--cap", "0"], "cap: expected a share"),
        (["--cap", "2"], "cap: expected a share"),
        (["--batch", "0"], "batch: expected a whole number"),
    ],
)
def test_the_command_refuses_in_one_line(arguments, message, tmp_path, capsys):
    path = tmp_path / "t.npz"
    generate_trace("mixtral", 8, num_layers=1).save(path)
    assert main(["replay", str(path), *arguments]) == 2
    error = capsys.readouterr().err
    assert message in error
    assert error.count("\n") == 1
    assert main(["replay", str(tmp_path / "none.npz")]) == 2
    assert "no such trace file" in capsys.readouterr().err


def test_torch_and_numpy_agree_on_weights():
    """The score policy live sums router weights in torch, replay in NumPy from float16."""
    model = tiny_model("mixtral")
    with moe_offload.offload(model, "40%", policy="score"), moe_offload.record(model) as trace:
        model.generate(prompt_ids(length=6), max_new_tokens=1)
    events = replay.requests(trace, "recorded")
    np.testing.assert_allclose(events.values, trace.events.values, atol=2e-3)
