"""grouped_gemm and combine against their PyTorch twins, in fp64 for the error."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import pytest
import torch
from torch import Tensor
from triton_support import DEVICES, poisoned

from moe_offload.triton_kernels import reference
from moe_offload.triton_kernels.combine import combine
from moe_offload.triton_kernels.grouped_gemm import Epilogue, choose_tiles, grouped_gemm
from moe_offload.triton_kernels.permute import Permutation, permute

SWIGLU = Epilogue("silu", "halves")
GPT_OSS = Epilogue("clamped_swiglu", "interleaved", 1.702, 1.5, 1.0)


@dataclass(frozen=True)
class Case:
    name: str
    tokens: int
    experts: int
    top_k: int
    hidden: int
    inner: int
    epilogue: Epilogue = SWIGLU
    dtype: torch.dtype = torch.float32
    bias: bool = False
    transposed: bool = False


CASES = [
    # edge
    Case("no tokens", 0, 4, 2, 16, 16),
    Case("one of everything", 1, 1, 1, 1, 1),
    Case("one token", 1, 8, 2, 32, 24),
    Case("sizes off every tile", 7, 5, 3, 45, 37, bias=True),
    Case("all experts", 3, 4, 4, 33, 20),
    # every row of the table of tiles
    Case("4 rows per expert", 8, 4, 2, 64, 40),
    Case("16 rows", 24, 3, 2, 70, 40),
    Case("32 rows", 30, 2, 2, 70, 40),
    Case("64 rows", 50, 2, 2, 70, 40),
    Case("many rows", 150, 2, 1, 70, 140),
    # layouts and activations
    Case("gpt-oss", 6, 4, 2, 40, 36, GPT_OSS, bias=True, transposed=True),
    Case("gpt-oss, bf16", 40, 4, 2, 40, 36, GPT_OSS, torch.bfloat16, True, True),
    Case("interleaved", 6, 4, 2, 40, 36, Epilogue("gelu_tanh", "interleaved")),
    Case("no gate", 6, 4, 2, 40, 36, Epilogue("relu2")),
    Case("no gate, many rows", 70, 2, 1, 40, 36, Epilogue("gelu"), bias=True),
    Case("relu", 6, 4, 2, 40, 36, Epilogue("relu", "halves")),
    Case("gelu", 6, 4, 2, 40, 36, Epilogue("gelu", "halves")),
    Case("fp16", 6, 4, 2, 40, 36, dtype=torch.float16, bias=True),
    Case("bf16", 6, 4, 2, 64, 36, dtype=torch.bfloat16),
    Case("bf16, many rows", 150, 2, 1, 64, 36, dtype=torch.bfloat16),
]

# the models' own lengths of a row, fewer experts and features; slow through the interpreter
MODEL_CASES = [
    Case("Qwen3 row", 1, 4, 2, 2048, 32, dtype=torch.bfloat16),
    Case("OLMoE row", 4, 4, 2, 64, 1024, dtype=torch.bfloat16),
    Case("DeepSeek-V3 row", 1, 2, 1, 7168, 16, dtype=torch.bfloat16),
    Case("gpt-oss row", 3, 2, 1, 2880, 16, GPT_OSS, torch.bfloat16, True, True),
]


@dataclass
class Inputs:
    x: Tensor
    up: Tensor
    down: Tensor
    up_bias: Tensor | None
    down_bias: Tensor | None
    rows: Permutation
    slots: Tensor
    weights: Tensor

    def double(self) -> Inputs:
        values = {
            name: value.double()
            if isinstance(value, Tensor) and value.is_floating_point()
            else value
            for name, value in vars(self).items()
        }
        return Inputs(**values)


def make(case: Case, device: str, seed: int = 0) -> Inputs:
    print(f"seed {seed}")
    generator = torch.Generator().manual_seed(seed)

    def randn(*shape: int) -> Tensor:
        return torch.randn(*shape, generator=generator)

    ids = [
        torch.randperm(case.experts, generator=generator)[: case.top_k] for _ in range(case.tokens)
    ]
    topk_ids = torch.stack(ids) if ids else torch.zeros(0, case.top_k, dtype=torch.int64)
    num_slots = case.experts + 3
    columns = case.inner * (1 if case.epilogue.gate == "none" else 2)

    def matrix(out: int, inner: int) -> Tensor:
        shape = (num_slots, inner, out) if case.transposed else (num_slots, out, inner)
        # A slab: slots lie further apart than they are long.
        slab = randn(num_slots, out * inner + 24) * inner**-0.5
        return slab.to(device, case.dtype)[:, : out * inner].unflatten(1, shape[1:])

    def bias(out: int) -> Tensor | None:
        return randn(num_slots, out).to(device, case.dtype) if case.bias else None

    return Inputs(
        randn(case.tokens, case.hidden).to(device, case.dtype),
        matrix(columns, case.hidden),
        matrix(case.hidden, case.inner),
        bias(columns),
        bias(case.hidden),
        permute(topk_ids.to(device), case.experts),
        torch.randperm(num_slots, generator=generator)[: case.experts].int().to(device),
        randn(case.tokens, case.top_k).to(device),
    )


def experts(case: Case, given: Inputs, ops: Any) -> tuple[Tensor, Tensor, Tensor]:
    inner = ops[0](
        given.x,
        given.up,
        given.rows,
        given.slots,
        gather=True,
        bias=given.up_bias,
        epilogue=case.epilogue,
        transposed=case.transposed,
    )
    out = ops[0](
        inner, given.down, given.rows, given.slots, bias=given.down_bias, transposed=case.transposed
    )
    return inner, out, ops[1](out, given.rows.route_row, given.weights)


KERNELS = (grouped_gemm, combine)
TWINS = (reference.grouped_gemm, reference.combine)


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize(
    "case",
    CASES + [pytest.param(case, marks=pytest.mark.slow) for case in MODEL_CASES],
    ids=lambda case: case.name,
)
def test_error_is_that_of_the_dtype(case: Case, device: str) -> None:
    """Against fp64, the kernels err at most 1.2 times as much as torch in the same dtype.

    Compared are the largest error and the norm of all errors, which would double if results were
    cut instead of rounded. The twin rounds where the kernels round, once per projection, and
    sums in fp32; the floor, where torch is lucky, is sqrt(K) roundings of fp32, by which the error
    of a sum of K terms grows when roundings are independent, relative to what is measured: the
    largest result, or the norm of all. (Which order of a float32 sum is the luckier one depends on
    the processor: interpreted, the kernels multiply by numpy's BLAS, the twin by torch's.)
    """
    given = make(case, device)
    with poisoned():
        got = experts(case, given, KERNELS)
    twin = experts(case, given, TWINS)
    exact = experts(case, given.double(), TWINS)
    for name, ours, theirs, truth in zip(
        ("inner", "out", "combined"), got, twin, exact, strict=True
    ):
        assert ours.shape == truth.shape
        assert ours.dtype == case.dtype
        if truth.numel() == 0:
            continue
        growth = max(case.hidden, case.inner) ** 0.5 * torch.finfo(torch.float32).eps
        error, unavoidable = ours.double() - truth, theirs.double() - truth
        for measure in (torch.linalg.vector_norm, lambda x: x.abs().max()):
            got_error, torch_error = measure(error).item(), measure(unavoidable).item()
            floor = growth * max(1.0, measure(truth).item())
            print(f"{name}: error {got_error:.3g}, torch {torch_error:.3g}, floor {floor:.3g}")
            assert got_error <= max(1.2 * torch_error, floor), name


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("tokens", [3, 40, 150])
def test_portions_do_not_matter(tokens: int, device: str) -> None:
    """Experts computed in any portions, from any slots, give the same bits; others stay alone."""
    case = Case("portions", tokens, 4, 2, 40, 36, dtype=torch.bfloat16, bias=True)
    given = make(case, device)
    arguments = {"gather": True, "bias": given.up_bias, "epilogue": case.epilogue}
    whole = grouped_gemm(given.x, given.up, given.rows, given.slots, **arguments)
    out = torch.full_like(whole, torch.nan)
    offsets = given.rows.expert_offsets.tolist()
    for expert in (2, 0, 3, 1):
        portion = torch.full_like(given.slots, -1)
        portion[expert] = given.slots[expert]
        before = out.clone()
        grouped_gemm(given.x, given.up, given.rows, portion, out=out, **arguments)
        others = torch.ones(len(out), dtype=torch.bool)
        others[offsets[expert] : offsets[expert + 1]] = False
        assert torch.equal(out[others].isnan(), before[others].isnan())
    assert torch.equal(out, whole)

    moved = given.up.flip(0).contiguous()  # other slots, another distance between them
    flipped = len(given.up) - 1 - given.slots
    arguments["bias"] = given.up_bias.flip(0)  # type: ignore[union-attr]
    again = grouped_gemm(given.x, moved, given.rows, flipped, **arguments)
    assert torch.equal(again, whole)


@pytest.mark.parametrize("device", DEVICES)
def test_other_slots_are_not_read(device: str) -> None:
    case = Case("nan", 5, 4, 2, 40, 36, bias=True)
    given = make(case, device)
    used = set(given.slots.tolist())
    for slot in set(range(len(given.up))) - used:
        given.up[slot] = torch.nan
        given.up_bias[slot] = torch.nan  # type: ignore[index]
    inner, _, _ = experts(case, given, KERNELS)
    assert inner.isfinite().all()


@pytest.mark.parametrize("device", DEVICES)
def test_offsets_beyond_32_bits(device: str) -> None:
    """slot * stride overflows 32 bits; strides without memory behind them, slot far out."""
    if device == "cuda":
        storage = torch.empty(2**32 + 4096, dtype=torch.bfloat16, device=device)
    else:
        storage = torch.empty(0, dtype=torch.bfloat16).new_empty(2**32 + 4096)  # never touched
    weight = storage.as_strided((1025, 16, 16), (2**22, 16, 1))
    weight[1024] = torch.eye(16).to(device)
    rows = permute(torch.zeros(3, 1, dtype=torch.int64, device=device), 1)
    x = torch.randn(3, 16, device=device).bfloat16()
    slots = torch.tensor([1024], dtype=torch.int32, device=device)
    assert torch.equal(grouped_gemm(x, weight, rows, slots), x)


@pytest.mark.parametrize("device", DEVICES)
def test_combine_masks_and_order(device: str) -> None:
    rows = torch.tensor(
        [[1e8, 1.0], [1.0, 2.0], [-1e8, 4.0], [torch.nan, torch.nan]], device=device
    )
    order = torch.tensor([[0, 1, 2], [0, 2, 1], [-1, 1, -1], [-1, -1, -1]], device=device).int()
    weights = torch.ones(4, 3, device=device)
    weights[2, 0], weights[3, 1] = torch.inf, torch.nan
    with poisoned():
        out = combine(rows, order, weights)
    # (1e8 + 1) - 1e8 = 0 in fp32, (1e8 - 1e8) + 1 = 1: the order of the choices is kept
    assert out.tolist() == [[0.0, 7.0], [1.0, 7.0], [1.0, 2.0], [0.0, 0.0]]
    assert combine(rows, order, weights, dtype=torch.bfloat16).dtype == torch.bfloat16


@pytest.mark.parametrize("device", DEVICES)
def test_each_argument_matters(device: str) -> None:
    case = Case("base", 5, 4, 2, 40, 40, GPT_OSS, bias=True)
    given = make(case, device)

    def run(**changes: Any) -> Tensor:
        arguments = {"gather": True, "bias": given.up_bias, "epilogue": GPT_OSS, **changes}
        return grouped_gemm(given.x, given.up, given.rows, given.slots, **arguments)

    base = run()
    assert not torch.equal(run(bias=None), base)
    for change in (
        {"alpha": 1.0},
        {"limit": 0.5},
        {"offset": 0.0},
        {"gate": "halves"},
        {"activation": "silu"},
    ):
        assert not torch.equal(run(epilogue=GPT_OSS._replace(**change)), base), change
    sorted_x = given.x[given.rows.row_route.long() // 2]
    plain = grouped_gemm(
        sorted_x, given.up, given.rows, given.slots, bias=given.up_bias, epilogue=GPT_OSS
    )
    assert torch.equal(plain, base)  # gather is only another way to find the rows


def test_table_of_tiles() -> None:
    bf16, fp32 = torch.bfloat16, torch.float32
    rows_per_expert = [1, 4, 5, 16, 17, 32, 33, 64, 65, 5000]
    chosen = [choose_tiles(rows * 8, 8, False, bf16).BLOCK_M for rows in rows_per_expert]
    assert chosen == [8, 8, 16, 16, 32, 32, 64, 64, 128, 128]
    one, gated, wide = (choose_tiles(1, 512, *rest) for rest in ((0, bf16), (1, bf16), (0, fp32)))
    assert one.BLOCK_M == 8
    assert gated.BLOCK_N == one.BLOCK_N // 2
    assert wide.BLOCK_K == one.BLOCK_K // 2


def test_errors() -> None:
    rows = Permutation.empty(3, 2, 4, torch.device("cpu"))
    good: dict[str, Any] = {
        "x": torch.zeros(6, 16),
        "weight": torch.zeros(5, 8, 16),
        "rows": rows,
        "slots": torch.zeros(4, dtype=torch.int32),
    }
    wrong: list[tuple[type[Exception], str, dict[str, Any]]] = [
        (ValueError, r"x must have shape \[6, any\], got \[3, 16\]", {"x": torch.zeros(3, 16)}),
        (ValueError, r"x must have shape \[3, any\], got \[6, 16\]", {"gather": True}),
        (TypeError, "x must be float32", {"x": torch.zeros(6, 16, dtype=torch.int32)}),
        (
            TypeError,
            "weight must be float32, got float16",
            {"weight": torch.zeros(5, 8, 16).half()},
        ),
        (ValueError, r"weight must have shape \[any, any, 16\]", {"weight": torch.zeros(5, 16, 8)}),
        (ValueError, r"weight must have shape \[any, 16, any\]", {"transposed": True}),
        (ValueError, r"slots must have shape \[4\]", {"slots": torch.zeros(5, dtype=torch.int32)}),
        (TypeError, "slots must be int32", {"slots": torch.zeros(4, dtype=torch.int64)}),
        (ValueError, r"bias must have shape \[5, 8\]", {"bias": torch.zeros(5, 7)}),
        (ValueError, r"out must have shape \[6, 8\]", {"out": torch.zeros(6, 9)}),
        (ValueError, "epilogue.gate must be", {"epilogue": Epilogue(gate="thirds")}),
        (ValueError, "got 'clamped_swiglu'", {"epilogue": Epilogue("clamped_swiglu")}),
        (ValueError, "got 'none'", {"epilogue": Epilogue("none", "halves")}),
        (
            ValueError,
            "columns in pairs, got 7",
            {"weight": torch.zeros(5, 7, 16), "epilogue": Epilogue("silu", "halves")},
        ),
    ]
    for error, message, change in wrong:
        with pytest.raises(error, match=message):
            grouped_gemm(**{**good, **change})

    order = torch.zeros(3, 2, dtype=torch.int32)
    with pytest.raises(TypeError, match="route_row must be int32"):
        combine(torch.zeros(6, 4), order.long(), torch.zeros(3, 2))
    with pytest.raises(ValueError, match=r"topk_weights must have shape \[3, 2\]"):
        combine(torch.zeros(6, 4), order, torch.zeros(2, 3))
    with pytest.raises(TypeError, match="dtype must be float32"):
        combine(torch.zeros(6, 4), order, torch.zeros(3, 2), dtype=torch.int32)
