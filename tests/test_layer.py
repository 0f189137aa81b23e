"""One layer over paged experts: exact for every budget, and right against fp64.

`resident` is the same backend on whole weights (for grouped_mm transformers' own forward); equality
with it is bit for bit (torch.equal). `reference` is the definition in fp64; the bound there is what
transformers' grouped_mm reaches in the same dtype, times 1.2.
"""

import threading

import pytest
import torch
from experts import random_routing, random_weights, reference, resident

from moe_offload import OffloadedExperts, OffloadedMoE
from moe_offload.errors import BudgetError, StateError

BUDGETS = ["100%", "25%", 2 * 4096 * 8]  # the last: a few slots, fewer than a token's experts
BACKENDS = ["native", "grouped_mm"]
pytest.importorskip("transformers", reason="the resident forward is transformers' own")


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("tokens", [0, 1, 3, 33])
@pytest.mark.parametrize("kind", ["gated", "gated+bias", "plain", "plain+bias"])
def test_bit_equal_to_resident_for_every_budget(backend, dtype, tokens, kind):
    weights = random_weights(
        16, 32, 24, dtype, gate=kind.startswith("gated"), bias=kind.endswith("bias"), seed=tokens
    )
    generator = torch.Generator().manual_seed(tokens)
    for budget in BUDGETS:
        module = OffloadedExperts(weights, device_budget=budget, expert_backend=backend)
        assert module.offloader.stats()["expert_backend"] == backend
        for _ in range(3):
            hidden = torch.randn(tokens, 32, generator=generator).to(dtype)
            ids, topk = random_routing(tokens, 16, 4, generator)
            got = module(hidden, ids, topk)
            if tokens == 0:
                assert got.shape == (0, 32)
                continue
            assert torch.equal(got, resident(weights, hidden, ids, topk, backend))
        module.offloader.close()


def test_results_do_not_depend_on_arrival_when_the_activation_goes_expert_by_expert(monkeypatch):
    monkeypatch.setattr("moe_offload.backends.grouped_mm._WHOLE_ACTIVATION_ELEMENTS", 100)
    weights = random_weights(16, 32, 24, gate=False)  # 24 floats: a vector and a scalar rest
    generator = torch.Generator().manual_seed(0)
    hidden = torch.randn(9, 32, generator=generator)
    ids, topk = random_routing(9, 16, 4, generator)
    options = {"expert_backend": "grouped_mm"}
    expected = OffloadedExperts(weights, device_budget="100%", **options)(hidden, ids, topk)
    for budget in ("15%", "50%"):
        module = OffloadedExperts(weights, device_budget=budget, **options)
        for seed in range(10):
            module.offloader.chaos(seed, max_delay_us=300, reorder=True, evict_probability=0.5)
            assert torch.equal(module(hidden, ids, topk), expected)


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_error_against_fp64_is_no_larger_than_the_resident_one(backend, dtype):
    weights = random_weights(8, 64, 48, dtype, bias=True)
    generator = torch.Generator().manual_seed(3)
    hidden = torch.randn(20, 64, generator=generator).to(dtype)
    ids, topk = random_routing(20, 8, 3, generator)
    module = OffloadedExperts(weights, device_budget="30%", expert_backend=backend)
    got = module(hidden, ids, topk)
    exact = reference(weights, hidden, ids, topk)
    ours = (got.double() - exact).abs().max()
    theirs = (resident(weights, hidden, ids, topk, "grouped_mm").double() - exact).abs().max()
    assert ours <= 1.2 * theirs
    assert ours > 0  # the reference is not the implementation


@pytest.mark.parametrize("backend", BACKENDS)
def test_all_tokens_to_one_expert_and_ids_that_are_not_ours(backend):
    weights = random_weights(4, 32, 16)
    module = OffloadedExperts(weights, device_budget="50%", expert_backend=backend)
    hidden = torch.randn(5, 32)
    topk = torch.rand(5, 2)
    same = torch.full((5, 2), 3)
    assert torch.equal(module(hidden, same, topk), resident(weights, hidden, same, topk, backend))
    foreign = torch.tensor([[0, 4], [4, 4], [1, 2], [4, 3], [2, 4]])  # 4 = "not mine"
    expected = reference(weights, hidden, foreign, topk)
    torch.testing.assert_close(module(hidden, foreign, topk).double(), expected, atol=1e-5, rtol=0)
    assert not module(hidden, torch.full((5, 2), 9), topk).any()


@pytest.mark.parametrize("backend", BACKENDS)
def test_layers_share_one_pool_and_stay_exact_under_hostile_timing(backend):
    layers = [random_weights(12, 32, 16, seed=seed) for seed in range(3)]
    modules = OffloadedExperts.for_layers(layers, device_budget="20%", expert_backend=backend)
    offloader = modules[0].offloader
    assert all(module.offloader is offloader for module in modules)
    offloader.chaos(1, max_delay_us=200, reorder=True, evict_probability=0.3)
    generator = torch.Generator().manual_seed(0)
    for step in range(12):
        hidden = torch.randn(1 + step % 5, 32, generator=generator)
        for module, weights in zip(modules, layers, strict=True):
            ids, topk = random_routing(len(hidden), 12, 4, generator)
            expected = resident(weights, hidden, ids, topk, backend)
            assert torch.equal(module(hidden, ids, topk), expected)
    stats = offloader.stats()
    assert stats["lookups"] == stats["hits"] + stats["joined_prefetches"] + stats["demand_misses"]
    page_bytes = (32 * 32 + 32 * 16) * 4
    assert stats["demand_bytes"] == stats["demand_misses"] * page_bytes


@pytest.mark.parametrize("backend", BACKENDS)
def test_threads_may_call_at_the_same_time(backend):
    weights = random_weights(16, 32, 16)
    module = OffloadedExperts(weights, device_budget="15%", expert_backend=backend)
    wrong = []

    def work(seed: int) -> None:
        generator = torch.Generator().manual_seed(seed)
        for _ in range(20):
            hidden = torch.randn(3, 32, generator=generator)
            ids, topk = random_routing(3, 16, 4, generator)
            expected = resident(weights, hidden, ids, topk, backend)
            if not torch.equal(module(hidden, ids, topk), expected):
                wrong.append(seed)

    threads = [threading.Thread(target=work, args=(seed,)) for seed in range(3)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert not wrong


@pytest.mark.parametrize("backend", BACKENDS)
def test_nan_in_one_expert_stays_with_the_tokens_routed_to_it(backend):
    weights = random_weights(6, 32, 16)
    weights["down_proj"][2] = float("nan")
    # two slots: all share slots with it
    module = OffloadedExperts(weights, device_budget="34%", expert_backend=backend)
    clean = torch.tensor([[0, 1], [3, 4], [5, 0]])
    hidden, topk = torch.randn(3, 32), torch.rand(3, 2)
    for ids in (clean, torch.tensor([[2, 1], [3, 2], [5, 0]]), clean):
        out = module(hidden, ids, topk)
        has_nan = out.isnan().any(dim=1)
        assert has_nan.tolist() == (ids == 2).any(dim=1).tolist()


def test_gradients_are_refused_where_they_would_be_wrong():
    weights = random_weights(4, 32, 16)
    module = OffloadedExperts(weights, device_budget="50%")
    hidden = torch.randn(2, 32, requires_grad=True)
    out = module(hidden, torch.tensor([[0, 1], [2, 3]]), torch.rand(2, 2))
    with pytest.raises(StateError, match="no gradient flows through these experts"):
        out.sum().backward()
    with pytest.raises(StateError, match=r"call model\.eval"):
        module.train()(hidden, torch.tensor([[0, 1], [2, 3]]), torch.rand(2, 2))


def test_moe_block_routes_like_its_parts():
    weights = random_weights(8, 32, 16)
    experts = OffloadedExperts(weights, device_budget="50%")
    router = torch.nn.Linear(32, 8, bias=False)
    block = OffloadedMoE(router, experts, top_k=2)
    hidden = torch.randn(2, 3, 32)
    with torch.no_grad():
        out = block(hidden)
        scores = router(hidden.view(6, 32)).softmax(-1)
        topk, ids = scores.topk(2, dim=-1)
        topk = topk / topk.sum(-1, keepdim=True)
        expected = resident(weights, hidden.view(6, 32), ids, topk)
    assert torch.equal(out, expected.view(2, 3, 32))

    class Router(torch.nn.Module):
        def forward(self, x):
            return None, ids, topk

    assert torch.equal(OffloadedMoE(Router(), experts)(hidden), out)
    with pytest.raises(ValueError, match="give top_k"):
        OffloadedMoE(router, experts)(hidden)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"down_proj": torch.zeros(4, 32, 17)}, r"down_proj must be \(4, 32, 16\)"),
        ({"gate_up_proj_bias": torch.zeros(4, 32)}, "biases for both projections"),
        ({"extra": torch.zeros(1)}, "expected gate_up_proj or up_proj"),
    ],
)
def test_weights_that_do_not_fit_together_are_refused(change, message):
    with pytest.raises(ValueError, match=message):
        OffloadedExperts({**random_weights(4, 32, 16), **change}, device_budget="50%")


def test_unknown_activation_and_small_budget_are_refused():
    weights = random_weights(4, 32, 16)
    with pytest.raises(ValueError, match="expected one of silu"):
        OffloadedExperts(weights, activation="swish", device_budget="50%")
    with pytest.raises(BudgetError, match="need at least 16384 bytes"):
        OffloadedExperts(weights, device_budget=100)
    OffloadedExperts(weights, device_budget=16384).offloader.close()
