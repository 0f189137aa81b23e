"""Dense linear layers by the CPU kernels: right on every instruction set, and torch's where not."""

from __future__ import annotations

import copy
import os
import pickle
import subprocess
import sys
from collections.abc import Iterator
from types import SimpleNamespace

import pytest
import tiny_models
import torch
import torch.nn.functional as F
from torch import Tensor, nn

import moe_offload
from moe_offload import _core, dense
from moe_offload.backends.native import DTYPES
from moe_offload.dense import NativeLinear, linear, use_dense_kernels

KERNELS = [(dtype, isa) for dtype, name in DTYPES.items() for isa in _core.cpu_isas(name)]


def run(x: Tensor, weight: Tensor, bias: Tensor | None, isa: str, threads: int = 2) -> Tensor:
    """The kernel by itself, its output poisoned."""
    rows, out = x.shape[0], weight.shape[0]
    y = torch.full((rows, out), float("nan"), dtype=x.dtype)
    _core.DenseKernels(DTYPES[x.dtype], isa).multiply(
        *(x.data_ptr(), rows, x.shape[1], out, weight.data_ptr()),
        *(weight.stride(0) * weight.element_size(), 0 if bias is None else bias.data_ptr()),
        *(y.data_ptr(), threads),
    )
    return y


@pytest.mark.parametrize(("dtype", "isa"), KERNELS)
@pytest.mark.parametrize("rows", [1, 3, 8, 9, 33, 600])
@pytest.mark.parametrize("with_bias", [False, True])
def test_error_is_torchs_own(dtype: torch.dtype, isa: str, rows: int, with_bias: bool) -> None:
    num_in, num_out = 2003, 150
    x, storage = torch.randn(rows, num_in).to(dtype), torch.randn(num_out, num_in + 5).to(dtype)
    weight = storage[:, :num_in]  # rows that do not lie without gaps
    bias = torch.randn(num_out).to(dtype) if with_bias else None
    got = run(x, weight, bias, isa)
    exact = x.double() @ weight.double().T + (0.0 if bias is None else bias.double())
    error, theirs = (got - exact).abs().max(), (F.linear(x, weight, bias) - exact).abs().max()
    # In 16 bits the last rounding decides. In float32 it is the order of summation: many rows are
    # summed in pieces of 256 k. Step k of a walk rounds a sum of about sqrt(k) by up to half an
    # ulp, 2^-24 of it, so a piece has a deviation of 2^-24 * 256 / sqrt(6), and eight of them one
    # of 2^-24 * 300; this allows seven. One walk over all of K would have 2^-24 * 820.
    if dtype == torch.float32:
        assert error <= 7 * 300 * 2.0**-24
    else:
        assert error <= 1.2 * theirs
    assert torch.equal(got, run(x, weight, bias, isa, threads=1))


@pytest.fixture
def counted(monkeypatch: pytest.MonkeyPatch) -> Iterator[list[int]]:
    """Rows of each call that reached the kernels; every number of rows is taken."""
    calls: list[int] = []
    kernels = dense.dense_kernels

    def counting(dtype: torch.dtype) -> SimpleNamespace:
        def count(*args: int) -> None:
            calls.append(args[1])
            kernels(dtype).multiply(*args)

        return SimpleNamespace(multiply=count)

    monkeypatch.setattr(dense, "dense_kernels", counting)
    monkeypatch.setattr(dense, "_pays", lambda dtype: (1, 1000 if dtype in DTYPES else 0))
    return calls


def test_what_the_kernels_do_not_take_is_torchs(counted: list[int]) -> None:
    layer = nn.Linear(24, 16)
    use_dense_kernels(nn.Sequential(layer))
    assert type(layer) is NativeLinear
    x = torch.randn(2, 3, 24)
    assert layer(x).requires_grad, "gradients go through torch"
    with torch.no_grad():
        with torch.autocast("cpu", torch.bfloat16):
            assert layer(x).dtype == torch.bfloat16
        assert layer.to("meta")(x.to("meta")).device.type == "meta"
        assert F.linear(x[:0], torch.randn(16, 24)).shape == linear(x[:0], torch.ones(16, 24)).shape
        assert linear(x.double(), torch.ones(5, 24).double()).dtype == torch.float64
        transposed = torch.randn(24, 16).T
        assert torch.equal(linear(x, transposed), F.linear(x, transposed))
        with pytest.raises(RuntimeError, match="shapes cannot be multiplied"):
            linear(x, torch.ones(16, 23))
        with pytest.raises(RuntimeError, match="dtype"):
            linear(x, torch.ones(16, 24).bfloat16())
    assert counted == []


def test_shapes_and_strides(counted: list[int]) -> None:
    weight, bias = torch.randn(16, 24), torch.randn(16)
    x = torch.randn(24, 6).T.reshape(6, 24)
    for given in (x, x[0], x.reshape(2, 3, 24), torch.randn(24, 6).T):
        got = linear(given, weight, bias)
        assert got.shape == (*given.shape[:-1], 16)
        torch.testing.assert_close(got, F.linear(given, weight, bias))
    assert counted == [6, 1, 6, 6]


def test_number_of_rows_decides() -> None:
    first, last = dense._pays(torch.float32)
    if first > last:
        pytest.skip("this instruction set leaves dense layers to torch")
    for isa, dtype in dense.PAYS:
        assert isa in ("amx", "avx512_bf16", "avx512", "avx2")
        assert dtype in DTYPES
    assert dense._pays(torch.float64) == (1, 0)


def test_a_processor_with_amx_has_rows_of_its_own(monkeypatch: pytest.MonkeyPatch) -> None:
    """There float16 and float32 run on AVX-512 too, but torch is faster."""
    found = SimpleNamespace(isa="avx512_bf16")
    monkeypatch.setattr(
        dense,
        "dense_kernels",
        lambda dtype: found if dtype == torch.bfloat16 else SimpleNamespace(isa="avx512"),
    )
    pays = dense._pays.__wrapped__
    assert pays(torch.float16) == dense.PAYS["avx512", torch.float16]
    found.isa = "amx"
    assert pays(torch.float16) == dense.PAYS["amx", torch.float16]
    assert pays(torch.bfloat16) == dense.PAYS["amx", torch.bfloat16]


def test_compiled_layers_are_torchs(counted: list[int]) -> None:
    layer = nn.Linear(24, 16).requires_grad_(False)
    use_dense_kernels(nn.Sequential(layer))
    compiled = torch.compile(layer, fullgraph=True, backend="eager")
    x = torch.randn(2, 24)
    assert torch.equal(compiled(x), F.linear(x, layer.weight, layer.bias))
    assert counted == []


def test_classes_are_swapped_and_put_back() -> None:
    class Own(nn.Linear):
        pass

    model = nn.Sequential(nn.Linear(8, 8), Own(8, 8), nn.Sequential(nn.Linear(8, 4)))
    before, keys = repr(model), list(model.state_dict())
    undo = use_dense_kernels(model)
    assert [type(m) for m in (model[0], model[1], model[2][0])] == [NativeLinear, Own, NativeLinear]
    assert repr(model) == before
    assert list(model.state_dict()) == keys
    assert type(copy.deepcopy(model)[0]) is NativeLinear
    assert type(pickle.loads(pickle.dumps(model[0]))) is NativeLinear
    use_dense_kernels(model)()  # nothing left to swap, nothing taken back
    assert type(model[0]) is NativeLinear
    undo()
    assert [type(m) for m in (model[0], model[2][0])] == [nn.Linear, nn.Linear]


@pytest.mark.parametrize(
    ("options", "native"),
    [
        ({}, True),
        ({"dense_backend": "torch"}, False),
        ({"expert_backend": "grouped_mm"}, False),
        ({"expert_backend": "grouped_mm", "dense_backend": "native"}, True),
    ],
)
def test_an_offloaded_model(options: dict[str, str], native: bool) -> None:
    model = tiny_models.tiny_model("qwen3_moe", implementation="grouped_mm")
    with moe_offload.offload(model, "30%", **options) as offloader:
        assert type(model.lm_head) is (NativeLinear if native else nn.Linear)
        assert offloader.stats()["dense_backend"] == ("native" if native else "torch")
    assert not any(type(m) is NativeLinear for m in model.modules()), "restore left something"


def test_verify_finds_no_difference_in_bfloat16() -> None:
    model = tiny_models.tiny_model("qwen2_moe", torch.bfloat16, implementation="grouped_mm")
    with moe_offload.offload(model, "30%"):
        report = moe_offload.verify(model, [[5, 6, 7, 8]], max_new_tokens=4, hostile=False)
        report.raise_if_different()
        assert type(model.lm_head) is NativeLinear


def test_bad_options() -> None:
    model = tiny_models.tiny_model("qwen3_moe")
    with pytest.raises(ValueError, match=r'"native" computes on the CPU only, got device=.cuda'):
        moe_offload.offload(model, dense_backend="native", device="cuda")
    with pytest.raises(ValueError, match="dense_backend: expected one of auto, native, torch"):
        moe_offload.offload(model, dense_backend="mkl")


def test_a_forced_instruction_set_is_used() -> None:
    code = (
        "from moe_offload import dense; import torch; f32 = torch.float32; "
        "print(dense.dense_kernels(f32).isa, dense._pays(f32))"
    )
    environment = {**os.environ, "MOE_OFFLOAD_CPU_ISA": "plain"}
    done = subprocess.run(
        [sys.executable, "-c", code], env=environment, capture_output=True, text=True, check=True
    )
    assert done.stdout.strip() == "plain (1, 0)"
