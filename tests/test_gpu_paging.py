"""Paging on a real GPU: exact under every budget and stream, ordered by the device, never by luck.

Run by `make gpu`. What is compared bit for bit is the same backend with everything resident.
"""

from __future__ import annotations

import pytest
import torch
from experts import random_routing, random_weights, reference, write_page_file

import moe_offload
from moe_offload import OffloadedExperts, backends
from moe_offload.config import OffloadConfig
from moe_offload.device import open_device
from moe_offload.errors import BudgetError, StateError
from moe_offload.functional import expert_ffn
from moe_offload.layer import _as_layer, run_experts
from moe_offload.offloader import Offloader
from moe_offload.pages import pack_experts

pytestmark = pytest.mark.gpu

E, H, F, A, LAYERS = 16, 256, 128, 4, 4
TOKENS = (1, 10, 200)  # with the CUDA kernels the last is a prefill


@pytest.fixture
def layers() -> list[dict[str, torch.Tensor]]:
    return [random_weights(E, H, F, torch.bfloat16, seed=layer) for layer in range(LAYERS)]


def inputs(tokens: int, seed: int) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    generator = torch.Generator().manual_seed(seed)
    ids, weights = random_routing(tokens, E, A, generator)
    hidden = torch.randn(tokens, H, generator=generator).to(torch.bfloat16)
    return hidden.cuda(), ids.cuda(), weights.cuda()


@pytest.fixture(params=["cuda", "triton", "grouped_mm"])
def backend(request) -> str:
    """Each backend that computes on a GPU; skips where it is not built or installed."""
    if (reason := backends.describe()[request.param]) is not None:
        pytest.skip(f"{request.param}: {reason}")
    return request.param


def modules(layers, **options) -> list[OffloadedExperts]:
    made = OffloadedExperts.for_layers(layers, device="cuda", **options)
    made[0].offloader.wait_until_pinned()
    return made


@pytest.fixture
def expected(layers, backend) -> dict[tuple[int, int], torch.Tensor]:
    resident = modules(layers, device_budget="100%", expert_backend=backend)
    assert resident[0].offloader.stats()["expert_backend"] == backend
    outputs = {}
    for step in range(8):
        for index, module in enumerate(resident):
            outputs[step, index] = module(*inputs(TOKENS[step % 3], step * LAYERS + index))
    torch.cuda.synchronize()
    resident[0].offloader.close()
    return outputs


@pytest.mark.parametrize("budget", ["15%", "45%", "100%"])
@pytest.mark.parametrize("chaos", [False, True])
def test_every_budget_gives_the_resident_bits(layers, backend, expected, budget, chaos) -> None:
    paged = modules(layers, device_budget=budget, expert_backend=backend)
    if chaos:
        paged[0].offloader.chaos(1, max_delay_us=300, reorder=True, evict_probability=0.2)
    for (step, index), want in expected.items():
        paged[0].offloader.prefetch((index + 1) % LAYERS, [step, 15 - step])
        got = paged[index](*inputs(TOKENS[step % 3], step * LAYERS + index))
        assert torch.equal(got, want), (step, index)
    stats = paged[0].offloader.stats()
    assert stats["staged_bytes"] == 0
    assert stats["pinning_limit"] is None
    paged[0].offloader.close()


@pytest.mark.parametrize("tokens", TOKENS)
def test_the_numbers_are_right(layers, backend, tokens) -> None:
    paged = modules(layers, device_budget="30%", expert_backend=backend)
    hidden, ids, weights = inputs(tokens, 99)
    got = paged[1](hidden, ids, weights).cpu().double()
    want = reference(layers[1], hidden.cpu(), ids.cpu(), weights.cpu())
    # bf16 rounds to 2^-9 at three places of a chain of two products.
    assert float((got - want).norm() / want.norm()) < 1e-2
    paged[0].offloader.close()


def test_files_are_exact_through_a_small_host_tier(layers, backend, expected, tmp_path) -> None:
    _, pages = write_page_file(tmp_path / "pages", layers)
    described = [_as_layer(w, f"layers.{i}", "silu") for i, w in enumerate(layers)]
    config = OffloadConfig(
        device="cuda", device_budget="20%", host_budget="40%", expert_backend=backend
    )
    module = torch.nn.Module().eval()
    with Offloader(described, pages, config) as offloader:
        for (step, index), want in expected.items():
            args = inputs(TOKENS[step % 3], step * LAYERS + index)
            assert torch.equal(run_experts(offloader.handle(index), module, *args), want)
        assert offloader.stats()["host_evictions"] > 0


def test_streams_and_models_share_the_device(layers, backend, expected) -> None:
    first = modules(layers, device_budget="15%", expert_backend=backend)
    second = modules(layers, device_budget="30%", expert_backend=backend)
    streams = [torch.cuda.Stream() for _ in range(3)]
    results = []
    for turn, ((step, index), want) in enumerate(expected.items()):
        args = inputs(TOKENS[step % 3], step * LAYERS + index)
        torch.cuda.synchronize()
        with torch.cuda.stream(streams[turn % 3]):
            torch.cuda._sleep(2_000_000)  # readers that are late
            results.append((first[index](*args), second[index](*args), want))
    torch.cuda.synchronize()
    for a, b, want in results:
        assert torch.equal(a, want)
        assert torch.equal(b, want)
    first[0].offloader.close()
    second[0].offloader.close()


def test_slots_are_refilled_behind_their_readers_without_the_host_waiting(layers) -> None:
    paged = modules(layers, device_budget=2 * 4096 * 100)  # two to four slots
    pool = paged[0].offloader.pools[0]
    stream = torch.cuda.current_stream()
    for cycles in (0, 400_000_000):  # the first turn loads kernels and allocates
        copies = []
        torch.cuda.synchronize()
        torch.cuda._sleep(cycles)  # about 0.2 s: nothing on this stream runs until long after
        ticket = pool.pager.acquire(0, list(range(E)), stream=stream.cuda_stream)
        while ready := ticket.next():
            for expert, slot in ready:
                copies.append((expert, pool.views["down_proj"][slot].clone()))
            ticket.release([index for index, _ in ready])
        asleep = not stream.query()
        ticket.close()
    assert asleep  # all of it was enqueued while the device still slept
    torch.cuda.synchronize()
    assert sorted(expert for expert, _ in copies) == list(range(E))
    for expert, copy in copies:
        assert torch.equal(copy.cpu(), layers[0]["down_proj"][expert])
    paged[0].offloader.close()


def test_auto_takes_the_first_that_is_there(layers) -> None:
    found = backends.describe()
    first = next(name for name in ("cuda", "triton", "grouped_mm") if found[name] is None)
    paged = modules(layers, device_budget="50%")
    assert paged[0].offloader.stats()["expert_backend"] == first
    paged[0].offloader.close()


def test_whole_weights_give_the_bits_of_a_pool(layers) -> None:
    if (reason := backends.describe()["cuda"]) is not None:
        pytest.skip(reason)
    paged = modules(layers, device_budget="40%", expert_backend="cuda")
    packed = pack_experts({name: tensor.cuda() for name, tensor in layers[0].items()})
    for tokens in TOKENS:
        hidden, ids, weights = inputs(tokens, 3)
        got = expert_ffn(hidden, packed["gate_up_proj"], packed["down_proj"], ids, weights)
        assert torch.equal(got, paged[0](hidden, ids, weights))
    paged[0].offloader.close()


def test_torch_sees_the_slots_and_gets_them_back(layers) -> None:
    torch.cuda.synchronize()
    before = torch.cuda.memory_allocated()
    paged = modules(layers, device_budget="50%")
    slots = paged[0].offloader.device_budget_bytes
    assert torch.cuda.memory_allocated() - before >= slots
    paged[0].offloader.close()
    assert torch.cuda.memory_allocated() == before


def test_graph_capture_is_refused_and_leaves_everything_usable(layers) -> None:
    paged = modules(layers, device_budget="50%")
    args = inputs(2, 5)
    want = paged[0](*args)
    graph = torch.cuda.CUDAGraph()
    with pytest.raises(StateError, match="cannot be captured"), torch.cuda.graph(graph):
        paged[0](*args)
    torch.cuda.synchronize()
    assert torch.equal(paged[0](*args), want)
    paged[0].offloader.close()


def test_too_little_device_memory_is_a_budget_error(layers) -> None:
    total = torch.cuda.get_device_properties(0).total_memory
    torch.cuda.empty_cache()
    torch.cuda.set_per_process_memory_fraction((torch.cuda.memory_reserved() + 4096) / total)
    try:
        with pytest.raises(BudgetError, match="do not fit on cuda:0"):
            modules(layers, device_budget="100%")
    finally:
        torch.cuda.set_per_process_memory_fraction(1.0)
    modules(layers, device_budget="100%")[0].offloader.close()


def test_tensors_on_the_host_are_refused(layers) -> None:
    paged = modules(layers, device_budget="50%")
    hidden, ids, weights = inputs(2, 5)
    with pytest.raises(ValueError, match=r"hidden_states must be on cuda:0.*got cpu"):
        paged[0](hidden.cpu(), ids, weights)
    paged[0](hidden, ids, weights)
    paged[0].offloader.close()


def test_the_driver_agrees_with_torch_about_the_device() -> None:
    device = open_device("cuda")
    assert device.cuda is not None
    assert device.cuda.name == torch.cuda.get_device_name()
    assert device.cuda.capability == torch.cuda.get_device_capability()


def test_a_transformers_model_generates_the_same_tokens_at_every_budget() -> None:
    pytest.importorskip("transformers")
    from tiny_models import tiny_model

    tokens = {}
    for budget in ("20%", "100%"):
        model = tiny_model("qwen3_moe")
        offloader = moe_offload.offload(model, device="cuda", device_budget=budget)
        assert {p.device.type for p in model.parameters()} == {"cuda"}
        prompt = torch.arange(3, 12, device="cuda")[None]
        tokens[budget] = model.generate(prompt, max_new_tokens=12, do_sample=False).cpu()
        offloader.restore()
        assert {p.device.type for p in model.parameters()} == {"cpu"}
    assert torch.equal(tokens["20%"], tokens["100%"])


def test_a_compiled_block_equals_the_eager_one(layers) -> None:
    paged = modules(layers, device_budget="50%")
    compiled = torch.compile(paged[0], fullgraph=True)
    args = inputs(4, 8)
    with torch.no_grad():
        assert torch.equal(compiled(*args), paged[0](*args))
    paged[0].offloader.close()
