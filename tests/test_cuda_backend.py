"""The CUDA kernels behind the layers, without a GPU: the real bindings and the kernels' own source,
run in emulation (emulated_cuda.py), with pages that the fake driver copied: the whole path but the
machine code. tests/test_gpu_paging.py holds a GPU to the same."""

from __future__ import annotations

import ctypes
import types
from dataclasses import dataclass
from typing import Any

import pytest
import torch
from experts import random_routing, random_weights
from torch import Tensor

from moe_offload import OffloadedExperts, backends, reference, resident
from moe_offload.activations import Activation, ExpertForm
from moe_offload.backends.cuda import Cuda
from moe_offload.backends.triton import TritonExperts
from moe_offload.cuda_pages import SlabPages
from moe_offload.errors import UnsupportedModelError
from moe_offload.functional import expert_ffn
from moe_offload.layer import _as_layer
from moe_offload.pages import PageLayout, find_slab, pack_experts

# By name: tensors are on the CPU here, where "auto" never takes it.
ON_GPU: dict[str, Any] = {"device": "cuda", "expert_backend": "cuda"}


# --- right ---------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Case:
    """T, A, E, H, F, and what an expert computes."""

    name: str
    tokens: int
    top_k: int
    experts: int
    hidden: int
    inner: int
    activation: str = "silu"
    gate: bool = True
    bias: bool = False
    dtype: torch.dtype = torch.bfloat16


CASES = [
    Case("one-token", 1, 2, 4, 64, 32),
    Case("off-every-tile", 5, 2, 3, 72, 40),
    Case("decode-many-tokens", 20, 2, 6, 64, 32, dtype=torch.float16),
    Case("prefill-64-rows", 50, 2, 3, 72, 40),
    Case("prefill-128-rows", 70, 1, 1, 64, 32, dtype=torch.float16),
    Case("ungated-biased", 4, 2, 3, 64, 32, "relu2", gate=False, bias=True),
    Case("gelu-biased", 40, 2, 2, 64, 32, "gelu_tanh", bias=True),
    Case("all-experts", 3, 4, 4, 64, 16, "gelu"),
]


def make(case: Case, seed: int = 0) -> tuple[dict[str, Tensor], Tensor, Tensor, Tensor]:
    weights = random_weights(
        *(case.experts, case.hidden, case.inner, case.dtype),
        gate=case.gate,
        bias=case.bias,
        seed=seed,
    )
    generator = torch.Generator().manual_seed(seed + 1)
    ids, topk = random_routing(case.tokens, case.experts, case.top_k, generator)
    hidden = torch.randn(case.tokens, case.hidden, generator=generator).to(case.dtype)
    return weights, hidden, ids, topk


def exact(case: Case, weights: dict[str, Tensor], *arguments: Tensor, dtype: Any) -> Tensor:
    first = "gate_up_proj" if case.gate else "up_proj"
    return reference.expert_ffn(
        *(arguments[0], weights[first], weights["down_proj"], *arguments[1:]),
        *(Activation(case.activation, case.gate), weights.get(f"{first}_bias")),
        weights.get("down_proj_bias"),
        dtype=dtype,
    )


@pytest.mark.parametrize("case", CASES, ids=lambda case: case.name)
def test_error_is_that_of_torch(gpu: Any, case: Case) -> None:
    """Computed before the reference exists, in memory full of NaN."""
    weights, hidden, ids, topk = make(case)
    budget = "50%" if case.experts >= 4 else "100%"
    layer = OffloadedExperts(weights, activation=case.activation, device_budget=budget, **ON_GPU)
    torch.use_deterministic_algorithms(True)  # fills torch.empty with NaN
    try:
        got = layer(hidden, ids, topk).double()
    finally:
        torch.use_deterministic_algorithms(False)
    stats = layer.offloader.stats()
    assert stats["expert_backend"] == "cuda"
    assert stats["per_layer"][0]["passed_over"] is None
    layer.offloader.close()
    want = exact(case, weights, hidden, ids, topk, dtype=torch.float64)
    own = exact(case, weights, hidden, ids, topk, dtype=case.dtype).double()
    error, theirs = ((x - want).norm() / want.norm() for x in (got, own))
    assert error <= 1.2 * theirs, f"relative error {error:.2e}, torch's own {theirs:.2e}"


@pytest.mark.parametrize("concatenated", [False, True], ids=["alternating", "halves"])
@pytest.mark.parametrize("transposed", [False, True], ids=["rows", "transposed"])
@pytest.mark.parametrize("tokens", [5, 40])  # decode, prefill
def test_biased_and_clamped_as_gpt_oss_has_it(
    kernels: Any, tokens: int, transposed: bool, concatenated: bool
) -> None:
    """The module says how its matrices lie, and what it computes is recognised."""
    case = Case("gpt-oss", tokens, 2, 4, 64, 32, bias=True)
    weights, hidden, ids, topk = make(case)
    act = Activation("clamped_swiglu", True, 1.702, 1.5, 1.0)

    def apply_gate(both: Tensor) -> Tensor:
        return act(*(both.chunk(2, -1) if concatenated else (both[..., ::2], both[..., 1::2])))

    module = types.SimpleNamespace(has_gate=True, has_bias=True, is_transposed=transposed)
    module.is_concatenated, module._apply_gate = concatenated, apply_gate
    stored = dict(weights)
    if transposed:
        for name in ("gate_up_proj", "down_proj"):
            stored[name] = weights[name].transpose(1, 2).contiguous()
    packed = pack_experts(stored)
    layout = PageLayout.build({n: (tuple(t.shape[1:]), t.dtype) for n, t in stored.items()})
    assert Cuda().supports(module, layout) is None
    run = Cuda().bind(module, layout, case.experts).start(hidden, ids, topk)
    slab, stride, _ = find_slab(packed) or pytest.fail("packed weights are a slab")
    for ready in enumerate(run.experts):  # one at a time, as they would arrive
        run.compute_pages(SlabPages(slab, stride), [ready])
    got = run.finish().double()
    halves = weights["gate_up_proj"], weights["gate_up_proj_bias"]
    if not concatenated:
        halves = tuple(torch.cat([part[:, ::2], part[:, 1::2]], 1) for part in halves)
    arguments = (hidden, halves[0], weights["down_proj"], ids, topk, act, halves[1])
    want = reference.expert_ffn(*arguments, weights["down_proj_bias"])
    own = reference.expert_ffn(*arguments, weights["down_proj_bias"], dtype=case.dtype).double()
    assert (got - want).norm() <= 1.2 * (own - want).norm()


def test_ids_that_are_not_ours_repeat_or_come_in_other_types(gpu: Any) -> None:
    case = Case("ids", 6, 3, 4, 64, 32)
    weights, hidden, ids, topk = make(case)
    ids[0, 0], ids[1], ids[2, 1] = 4, torch.tensor([-1, 9, 77]), ids[2, 0]
    layer = OffloadedExperts(weights, device_budget="100%", **ON_GPU)
    got = layer(hidden, ids, topk)
    want = exact(case, weights, hidden, ids, topk, dtype=torch.float32)
    torch.testing.assert_close(got.float(), want, rtol=0.02, atol=0.02)
    assert not got[1].any()
    for dtype in (torch.int32, torch.int16):
        assert torch.equal(layer(hidden, ids.to(dtype), topk), got)
    assert torch.equal(layer(hidden, ids.t().contiguous().t(), topk.double()), got)
    for tokens in (6, 40):  # decode, prefill
        nobody = torch.full((tokens, 3), 4)
        out = layer(torch.randn(tokens, 64).to(hidden.dtype), nobody, torch.ones(tokens, 3))
        assert out.shape == (tokens, 64)
        assert not out.any()
    assert layer(hidden[:0], ids[:0], topk[:0]).shape == (0, 64)
    layer.offloader.close()


def test_hidden_states_may_be_wide_strided_and_misaligned(gpu: Any) -> None:
    weights, hidden, ids, topk = make(Case("hidden", 5, 2, 4, 64, 32))
    layer = OffloadedExperts(weights, device_budget="100%", **ON_GPU)
    want = layer(hidden, ids, topk)
    wide = layer(hidden.float(), ids, topk)
    assert wide.dtype == torch.float32
    assert torch.equal(wide, want.float())
    assert torch.equal(layer(hidden.t().contiguous().t(), ids, topk), want)
    shifted = torch.empty(5 * 64 + 1, dtype=hidden.dtype)[1:].view(5, 64).copy_(hidden)
    assert shifted.data_ptr() % 16
    assert torch.equal(layer(shifted, ids, topk), want)
    layer.offloader.close()


# --- exact ---------------------------------------------------------------------------------------


@pytest.mark.parametrize("tokens", [1, 7, 40])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
def test_paged_bits_are_resident_bits_whatever_the_timing(
    gpu: ctypes.CDLL, tokens: int, dtype: torch.dtype
) -> None:
    layers = [random_weights(6, 64, 32, dtype, bias=True, seed=seed) for seed in range(3)]
    resident = OffloadedExperts.for_layers(layers, device_budget="100%", **ON_GPU)
    paged = OffloadedExperts.for_layers(layers, device_budget="20%", **ON_GPU)
    paged[0].offloader.chaos(3, max_delay_us=200, reorder=True, evict_probability=0.3)
    generator = torch.Generator().manual_seed(tokens)
    for step in range(4):
        for index in range(3):
            paged[0].offloader.prefetch((index + 1) % 3, [step, 5 - step])
            ids, topk = random_routing(tokens, 6, 3, generator)
            hidden = torch.randn(tokens, 64, generator=generator).to(dtype)
            got = paged[index](hidden, ids, topk)
            assert torch.equal(got, resident[index](hidden, ids, topk)), (step, index)
    stats = paged[0].offloader.stats()
    assert stats["demand_misses"] > 0
    assert stats["bypasses"] > 0 or stats["evictions"] > 0
    for module in (paged[0], resident[0]):
        module.offloader.close()
    assert gpu.fake_cuda_counts().misuses == 0


@pytest.mark.parametrize("family", ["qwen3_moe", "mixtral", "gpt_oss"])
def test_a_transformers_model_has_the_same_logits_at_every_budget(gpu: Any, family: str) -> None:
    pytest.importorskip("transformers")
    from tiny_models import prompt_ids, tiny_model

    import moe_offload

    model, ids = tiny_model(family, torch.bfloat16), prompt_ids(5)
    with torch.no_grad():
        own = model(ids).logits.float()
        logits = []
        for budget in ("100%", "30%"):
            offloaded = moe_offload.offload(model, device_budget=budget, **ON_GPU)
            logits.append(model(ids).logits.float())
            assert offloaded.stats()["copied_bytes"] > 0
            offloaded.restore()
    assert torch.equal(logits[0], logits[1])
    # transformers rounds to bf16 after each operation, the kernels after each projection.
    assert float((logits[0] - own).norm() / own.norm()) < 0.02


def test_a_call_that_was_given_up_leaves_nothing_to_the_next(kernels: Any) -> None:
    """Scratch is kept from call to call, but not that of a call which did not come to its end."""
    weights, hidden, ids, topk = make(Case("again", 6, 2, 4, 64, 32))
    layer = ExpertForm.build("silu", True, False)
    slab, stride, _ = find_slab(pack_experts(weights)) or pytest.fail("packed weights are a slab")
    layout = PageLayout.build({n: (tuple(t.shape[1:]), t.dtype) for n, t in weights.items()})
    bound = Cuda().bind(layer, layout, 4)
    pages = SlabPages(slab, stride)

    def whole() -> Tensor:
        run = bound.start(hidden, ids, topk)
        run.compute_pages(pages, list(enumerate(run.experts)))
        return run.finish()

    want = whole()
    assert len(bound.tickets) == 1
    assert not any(tensor.any() for tensor in bound.tickets.values())
    assert torch.equal(whole(), want)
    half = bound.start(hidden, ids, topk)
    half.compute_pages(pages, [(0, half.experts[0])])
    assert not bound.tickets
    assert torch.equal(whole(), want)
    first, second = (bound.start(hidden, ids, topk) for _ in range(2))  # two at a time
    for run in (first, second):
        run.compute_pages(pages, list(enumerate(run.experts)))
    assert torch.equal(first.finish(), want)
    assert torch.equal(second.finish(), want)


# --- who is chosen -------------------------------------------------------------------------------


def described(**options: Any) -> tuple[Any, PageLayout]:
    weights = random_weights(4, options.pop("hidden", 64), 32, **options)
    layer = _as_layer(weights, "experts", "silu")
    return layer.module, PageLayout.build(layer.tensors)


def test_auto_takes_it_on_a_gpu_only(monkeypatch: pytest.MonkeyPatch) -> None:
    module, layout = described(dtype=torch.bfloat16)
    with monkeypatch.context() as patch:
        patch.setattr(Cuda, "missing", lambda self: None)
        backend, passed_over = backends.choose("auto", module, layout, "experts", "cuda")
        assert (backend.name, passed_over) == ("cuda", None)
        backend, passed_over = backends.choose("auto", module, layout, "experts", "cpu")
        assert (backend.name, passed_over) == ("native", None)
        with pytest.raises(UnsupportedModelError, match="cuda: it does not compute on cpu"):
            backends.choose("cuda", module, layout, "experts", "cpu")


def test_what_it_cannot_compute_goes_to_the_next_and_is_reported(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(Cuda, "missing", lambda self: None)
    monkeypatch.setattr(TritonExperts, "missing", lambda self: None)
    for options, reason in (
        ({"dtype": torch.float32}, "it has no kernels for torch.float32"),
        ({"dtype": torch.bfloat16, "hidden": 60}, "must be multiples of 8, got 60 and 32"),
    ):
        module, layout = described(**options)
        backend, passed_over = backends.choose("auto", module, layout, "experts", "cuda")
        assert backend.name == "triton"
        assert passed_over is not None
        assert passed_over.startswith("cuda: ")
        assert passed_over.endswith(reason)
        with pytest.raises(UnsupportedModelError, match=reason):
            backends.choose("cuda", module, layout, "experts", "cuda")
    module, layout = described(dtype=torch.bfloat16)
    odd = ExpertForm(lambda x: x.sin(), True, False)
    assert "its activation is none of" in str(Cuda().supports(odd, layout))


@pytest.mark.skipif(torch.cuda.is_available(), reason="a CUDA device is here")
def test_without_kernels_or_a_gpu_the_reason_is_given(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("TRITON_INTERPRET", "0")
    assert backends.describe()["cuda"] is not None
    module, layout = described(dtype=torch.bfloat16)
    backend, passed_over = backends.choose("auto", module, layout, "experts", "cuda")
    assert backend.name == "grouped_mm"
    assert passed_over is not None
    assert "cuda: " in passed_over
    assert "triton: " in passed_over


# --- whole weights -------------------------------------------------------------------------------


@pytest.mark.parametrize("case", [CASES[0], CASES[3], CASES[5]], ids=lambda case: case.name)
def test_expert_ffn_reads_packed_weights_with_the_bits_of_a_pool(gpu: Any, case: Case) -> None:
    weights, hidden, ids, topk = make(case)
    pool = OffloadedExperts(weights, activation=case.activation, device_budget="100%", **ON_GPU)
    want = pool(hidden, ids, topk)
    pool.offloader.close()
    packed = pack_experts(weights)
    for name, tensor in packed.items():
        assert torch.equal(tensor, weights[name])

    def call(tensors: dict[str, Tensor], **options: Any) -> Tensor:
        first = "gate_up_proj" if case.gate else "up_proj"
        return expert_ffn(
            *(hidden, tensors[first], tensors["down_proj"], ids, topk, case.activation),
            gate_up_bias=tensors.get(f"{first}_bias"),
            down_bias=tensors.get("down_proj_bias"),
            **options,
        )

    assert torch.equal(call(packed, backend="cuda"), want)
    with pytest.raises(ValueError, match=r"do not lie in one slab of pages .*pack_experts"):
        call(weights, backend="cuda")
    nobody = torch.full_like(ids, case.experts)
    ids = nobody
    assert not call(packed, backend="cuda").any()


def test_expert_ffn_by_triton_handles_repeated_and_foreign_ids() -> None:
    pytest.importorskip("triton")
    if TritonExperts().missing() is not None:
        pytest.skip("TRITON_INTERPRET=1 runs Triton's kernels on the CPU")
    case = Case("triton", 6, 3, 4, 64, 32, dtype=torch.float32)
    weights, hidden, ids, topk = make(case)
    ids[0, 0], ids[1], ids[2, 1] = 4, torch.tensor([-1, 9, 77]), ids[2, 0]
    first, down = weights["gate_up_proj"], weights["down_proj"]
    got = expert_ffn(hidden, first, down, ids.to(torch.int16), topk, backend="triton")
    want = exact(case, weights, hidden, ids, topk, dtype=torch.float32)
    torch.testing.assert_close(got, want, rtol=1e-5, atol=1e-5)


def test_who_computes_whole_weights(kernels: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    weights = random_weights(4, 64, 32, torch.bfloat16)
    monkeypatch.setattr(TritonExperts, "missing", lambda self: None)
    assert resident.choose(pack_experts(weights)) == "cuda"
    assert resident.choose(weights) == "triton"
    monkeypatch.setattr(TritonExperts, "missing", lambda self: "no triton")
    assert resident.choose(weights) == "torch"
    wide = pack_experts(random_weights(4, 64, 32))
    assert resident.why_not_cuda(wide) == "it has no kernels for torch.float32"
    odd = pack_experts(random_weights(4, 60, 32, torch.bfloat16))
    assert "must be multiples of 8" in str(resident.why_not_cuda(odd))
    monkeypatch.setattr(Cuda, "devices", ("cuda",))
    packed = pack_experts(weights)
    assert resident.why_not_cuda(packed) == "it does not compute on cpu"
    hidden, ids = torch.zeros(1, 64).bfloat16(), torch.zeros(1, 1, dtype=torch.long)
    with pytest.raises(ValueError, match=r"backend='cuda' cannot compute .* not compute on cpu"):
        expert_ffn(hidden, *packed.values(), ids, torch.ones(1, 1), backend="cuda")


def test_a_slab_is_found_only_where_there_is_one() -> None:
    weights = random_weights(4, 64, 32, torch.bfloat16, bias=True)
    packed = pack_experts(weights)
    found = find_slab(packed)
    assert found is not None
    slab, stride, offsets = found
    layout = PageLayout.build({n: (tuple(t.shape[1:]), t.dtype) for n, t in weights.items()})
    assert (slab.numel(), stride) == (4 * layout.slot_stride, layout.slot_stride)
    assert offsets == {section.name: section.offset for section in layout.sections}
    for name, view in layout.views(slab).items():
        assert view.data_ptr() == packed[name].data_ptr()
    assert find_slab({n: t[1:] for n, t in packed.items()}) is not None  # a slab of three
    assert find_slab(weights) is None
    assert find_slab({**packed, "down_proj": packed["down_proj"].clone()}) is None
    assert find_slab({**packed, "down_proj": packed["down_proj"][:3]}) is None
    assert find_slab({**packed, "down_proj": packed["down_proj"].transpose(1, 2)}) is None
    assert find_slab({n: t[::2] for n, t in packed.items()}) is not None  # every other page
    with pytest.raises(ValueError, match=r"as many experts in each, on one device, got up: 2 on"):
        pack_experts({"up": torch.zeros(2, 8), "down": torch.zeros(3, 8)})
