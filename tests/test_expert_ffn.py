"""The CPU expert kernels: right against fp64 on every instruction set, and the same bits whatever
the portions, slots, threads and neighbours.
"""

from __future__ import annotations

import random
from concurrent.futures import ThreadPoolExecutor

import pytest
import torch
from expert_cases import GPT_OSS, PATHS, Case, Inputs, check
from torch import Tensor

from moe_offload import _core, ops
from moe_offload.activations import ACTIVATIONS, Activation
from moe_offload.backends.native import DTYPES, BoundLayer, NativeRun, rows_apart

EDGE = [
    Case("no-tokens", 0, 2, 4, 32, 16),
    Case("one-token-one-expert", 1, 1, 1, 32, 16),
    Case("smallest", 1, 1, 1, 1, 1),
    Case("sizes-off-every-tile", 5, 2, 3, 67, 33, bias=True),
    Case("odd-k-many-rows", 40, 2, 2, 35, 21, bias=True),
    Case("all-experts", 3, 6, 6, 64, 32),
    Case("nine-rows", 9, 1, 1, 64, 48),
    Case("a-block-and-one", 49, 1, 1, 96, 40),
    Case("several-blocks", 150, 2, 3, 130, 72, bias=True),
    Case("sums-in-pieces-few-rows", 8, 1, 1, 531, 277, bias=True),
    Case("sums-in-pieces", 60, 2, 3, 531, 277, bias=True),
    Case("whole-pieces", 17, 1, 1, 512, 256),
    Case("packed-for-amx", 145, 1, 1, 96, 40),
    Case("in-place-for-amx", 120, 1, 1, 96, 64),
]


FORMS = [
    Case(f"{name}{'' if gated else '-ungated'}-{tokens}", tokens, 2, 4, 48, 40, act, bias=True)
    for name in ACTIVATIONS
    for gated in (True, False)
    for tokens in (3, 40)
    for act in [Activation(name, gated)]
] + [Case(f"clamped-{tokens}", tokens, 2, 4, 48, 40, GPT_OSS, bias=True) for tokens in (3, 40)]


@pytest.mark.parametrize("case", EDGE, ids=lambda case: case.name)
@pytest.mark.parametrize(("isa", "dtype"), PATHS)
def test_right_on_every_instruction_set(isa: str, dtype: torch.dtype, case: Case) -> None:
    inputs = Inputs.make(case, dtype)
    assert inputs.layer(isa).ffn.isa == isa
    check(inputs, inputs.native(isa))


@pytest.mark.skipif("amx" not in _core.cpu_isas("bfloat16"), reason="this machine has no AMX")
@pytest.mark.parametrize("case", EDGE, ids=lambda case: case.name)
def test_amx_is_its_emulation_bit_for_bit(case: Case) -> None:
    """So what the emulation shows on other machines holds for AMX. Few rows are not AMX's."""
    if case.tokens * case.top_k <= 8 * case.experts:
        pytest.skip("few rows: other instructions, in another order")
    inputs = Inputs.make(case, torch.bfloat16)
    assert torch.equal(inputs.native("amx"), inputs.native("amx_emulated"))


@pytest.mark.parametrize("case", FORMS, ids=lambda case: case.name)
@pytest.mark.parametrize(("isa", "dtype"), [p for p in PATHS if "emulated" not in p.id])
def test_every_activation_gate_and_bias(isa: str, dtype: torch.dtype, case: Case) -> None:
    inputs = Inputs.make(case, dtype)
    check(inputs, inputs.native(isa))


@pytest.mark.parametrize("tokens", [1, 7, 33])
@pytest.mark.parametrize(("isa", "dtype"), PATHS)
def test_bits_do_not_depend_on_portions_slots_neighbours_or_threads(
    isa: str, dtype: torch.dtype, tokens: int
) -> None:
    inputs = Inputs.make(Case("", tokens, 3, 6, 64, 48, bias=True), dtype)
    expected = inputs.native(isa)
    for seed in range(4):
        rng = random.Random(seed)
        layer = inputs.layer(isa)
        slot_of = rng.sample(range(20), 6)
        slots = {
            name: torch.full((20, *tensor.shape[1:]), float("nan"), dtype=dtype)
            for name, tensor in inputs.weights.items()
        }
        for name, tensor in inputs.weights.items():
            for expert, slot in enumerate(slot_of):
                slots[name][slot] = tensor[expert]
        run = inputs.start(layer, num_threads=1 + seed)
        waiting = [(index, slot_of[expert]) for index, expert in enumerate(run.experts)]
        rng.shuffle(waiting)
        while waiting:
            size = rng.randint(1, len(waiting))
            run.compute(layer.weights(slots), waiting[:size])
            waiting = waiting[size:]
        assert torch.equal(inputs.finish(run), expected), f"seed {seed}"


@pytest.mark.parametrize(("isa", "dtype"), [p for p in PATHS if "emulated" not in p.id])
def test_large_enough_to_be_shared_by_threads_and_still_the_same_bits(
    isa: str, dtype: torch.dtype
) -> None:
    """Above the limit below which one thread works alone, with few and with many rows; sizes that
    end within a tile and within a chunk."""
    for tokens in (2, 200):
        inputs = Inputs.make(Case("", tokens, 2, 4, 517, 389), dtype)
        expected = inputs.native(isa, num_threads=1)
        for num_threads in (2, 3, 5):
            assert torch.equal(inputs.native(isa, num_threads=num_threads), expected)
        check(inputs, expected)


@pytest.mark.parametrize("ahead", [0, 8192])
def test_the_memory_roof_reads_every_word(ahead: int) -> None:
    words = torch.randint(-(2**62), 2**62, (64 * 1000,))
    found, seconds = _core.memory_roof(words.data_ptr(), words.nbytes, ahead)
    assert found == sum(words.tolist()) % 2**64
    assert seconds > 0
    with pytest.raises(ValueError, match="multiple of 64 bytes, got 72"):
        _core.memory_roof(words.data_ptr(), 72, ahead)


def test_the_multiply_roof_counts_operations_of_every_instruction_set() -> None:
    for dtype in ("float32", "bfloat16", "float16"):
        for isa in ["auto", *_core.cpu_isas(dtype)]:
            operations, seconds = _core.multiply_roof(dtype, 1e-4, isa)
            assert operations > 0
            assert seconds >= 1e-4
    with pytest.raises(ValueError, match=r'CPU kernels: expected one of .*plain.*, got "mmx"'):
        _core.multiply_roof("float32", 1e-4, "mmx")
    with pytest.raises(ValueError, match="expected float32, bfloat16 or float16, got int8"):
        _core.multiply_roof("int8", 1e-4)


@pytest.mark.parametrize("num_threads", [1, 2, 3])
def test_rows_of_an_expert_taken_in_parts_keep_their_bits(num_threads: int) -> None:
    """Experts with 481, 962 and 1443 rows, against at most 37 rows at a time."""
    whole = Inputs.make(Case("", 1443, 2, 3, 64, 48, bias=True), torch.bfloat16)
    whole.ids[:962] = torch.tensor([0, 1])
    whole.ids[962:] = torch.tensor([1, 2])
    got = whole.native(num_threads=num_threads)
    check(whole, got)
    for begin in range(0, 1443, 37):  # at most 37 rows of an expert: one part, still many rows
        part = slice(begin, begin + 37)
        alone = Inputs(
            Case("", 37, 2, 3, 64, 48, bias=True),
            *(whole.hidden[part], whole.weights, whole.ids[part], whole.topk[part]),
        )
        assert torch.equal(alone.native(), got[part]), f"tokens from {begin} on"


def test_a_tokens_bits_do_not_depend_on_other_tokens_of_few_row_experts() -> None:
    inputs = Inputs.make(Case("", 5, 2, 8, 96, 64), torch.bfloat16)
    together = inputs.native()
    for token in range(5):
        part = slice(token, token + 1)
        alone = Inputs(
            Case("", 1, 2, 8, 96, 64),
            *(inputs.hidden[part], inputs.weights, inputs.ids[part], inputs.topk[part]),
        )
        assert torch.equal(alone.native()[0], together[token])


@pytest.mark.parametrize(("isa", "dtype"), PATHS)
def test_rows_apart_have_the_bits_they_have_alone(isa: str, dtype: torch.dtype) -> None:
    """Experts with 1, 7, 9, 16 and 61 rows, by parts of eight."""
    inputs = Inputs.make(Case("", 47, 2, 5, 72, 40, bias=True), dtype)
    inputs.ids[:, 0] = 0
    inputs.ids[:14, 0], inputs.ids[:, 1] = 1, 2
    inputs.ids[:9, 1], inputs.ids[9:16, 1], inputs.ids[16, 1] = 3, 4, 0
    layer = inputs.layer(isa)
    weights = layer.weights(inputs.weights)
    for num_threads in (1, 2):
        run = inputs.start(layer, num_threads, rows_apart=True)
        run.compute_all(weights)
        got = inputs.finish(run)
        check(inputs, got)
        for token in range(47):
            part = slice(token, token + 1)
            alone = Inputs(
                Case("", 1, 2, 5, 72, 40, bias=True),
                *(inputs.hidden[part], inputs.weights, inputs.ids[part], inputs.topk[part]),
            )
            assert torch.equal(alone.native(isa)[0], got[token]), f"token {token}"
    if dtype == torch.float32:  # else rounding hides the order of summation
        assert not torch.equal(inputs.native(isa), got), "many rows are summed in another order"


def test_rows_apart_is_for_calls_within_and_of_this_thread() -> None:
    inputs = Inputs.make(Case("", 40, 1, 1, 64, 48), torch.float32)
    layer = inputs.layer()

    def output() -> Tensor:
        run = layer.start(inputs.hidden, inputs.ids, inputs.topk)
        run.run.compute_all(layer.weights(inputs.weights))
        return run.finish()

    many = output()
    with rows_apart():
        apart = output()
        with ThreadPoolExecutor(1) as pool:
            elsewhere = pool.submit(output).result()
    assert not torch.equal(apart, many)
    assert torch.equal(elsewhere, many)
    assert torch.equal(output(), many)


def test_ids_that_are_not_ours_contribute_nothing() -> None:
    inputs = Inputs.make(Case("", 6, 2, 4, 48, 32), torch.float32)
    inputs.ids[0, 0], inputs.ids[1, 1], inputs.ids[5] = 4, -1, torch.tensor([99, -7])
    got = inputs.native()
    check(inputs, got)
    assert not got[5].any()
    run = inputs.start(inputs.layer(), 1)
    assert run.experts == sorted(set(inputs.ids.flatten().tolist()) & set(range(4)))
    inputs.ids[:] = 4
    assert not inputs.native().any()


@pytest.mark.parametrize("weights_dtype", list(DTYPES))
@pytest.mark.parametrize("ids_dtype", [torch.int64, torch.int32, torch.int16])
def test_dtypes_of_the_routing(weights_dtype: torch.dtype, ids_dtype: torch.dtype) -> None:
    inputs = Inputs.make(Case("", 9, 2, 4, 48, 32), torch.float32)
    inputs.topk = inputs.topk.to(weights_dtype)
    inputs.topk[0, 0] = torch.finfo(weights_dtype).smallest_normal / 4  # a denormal
    expected = ops.expert_ffn_cpu(
        *inputs.arguments[:3], inputs.ids, inputs.topk.float(), inputs.case.activation
    )
    got = ops.expert_ffn_cpu(
        *inputs.arguments[:3], inputs.ids.to(ids_dtype), inputs.topk, inputs.case.activation
    )
    assert torch.equal(got, expected)


def test_gate_and_up_rows_may_alternate() -> None:
    inputs = Inputs.make(Case("", 11, 2, 4, 48, 32, bias=True), torch.bfloat16)
    expected = inputs.native()
    for name in ("gate_up_proj", "gate_up_proj_bias"):
        halves = inputs.weights[name].chunk(2, dim=1)
        inputs.weights[name] = torch.stack(halves, dim=2).flatten(1, 2)
    case = inputs.case
    layer = BoundLayer(*(case.activation, 48, 32, 4, torch.bfloat16), concatenated=False)
    run = inputs.start(layer, 1)
    run.compute_all(layer.weights(inputs.weights))
    assert torch.equal(inputs.finish(run), expected)


@pytest.mark.parametrize("value", [float("nan"), float("inf"), 1e30])
def test_special_values_stay_with_their_tokens(value: float) -> None:
    inputs = Inputs.make(Case("", 40, 1, 4, 48, 32), torch.float32)
    clean = inputs.native()
    inputs.hidden[7] = value
    got = inputs.native()
    others = torch.arange(40) != 7
    assert torch.equal(got[others], clean[others])
    assert not got[7].isfinite().all() or value == 1e30


def test_the_environment_forces_an_instruction_set(monkeypatch: pytest.MonkeyPatch) -> None:
    inputs = Inputs.make(Case("", 3, 2, 4, 48, 32), torch.bfloat16)
    monkeypatch.setenv("MOE_OFFLOAD_CPU_ISA", "plain")
    assert inputs.layer().ffn.isa == "plain"
    monkeypatch.setenv("MOE_OFFLOAD_CPU_ISA", "sse9")
    with pytest.raises(ValueError, match=r"CPU kernels: expected one of plain.*got \"sse9\""):
        inputs.layer()


def test_run_keeps_its_inputs_alive() -> None:
    """Conversions make temporaries; nobody else holds them while the kernels read them."""
    inputs = Inputs.make(Case("", 30, 2, 4, 64, 32), torch.float32)
    expected = ops.expert_ffn_cpu(*inputs.arguments[:6])
    layer = inputs.layer()
    run = NativeRun(layer, inputs.hidden.double(), inputs.ids.to(torch.int16), inputs.topk.double())
    junk = [torch.full((30, 64), float("nan")) for _ in range(50)]
    run.run.compute_all(layer.weights(inputs.weights))
    assert torch.equal(run.finish(), expected.double())
    assert len(junk) == 50
