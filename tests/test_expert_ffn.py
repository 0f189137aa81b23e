"""The CPU expert kernels: right against fp64 on every instruction set, and the same bits whatever
the portions, slots, threads and neighbours.

`reference.expert_ffn` is the oracle. In the 16-bit dtypes the bound is the error of torch's own
operations on the same inputs times 1.2; in fp32 it is 4 rounding steps times sqrt(K) of the sum.
"""

from __future__ import annotations

import math
import random
import types
from dataclasses import dataclass
from typing import Any

import pytest
import torch
from torch import Tensor

from moe_offload import _core, functional, ops, reference
from moe_offload.activations import ACTIVATIONS, Activation, recognise
from moe_offload.backends.native import DTYPES, BoundLayer, NativeRun

torch.set_num_threads(1)  # matrices this small only lose by sharing
SILU = Activation("silu")
GPT_OSS = Activation("clamped_swiglu", True, 1.702, 0.5, 1.0)
PATHS = [
    pytest.param(isa, dtype, id=f"{isa}-{name}")
    for dtype, name in DTYPES.items()
    for isa in _core.cpu_isas(name)
]


@dataclass(frozen=True)
class Case:
    """Sizes of one call; `bias` also gives both projections biases."""

    name: str
    tokens: int
    top_k: int
    experts: int
    hidden: int
    inner: int
    activation: Activation = SILU
    bias: bool = False


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
]
FORMS = [
    Case(f"{name}{'' if gated else '-ungated'}-{tokens}", tokens, 2, 4, 48, 40, act, bias=True)
    for name in ACTIVATIONS
    for gated in (True, False)
    for tokens in (3, 40)
    for act in [Activation(name, gated)]
] + [Case(f"clamped-{tokens}", tokens, 2, 4, 48, 40, GPT_OSS, bias=True) for tokens in (3, 40)]


@dataclass
class Inputs:
    """Tensors of one call, and the call."""

    case: Case
    hidden: Tensor
    weights: dict[str, Tensor]
    ids: Tensor
    topk: Tensor

    @classmethod
    def make(cls, case: Case, dtype: torch.dtype, seed: int = 0) -> Inputs:
        generator = torch.Generator().manual_seed(seed)

        def draw(*shape: int, scale: float = 1.0) -> Tensor:
            return (torch.randn(shape, generator=generator) * scale).to(dtype)

        act, experts = case.activation, case.experts
        first = "gate_up_proj" if act.gated else "up_proj"
        rows = case.inner * (2 if act.gated else 1)
        scale = 1 / math.sqrt(case.hidden)
        weights = {
            first: draw(experts, rows, case.hidden, scale=scale),
            "down_proj": draw(experts, case.hidden, case.inner, scale=1 / math.sqrt(case.inner)),
        }
        if case.bias:
            weights[f"{first}_bias"] = draw(experts, rows, scale=0.3)
            weights["down_proj_bias"] = draw(experts, case.hidden, scale=0.3)
        scores = torch.randn(case.tokens, experts, generator=generator).softmax(-1)
        topk, ids = scores.topk(case.top_k, dim=-1)
        return cls(case, draw(case.tokens, case.hidden), weights, ids, topk)

    def layer(self, isa: str = "auto", **layout: bool) -> BoundLayer:
        case = self.case
        return BoundLayer(
            *(case.activation, case.hidden, case.inner, case.experts, self.hidden.dtype),
            **layout,
            isa=isa,
        )

    def native(self, isa: str = "auto", num_threads: int = 1) -> Tensor:
        """All experts at once, into an output full of NaN."""
        layer = self.layer(isa)
        run = self.start(layer, num_threads)
        run.compute_all(layer.weights(self.weights))
        return self.finish(run)

    def start(self, layer: BoundLayer, num_threads: int) -> _core.FfnRun:
        return layer.ffn.start(
            *(self.hidden.data_ptr(), self.ids.data_ptr(), True, self.topk.data_ptr(), "float32"),
            *(*self.ids.shape, num_threads),
        )

    def finish(self, run: _core.FfnRun) -> Tensor:
        out = torch.full_like(self.hidden, float("nan"))
        run.finish(out.data_ptr())
        return out

    @property
    def arguments(self) -> tuple[Any, ...]:
        first = "gate_up_proj" if self.case.activation.gated else "up_proj"
        w = self.weights
        return (
            *(self.hidden, w[first], w["down_proj"], self.ids, self.topk, self.case.activation),
            *(w.get(f"{first}_bias"), w.get("down_proj_bias")),
        )

    def exact(self) -> Tensor:
        return reference.expert_ffn(*self.arguments)

    def by_torch(self) -> Tensor:
        """The same operations in the dtype itself, each rounded: what torch reaches."""
        hidden, first, down, ids, topk, act, first_bias, down_bias = self.arguments
        out = torch.zeros(hidden.shape, dtype=torch.float32)
        for expert in ids.unique().tolist():
            tokens, ranks = (ids == expert).nonzero(as_tuple=True)
            inner = hidden[tokens] @ first[expert].T
            inner = inner if first_bias is None else inner + first_bias[expert]
            gate, up = inner.chunk(2, dim=-1) if act.gated else (None, inner)
            y = act(gate, up) @ down[expert].T
            y = y if down_bias is None else y + down_bias[expert]
            out.index_add_(0, tokens, y.float() * topk[tokens, ranks, None])
        return out.to(hidden.dtype)


def check(inputs: Inputs, got: Tensor) -> None:
    exact = inputs.exact()
    assert got.shape == exact.shape
    if got.numel() == 0:
        return
    assert got.isfinite().all()
    error, size = rms(got.double() - exact), rms(exact)
    if got.dtype == torch.float32:
        bound = 4 * 2**-24 * math.sqrt(max(inputs.case.hidden, inputs.case.inner)) * (1 + size)
    else:
        # never below two roundings: torch may be lucky on a few elements
        bound = 1.2 * max(
            rms(inputs.by_torch().double() - exact), size * torch.finfo(got.dtype).eps
        )
    assert error <= bound, f"rms error {error:.3g} above {bound:.3g} (rms output {size:.3g})"


def rms(x: Tensor) -> float:
    return x.square().mean().sqrt().item()


@pytest.mark.parametrize("case", EDGE, ids=lambda case: case.name)
@pytest.mark.parametrize(("isa", "dtype"), PATHS)
def test_right_on_every_instruction_set(isa: str, dtype: torch.dtype, case: Case) -> None:
    inputs = Inputs.make(case, dtype)
    assert inputs.layer(isa).ffn.isa == isa
    check(inputs, inputs.native(isa))


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


def transposed(weights: dict[str, Tensor], alternate: bool) -> dict[str, Tensor]:
    """The same weights as [E, K, N], gate and up in halves or in turn."""
    stored = {}
    for name, tensor in weights.items():
        if alternate and name.startswith("gate_up"):
            tensor = torch.stack(tensor.chunk(2, dim=1), dim=2).flatten(1, 2)
        stored[name] = tensor.transpose(1, 2).contiguous() if tensor.dim() == 3 else tensor
    return stored


TRANSPOSED = [
    Case("gpt-oss", 5, 4, 6, 96, 64, GPT_OSS, bias=True),
    Case("gpt-oss-many-rows", 60, 2, 3, 96, 160, GPT_OSS, bias=True),
    Case("off-every-block", 5, 2, 3, 67, 53, SILU, bias=True),
    Case("off-every-block-many-rows", 55, 2, 3, 67, 53, SILU, bias=True),
    Case("sums-in-pieces", 40, 2, 3, 261, 530, SILU, bias=True),
    Case("no-gate", 30, 2, 3, 130, 70, Activation("relu2", gated=False)),
    Case("smallest", 1, 1, 1, 1, 1),
]


@pytest.mark.parametrize("case", TRANSPOSED, ids=lambda case: case.name)
@pytest.mark.parametrize(("isa", "dtype"), PATHS)
def test_transposed_weights_give_the_same_bits(isa: str, dtype: torch.dtype, case: Case) -> None:
    """As rows, on every instruction set, for any number of threads; and those are right."""
    inputs = Inputs.make(case, dtype)
    outputs = []
    for alternate in (True, False) if case.activation.gated else (False,):
        layer = inputs.layer(isa, concatenated=not alternate, transposed=True)
        stored = transposed(inputs.weights, alternate)
        for num_threads in (1, 3):
            run = inputs.start(layer, num_threads)
            run.compute_all(layer.weights(stored))
            outputs.append(inputs.finish(run))
    expected = inputs.native(isa)
    for got in outputs:
        assert torch.equal(got, expected)
    check(inputs, expected)


def test_transposed_weights_shared_by_threads_give_the_same_bits() -> None:
    for tokens in (2, 100):
        inputs = Inputs.make(Case("", tokens, 2, 4, 512, 384, GPT_OSS, True), torch.bfloat16)
        layer = inputs.layer(concatenated=False, transposed=True)
        stored = transposed(inputs.weights, alternate=True)  # weights() keeps addresses only
        weights = layer.weights(stored)
        outputs = []
        for num_threads in (1, 2, 5):
            run = inputs.start(layer, num_threads)
            run.compute_all(weights)
            outputs.append(inputs.finish(run))
        assert all(torch.equal(got, inputs.native()) for got in outputs)


def test_strides_that_no_kernel_reads_are_refused() -> None:
    inputs = Inputs.make(Case("", 2, 1, 2, 32, 32), torch.float32)
    first, down = inputs.weights["gate_up_proj"], inputs.weights["down_proj"]
    wide = torch.zeros(2, 32, 96)[..., ::3]
    for change in ({"gate_up_proj": torch.zeros(2, 64, 96)[..., ::3]}, {"down_proj": wide}):
        layer = inputs.layer()
        weights = layer.weights({"gate_up_proj": first, "down_proj": down, **change})
        with pytest.raises(ValueError, match="FfnRun: a transposed matrix must have its columns"):
            inputs.start(layer, 1).compute_all(weights)
    view = (down.data_ptr(), 4096, 128, 4)
    uneven = _core.FfnWeights(up=view, down=view, gate=(down.data_ptr(), 4096, 256, 4))
    with pytest.raises(ValueError, match="FfnRun: gate and up must have the same strides"):
        inputs.start(inputs.layer(), 1).compute_all(uneven)


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


# ---- which activation a module applies ---------------------------------------------------------


def module(act: Any = None, gate: Any = None, **attributes: Any) -> types.SimpleNamespace:
    found = types.SimpleNamespace(has_gate=gate is not None, act_fn=act, **attributes)
    found._apply_gate = gate
    return found


def halves(act: Any) -> Any:
    return lambda x: act(x.chunk(2, -1)[0]) * x.chunk(2, -1)[1]


@pytest.mark.parametrize("name", ["silu", "gelu", "gelu_pytorch_tanh", "gelu_new", "relu", "relu2"])
def test_transformers_activations_are_recognised(name: str) -> None:
    act = pytest.importorskip("transformers.activations").ACT2FN[name]
    known = {"gelu_pytorch_tanh": "gelu_tanh", "gelu_new": "gelu_tanh"}.get(name, name)
    assert recognise(module(act)) == Activation(known, gated=False)
    assert recognise(module(gate=halves(act))) == Activation(known)


def test_clamped_gates_are_recognised_with_their_numbers() -> None:
    def clamped(alpha: float, limit: float, offset: float, alternate: bool) -> Any:
        def gate(x: Tensor) -> Tensor:
            g, u = (x[..., ::2], x[..., 1::2]) if alternate else x.chunk(2, -1)
            g, u = g.clamp(max=limit), u.clamp(-limit, limit)
            return (u + offset) * (g * torch.sigmoid(g * alpha))

        return module(gate=gate, is_concatenated=not alternate)

    for alternate in (False, True):
        found = recognise(clamped(1.702, 7.0, 1.0, alternate))
        assert found == Activation("clamped_swiglu", True, 1.702, 7.0, 1.0)
    found = recognise(clamped(1.0, 10.0, 0.0, False))
    assert found == Activation("clamped_swiglu", True, 1.0, 10.0, 0.0)


def test_what_is_not_known_is_said() -> None:
    assert "is none of silu" in str(recognise(module(torch.tanh)))
    assert "is none of silu" in str(recognise(module(gate=halves(torch.tanh))))
    clamped_after = lambda x: halves(lambda g: torch.nn.functional.silu(g).clamp(max=7))(x)  # noqa: E731
    assert "is none of" in str(recognise(module(gate=clamped_after)))

    def broken(x: Tensor) -> Tensor:
        raise RuntimeError("needs a GPU")

    assert "could not be evaluated (RuntimeError: needs a GPU)" in str(recognise(module(broken)))


# ---- the public function and the operator ------------------------------------------------------


def call(inputs: Inputs, **options: Any) -> Tensor:
    hidden, first, down, ids, topk, act, first_bias, down_bias = inputs.arguments
    biases = {"gate_up_bias": first_bias, "down_bias": down_bias}
    return functional.expert_ffn(hidden, first, down, ids, topk, act, **biases, **options)


@pytest.mark.parametrize("dtype", list(DTYPES))
def test_functional_backends_agree_with_the_reference(dtype: torch.dtype) -> None:
    inputs = Inputs.make(Case("", 12, 2, 4, 48, 32, bias=True), dtype)
    native = call(inputs)
    assert torch.equal(native, call(inputs, backend="native"))
    check(inputs, native)
    check(inputs, call(inputs, backend="torch"))


def test_functional_takes_names_and_experts_without_a_gate() -> None:
    for gated in (True, False):
        inputs = Inputs.make(Case("", 5, 2, 4, 48, 32, Activation("relu2", gated)), torch.float32)
        got = functional.expert_ffn(*inputs.arguments[:5], "relu2")
        assert torch.equal(got, call(inputs))


def test_the_operator_passes_opcheck() -> None:
    inputs = Inputs.make(Case("", 6, 2, 4, 48, 32, bias=True), torch.bfloat16)
    hidden, first, down, ids, topk, act, first_bias, down_bias = inputs.arguments
    arguments = (
        *(hidden, first, down, ids, topk, first_bias, down_bias),
        *(act.name, act.gated, act.alpha, act.limit, act.offset, "auto"),
    )
    torch.library.opcheck(
        torch.ops.moe_offload.expert_ffn.default,
        arguments,
        test_utils=("test_schema", "test_faketensor", "test_autograd_registration"),
    )
    assert torch.equal(torch.ops.moe_offload.expert_ffn(*arguments), call(inputs))


BAD = [
    ({"hidden": torch.zeros(5)}, "expected hidden \\[T, H\\]"),
    ({"hidden": torch.zeros(5, 47)}, r"hidden must be \[T, 48\]"),
    ({"gate_up": torch.zeros(4, 63, 48)}, r"gate_up \[4, 64 or 32, 48\]"),
    ({"topk_ids": torch.zeros(4, 2, dtype=torch.long)}, r"must both be \[5, A\]"),
    ({"topk_ids": torch.zeros(5, 2)}, "topk_ids must be integers"),
    ({"topk_weights": torch.zeros(5, 2, dtype=torch.long)}, "topk_weights floating point"),
    ({"down": torch.zeros(4, 48, 32, dtype=torch.bfloat16)}, "share one dtype"),
    ({"down": torch.zeros(4, 32, 48).transpose(1, 2)}, "contiguous in memory"),
    ({"down_bias": torch.zeros(4, 48)}, "biases for both projections"),
    ({"down_bias": torch.zeros(4, 9), "gate_up_bias": torch.zeros(4, 64)}, r"must be \(4, 48\)"),
    ({"topk_weights": torch.zeros(5, 2, device="meta")}, "on one device"),
    ({"activation": "swish"}, "activation must be one of silu"),
    ({"activation": Activation("silu", gated=False)}, "does not fit gate_up of 64 rows"),
    ({"backend": "cublas"}, "backend must be of auto, native, cuda, triton, torch, got"),
]


@pytest.mark.parametrize(("change", "message"), BAD)
def test_arguments_that_do_not_fit_are_refused(change: dict[str, Any], message: str) -> None:
    good = {
        "hidden": torch.zeros(5, 48),
        "gate_up": torch.zeros(4, 64, 48),
        "down": torch.zeros(4, 48, 32),
        "topk_ids": torch.zeros(5, 2, dtype=torch.long),
        "topk_weights": torch.zeros(5, 2),
    }
    assert functional.expert_ffn(**good).shape == (5, 48)
    with pytest.raises(ValueError, match=message):
        functional.expert_ffn(**{**good, **change})


def test_native_is_refused_off_the_cpu() -> None:
    meta = [torch.zeros(shape, device="meta") for shape in ((5, 48), (4, 64, 48), (4, 48, 32))]
    ids = torch.zeros(5, 2, dtype=torch.long, device="meta")
    with pytest.raises(ValueError, match="hidden is on meta"):
        functional.expert_ffn(*meta, ids, torch.zeros(5, 2, device="meta"), backend="native")


def test_a_resident_transformers_model_uses_the_same_kernels() -> None:
    pytest.importorskip("transformers")
    from tiny_models import experts_modules, prompt_ids, tiny_model

    model = tiny_model("mixtral", torch.bfloat16)
    assert set(model.get_experts_implementation().values()) == {"moe_offload"}
    _, experts = experts_modules(model)[0]
    calls = []

    def record(_: Any, args: tuple[Any, ...], out: Tensor) -> None:
        calls.append((args, out))

    handle = experts.register_forward_hook(record)
    with torch.no_grad():
        model(prompt_ids())
    handle.remove()
    (hidden, ids, topk), out = calls[0]
    expected = functional.expert_ffn(
        hidden, experts.gate_up_proj.detach(), experts.down_proj.detach(), ids, topk
    )
    assert torch.equal(out, expected)
    model.set_experts_implementation("grouped_mm")
    with torch.no_grad():
        theirs = experts(hidden, ids, topk)
    assert not torch.equal(theirs, out), "grouped_mm rounds more often"
    torch.testing.assert_close(theirs, out, rtol=0.02, atol=0.02)


def test_the_operator_takes_backends_of_gpus_for_backends_on_the_cpu_too() -> None:
    """What torch.compile calls refuses as eager code does, not as an unknown instruction set."""
    inputs = Inputs.make(Case("", 3, 2, 4, 48, 32), torch.float32)
    hidden, gate_up, down, ids, topk = inputs.arguments[:5]
    for call in (
        lambda: functional.expert_ffn(hidden, gate_up, down, ids, topk, backend="cuda"),
        lambda: torch.ops.moe_offload.expert_ffn(
            *(hidden, gate_up, down, ids, topk, None, None, "silu", True, 1.0, 0.0, 0.0, "cuda")
        ),
    ):
        with pytest.raises(ValueError, match="backend='cuda' cannot compute these experts"):
            call()


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
