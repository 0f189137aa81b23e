"""Decoded tokens' attention by the CPU kernel: right on every instruction set, else torch's."""

from __future__ import annotations

import copy
import math
import os
import subprocess
import sys
from collections.abc import Iterator
from dataclasses import dataclass
from types import SimpleNamespace

import pytest
import tiny_models
import torch
import torch.nn.functional as F
from torch import Tensor
from transformers.integrations.sdpa_attention import sdpa_attention_forward

import moe_offload
from moe_offload import _core, attention
from moe_offload.attention import takes, token_attention
from moe_offload.backends.native import DTYPES, dense_kernels
from moe_offload.huggingface.attention import NAME, attention_forward

KERNELS = [(dtype, isa) for dtype, name in DTYPES.items() for isa in _core.cpu_isas(name)]


@dataclass(frozen=True)
class Case:
    name: str
    batch: int
    heads: int
    groups: int
    positions: int
    size: int
    value_size: int


EDGES = [
    Case("one position", 1, 8, 8, 1, 192, 128),
    Case("seven positions, sizes off the vectors", 2, 3, 1, 7, 37, 19),
    Case("a chunk and one position", 1, 2, 2, 257, 64, 64),
    Case("more heads to a key than are taken at once", 1, 18, 2, 100, 24, 40),
    Case("three chunks, three heads", 2, 12, 4, 700, 40, 8),
]
MODELS = [
    Case("OLMoE", 1, 16, 16, 300, 128, 128),
    Case("Qwen3", 2, 32, 4, 777, 128, 128),
    Case("gpt-oss", 1, 64, 8, 96, 64, 64),
    Case("Mixtral", 1, 32, 8, 129, 128, 128),
    Case("DeepSeek", 1, 16, 16, 290, 192, 128),
    Case("Gemma", 1, 6, 2, 255, 256, 256),
]
CASES = EDGES + MODELS
MASKS = ("none", "bool", "bool per head", "float32", "own dtype")


def draw(case: Case, dtype: torch.dtype) -> tuple[Tensor, Tensor, Tensor]:
    """Keys as in a cache with room, values as in one that keeps heads innermost; NaN around."""
    query = torch.randn(case.batch, case.heads, 1, case.size).to(dtype)
    keys = torch.full((case.batch, case.groups, case.positions + 9, case.size), math.nan).to(dtype)
    key = keys[:, :, 4 : 4 + case.positions]
    key.copy_(torch.randn(key.shape))
    values = torch.full(
        (case.batch, case.positions + 3, case.groups, case.value_size + 5), math.nan, dtype=dtype
    )
    value = values[:, : case.positions, :, : case.value_size].transpose(1, 2)
    value.copy_(torch.randn(value.shape))
    return query, key, value


def draw_mask(kind: str, case: Case, dtype: torch.dtype) -> Tensor | None:
    if kind == "none":
        return None
    heads = case.heads if kind in ("bool per head", "own dtype") else 1
    allowed = torch.rand(case.batch, heads, 1, case.positions) > 0.3
    allowed[..., -1] = True
    allowed[0, ..., :300] = case.positions <= 300  # a whole chunk of padding
    if kind.startswith("bool"):
        return allowed
    bias = torch.randn(allowed.shape).masked_fill(~allowed, -math.inf)
    return bias.to(torch.float32 if kind == "float32" else dtype)


def reference(
    query: Tensor, key: Tensor, value: Tensor, mask: Tensor | None, scale: float
) -> Tensor:
    """The plain PyTorch twin, in float64: [B, 1, Hq, D']."""
    repeats = query.shape[1] // key.shape[1]
    key, value = (t.double().repeat_interleave(repeats, 1) for t in (key, value))
    scores = scale * query.double() @ key.transpose(2, 3)
    if mask is not None:
        if mask.dtype == torch.bool:
            mask = torch.zeros(mask.shape).masked_fill(mask.logical_not(), -math.inf)
        scores = scores + mask.double()
    return (torch.softmax(scores, 3) @ value).transpose(1, 2)


def run(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    mask: Tensor | None = None,
    scale: float = 0.1,
    isa: str | None = None,
    threads: int = 2,
) -> Tensor:
    """The kernel by itself, on the best instruction set by default, its output poisoned."""
    batch, heads, _, size = query.shape
    _, groups, positions, value_size = value.shape
    out = torch.full((batch, 1, heads, value_size), math.nan, dtype=query.dtype)
    kernels = _core.DenseKernels(DTYPES[query.dtype], isa) if isa else dense_kernels(query.dtype)
    kernels.attend(
        *(query.data_ptr(), key.data_ptr(), value.data_ptr(), out.data_ptr()),
        (batch, heads, groups, positions, size, value_size),
        *(attention._strides(key), attention._strides(value)),
        None if mask is None else attention._mask(mask),
        *(scale, threads),
    )
    return out


@pytest.mark.parametrize(("dtype", "isa"), KERNELS)
@pytest.mark.parametrize("case", CASES, ids=lambda case: case.name)
def test_error_is_torchs_own(dtype: torch.dtype, isa: str, case: Case) -> None:
    squares = {"ours": 0.0, "torch": 0.0}
    for kind in MASKS:
        query, key, value = draw(case, dtype)
        mask, scale = draw_mask(kind, case, dtype), case.size**-0.5
        got = run(query, key, value, mask, scale, isa)
        exact = reference(query, key, value, mask, scale)
        repeats = case.heads // case.groups
        theirs = F.scaled_dot_product_attention(
            query, *(t.repeat_interleave(repeats, 1) for t in (key, value)), mask, scale=scale
        ).transpose(1, 2)
        # Half an ulp of results below 4 where the last rounding decides. In float32 the weights
        # decide: scores below 8 are rounded three times after their sums (scale, mask, maximum), by
        # 2^-22 each, and sums of up to 256 products err as much again, so a weight may be off by
        # 6 x 2^-22, and a mean of values below 4 by four times that, 2^-17.4. A third of it; what
        # is typical is compared below.
        ulp = {torch.bfloat16: 2.0**-7, torch.float16: 2.0**-10, torch.float32: 2.0**-19}[dtype]
        worst = (got - exact).abs().max()
        assert worst <= max(1.2 * (theirs - exact).abs().max(), ulp), kind
        squares["ours"] += (got - exact).square().mean().item()
        squares["torch"] += (theirs - exact).square().mean().item()
        assert torch.equal(got, run(query, key, value, mask, scale, isa, threads=1)), kind
    # In float32 the order of sums is all there is, and torch's depends on the processor: whoever
    # keeps twice as many partial sums errs by the root of two less (1.25 beside MKL on
    # Emerald Rapids, below 1.2 on Zen 4). A handful of results may fall either way.
    factor = 1.2
    if dtype == torch.float32:
        factor = 4 if case.positions < 10 else 1.2 * 2**0.5
    assert squares["ours"] ** 0.5 <= factor * squares["torch"] ** 0.5 + 1e-12, squares


@pytest.mark.parametrize("dtype", list(DTYPES))
def test_bits_depend_on_the_sequence_alone(dtype: torch.dtype) -> None:
    case = Case("", 3, 8, 2, 600, 64, 48)
    query, key, value = draw(case, dtype)
    got = run(query, key, value)
    for threads in (1, 2, 3, 5):
        assert torch.equal(got, run(query, key, value, threads=threads))
    assert torch.equal(got, run(query, key.contiguous(), value.contiguous())), "strides"
    for b in range(3):
        alone = run(query[b : b + 1], key[b : b + 1], value[b : b + 1])
        assert torch.equal(got[b : b + 1], alone), "other sequences"
    everything = torch.ones(3, 1, 1, 600, dtype=torch.bool)
    assert torch.equal(got, run(query, key, value, everything)), "a mask that masks nothing"


@pytest.mark.parametrize(("dtype", "isa"), KERNELS)
def test_masked_rows(dtype: torch.dtype, isa: str) -> None:
    case = Case("", 2, 4, 2, 300, 32, 32)
    query, key, value = draw(case, dtype)
    for masked in (False, -math.inf, torch.finfo(dtype).min):
        mask = torch.ones(2, 1, 1, 300, dtype=torch.bool)
        mask[0] = False
        if masked is not False:
            mask = torch.zeros(mask.shape, dtype=dtype).masked_fill(~mask, masked)
        got = run(query, key, value, mask, isa=isa)
        full = [t.repeat_interleave(2, 1) for t in (key, value)]
        theirs = F.scaled_dot_product_attention(query, *full, mask, scale=0.1).transpose(1, 2)
        if masked in (False, -math.inf):
            assert torch.equal(got[0], torch.zeros_like(got[0]))
            assert torch.equal(theirs[0], torch.zeros_like(got[0])), "torch's zeros are the pattern"
        torch.testing.assert_close(got, theirs, atol=2e-2, rtol=2e-2)


def test_what_is_not_a_number_shows() -> None:
    query, key, value = draw(Case("", 1, 2, 1, 40, 16, 16), torch.float32)
    key[0, 0, 7, 3] = math.nan
    assert run(query, key, value).isnan().all()
    mask = torch.ones(1, 1, 1, 40, dtype=torch.bool)
    query, key, value = draw(Case("", 1, 2, 1, 40, 16, 16), torch.float32)
    value[0, 0, 7, 3] = math.inf
    assert run(query, key, value, mask)[..., 3].isinf().all()


def test_each_parameter_counts() -> None:
    query, key, value = draw(Case("", 1, 4, 2, 50, 16, 16), torch.float32)
    got = run(query, key, value, scale=0.1)
    assert not torch.equal(got, run(query, key, value, scale=0.2))
    assert torch.equal(token_attention(query, key, value), run(query, key, value, scale=0.25))
    with pytest.raises(ValueError, match="expected a mask of bool, float32 or same, got int64"):
        _core.DenseKernels("float32").attend(
            *(0, 0, 0, 0, (1, 1, 1, 1, 1, 1), (0, 0, 0), (0, 0, 0)),
            *((0, "int64", 0, 0, 0), 1.0, 1),
        )


@pytest.fixture
def counted(monkeypatch: pytest.MonkeyPatch) -> Iterator[list[int]]:
    """Positions of each call that reached the kernel; it always pays."""
    calls: list[int] = []
    kernels = attention.dense_kernels

    def counting(dtype: torch.dtype) -> SimpleNamespace:
        def count(*args: object) -> None:
            calls.append(args[4][3])
            kernels(dtype).attend(*args)

        return SimpleNamespace(attend=count)

    monkeypatch.setattr(attention, "dense_kernels", counting)
    monkeypatch.setattr(attention, "_pays", lambda dtype: 0 if dtype in DTYPES else 1 << 62)
    return calls


def test_what_the_kernel_does_not_take() -> None:
    def tensors(dtype: torch.dtype = torch.float32) -> list[Tensor]:
        return list(draw(Case("", 2, 4, 2, 5, 8, 8), dtype))

    def refused(query: Tensor, key: Tensor, value: Tensor, mask: Tensor | None = None) -> bool:
        return not takes(query, key, value, mask)

    bool_mask = torch.ones(2, 1, 1, 5, dtype=torch.bool)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(attention, "_pays", lambda dtype: 0)
        query, key, value = tensors()
        assert takes(query, key, value, None)
        assert takes(query, key, value, bool_mask)
        assert takes(query, key, value, bool_mask[:1].float())
        assert refused(query.expand(-1, -1, 2, -1), key, value), "two tokens"
        assert refused(query[:, :3], key, value), "heads that share nothing evenly"
        assert refused(query[:1], key, value), "broadcast over sequences"
        assert refused(query, key, value[:, :, :4]), "fewer values"
        assert refused(query, key[:, :, :0], value[:, :, :0]), "no positions"
        assert refused(query, key.bfloat16(), value), "dtypes"
        assert refused(query, key.transpose(2, 3).contiguous().transpose(2, 3), value), "strides"
        assert refused(query, key, value, bool_mask[..., :1]), "a mask of one position"
        assert refused(query, key, value, bool_mask.long()), "a mask of integers"
        assert refused(query, key, value, bool_mask[0, 0]), "a mask of two dimensions"
        assert refused(*(t.to("meta") for t in (query, key, value))), "device"
        assert refused(query.requires_grad_(), key, value), "gradients"
        with torch.no_grad():
            assert takes(query, key, value, None)
            with torch.autocast("cpu", torch.bfloat16):
                assert refused(query, key, value), "autocast"
    assert not takes(*tensors(torch.float64), None)


def test_a_forced_instruction_set_is_used() -> None:
    code = "from moe_offload import attention; import torch; print(attention._pays(torch.bfloat16))"
    environment = {**os.environ, "MOE_OFFLOAD_CPU_ISA": "plain"}
    done = subprocess.run(
        [sys.executable, "-c", code], env=environment, capture_output=True, text=True, check=True
    )
    assert int(done.stdout) == 1 << 62
    assert set(attention.PAYS_ON) < {"plain", "avx2", "avx512", "avx512_bf16", "amx"}


@pytest.mark.parametrize("masked", [False, True])
@pytest.mark.parametrize("pays", [False, True])
@pytest.mark.parametrize("groups", [2, 8])
def test_it_is_transformers_attention(
    masked: bool, pays: bool, groups: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(attention, "_pays", lambda dtype: 0 if pays else 1 << 62)
    module = SimpleNamespace(num_key_value_groups=8 // groups, is_causal=True)
    query = torch.randn(2, 8, 1, 16)
    key, value = torch.randn(2, groups, 9, 16), torch.randn(2, groups, 9, 16)
    mask = None
    if masked:
        mask = torch.ones(2, 1, 1, 9, dtype=torch.bool)
        mask[0, ..., :3] = False
    got, _ = attention_forward(module, query, key, value, mask, scaling=0.3)
    expected, _ = sdpa_attention_forward(module, query, key, value, mask, scaling=0.3)
    assert got.shape == expected.shape == (2, 1, 8, 16)
    torch.testing.assert_close(got, expected, atol=2e-6, rtol=1e-5)


def test_other_attention_is_transformers_own(
    monkeypatch: pytest.MonkeyPatch, counted: list[int]
) -> None:
    calls: list[int] = []

    def theirs(module: object, query: Tensor, *args: object, **kwargs: object) -> tuple:
        calls.append(query.shape[2])
        return sdpa_attention_forward(module, query, *args, **kwargs)

    monkeypatch.setattr("moe_offload.huggingface.attention.sdpa_attention_forward", theirs)
    module = SimpleNamespace(num_key_value_groups=2, is_causal=True)
    key = torch.randn(1, 2, 5, 8)
    attention_forward(module, torch.randn(1, 4, 5, 8), key, key, None)
    token = torch.randn(1, 4, 1, 8)
    bias = torch.zeros(1, 4, 1, 5)
    attention_forward(module, token, key, key, None, position_bias=bias)
    attention_forward(module, token, key, key, None, dropout=0.5)
    attention_forward(module, token, key, key, None, output_attentions=True)
    integers = torch.ones(1, 4, 1, 5, dtype=torch.float64)
    with pytest.raises(RuntimeError, match="dtype"):
        attention_forward(module, token, key, key, integers)
    assert calls == [5, 1, 1, 1, 1]
    assert counted == []
    attention_forward(module, token, key, key, bias)
    assert counted == [5]


def test_compiled_attention_is_transformers_own(counted: list[int]) -> None:
    module = SimpleNamespace(num_key_value_groups=2, is_causal=True)
    query, key = torch.randn(1, 4, 1, 8), torch.randn(1, 2, 5, 8)

    def attend(query: Tensor, key: Tensor) -> Tensor:
        return attention_forward(module, query, key, key, None)[0]

    compiled = torch.compile(attend, fullgraph=True, backend="eager")
    expected, _ = sdpa_attention_forward(module, query, key, key, None)
    torch.testing.assert_close(compiled(query, key), expected)
    assert counted == []


def test_an_offloaded_model_and_a_resident_one_agree(counted: list[int]) -> None:
    model = tiny_models.tiny_model("qwen3_moe", torch.bfloat16, implementation="grouped_mm")
    with moe_offload.offload(model, "30%"):
        report = moe_offload.verify(model, [[5, 6, 7, 8]], max_new_tokens=4, hostile=False)
        report.raise_if_different()
    assert 5 in counted, "the first decoded token behind four others"


def test_a_models_attention_is_swapped_and_put_back() -> None:
    model = tiny_models.tiny_model("qwen3_moe", implementation="grouped_mm")
    assert model.config._attn_implementation == "sdpa"
    with moe_offload.offload(model, "30%"):
        assert model.config._attn_implementation == NAME
        assert model.model.layers[0].self_attn.config._attn_implementation == NAME
    assert model.config._attn_implementation == "sdpa"
    part = model.model.layers[0].self_attn
    part.config = copy.deepcopy(part.config)
    part.config._attn_implementation_internal = "eager"  # as a vision tower may have it
    with moe_offload.offload(model, "30%"):
        assert model.config._attn_implementation == "sdpa"
    part.config = model.config
    with moe_offload.offload(model, "30%"):
        model.set_attn_implementation("eager")  # the user's own choice stays
    assert model.config._attn_implementation == "eager"
    with moe_offload.offload(model, "30%"):
        assert model.config._attn_implementation == "eager"
