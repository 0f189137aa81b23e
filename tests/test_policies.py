"""Policies from Python: one table of names, exact results under each, and the events they see."""

import pytest
import torch
from tiny_models import prompt_ids, tiny_model

import moe_offload
from moe_offload import _core
from moe_offload.policies import LIVE_POLICIES, POLICIES


def test_the_table_lists_what_the_core_has():
    assert list(POLICIES) == _core.policy_names(False)
    assert list(LIVE_POLICIES) == _core.policy_names(True)


@pytest.mark.parametrize("policy", LIVE_POLICIES)
def test_results_do_not_depend_on_the_policy(policy):
    model = tiny_model("qwen3_moe")
    inputs = prompt_ids(length=9, batch=2)
    expected = model.generate(inputs, max_new_tokens=8, do_sample=False)
    with moe_offload.offload(model, "25%", policy=policy) as offloader:
        assert torch.equal(model.generate(inputs, max_new_tokens=8, do_sample=False), expected)
        stats = offloader.stats()
        assert stats["policy"] == policy
        assert stats["lookups"] == (
            stats["hits"] + stats["joined_prefetches"] + stats["demand_misses"]
        )


class SpyPager:
    """Stands in for a pager and writes down what it is asked."""

    def __init__(self, pager, uses_weights, uses_routes):
        self._pager, self.uses_weights, self.uses_routes = pager, uses_weights, uses_routes
        self.requests, self.sequences = [], 0

    def acquire(self, layer, experts, weights, num_tokens, stream, routes):
        self.requests.append((layer, list(experts), list(weights), num_tokens, list(routes)))
        return self._pager.acquire(layer, experts, weights, num_tokens, stream, routes)

    def begin_sequence(self):
        self.sequences += 1

    def __getattr__(self, name):
        return getattr(self._pager, name)


@pytest.mark.parametrize("asks", [False, True])
def test_policies_are_told_tokens_weights_routes_and_sequences(asks):
    model = tiny_model("mixtral")
    routed = []
    for module in model.modules():
        if hasattr(module, "gate_up_proj"):
            module.register_forward_pre_hook(lambda module, args: routed.append(args[1:]))
    with moe_offload.offload(model, "25%") as offloader:
        pool = offloader.pools[0]
        real = pool.pager
        spy = pool.pager = SpyPager(real, asks, asks)
        model.generate(prompt_ids(length=20, batch=2), max_new_tokens=3, do_sample=False)
        model(prompt_ids(length=6))
        model(prompt_ids(length=1))
        pool.pager = real
    assert spy.sequences == 3
    assert [request[0] for request in spy.requests] == [0, 1] * 5
    tokens = [request[3] for request in spy.requests]
    assert tokens == [40, 40, 2, 2, 2, 2, 6, 6, 1, 1]
    for request, (ids, topk_weights) in zip(spy.requests, routed, strict=True):
        _, experts, weights, count, routes = request
        # Of one token the distinct experts say it all, a prompt is too long to be told apart.
        assert routes == (ids.reshape(-1).tolist() if asks and count in (2, 6) else [])
        assert experts == sorted(set(ids.reshape(-1).tolist()))
        expected = [topk_weights[ids == expert].sum().item() for expert in experts]
        assert weights == (pytest.approx(expected, rel=1e-6) if asks else [])


def test_the_default_learns_where_pages_must_leave_and_rests_where_none_does() -> None:
    model = tiny_model("qwen3_moe")
    with moe_offload.offload(model, device_budget="50%") as offloader:
        assert offloader.stats()["policy"] == "auto"
        assert "policy='auto'" in repr(offloader)
        offloader.resize("100%")
        assert offloader.stats()["policy"] == "lru"
        model(prompt_ids(8))
        offloader.resize("25%")
        assert offloader.stats()["policy"] == "auto"
    with moe_offload.offload(model, device_budget="100%", policy="lfu") as offloader:
        assert offloader.stats()["policy"] == "lfu"
