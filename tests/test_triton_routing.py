"""route_predict_permute and permute against their twins, and against transformers' routers."""

from __future__ import annotations

from dataclasses import dataclass, field, replace
from typing import Any

import pytest
import torch
from torch import Tensor
from triton_support import DEVICES, assert_same, poisoned

from moe_offload.triton_kernels import reference
from moe_offload.triton_kernels.launch import interpreting
from moe_offload.triton_kernels.next_layer import NextLayerPredictor
from moe_offload.triton_kernels.permute import permute
from moe_offload.triton_kernels.route_predict_permute import (
    Routing,
    route_predict_permute,
    routing_workspace,
)
from moe_offload.triton_kernels.scoring import Scoring

SIGMOID = Scoring("sigmoid", normalize=True, scale=2.5)


@dataclass(frozen=True)
class Case:
    name: str
    tokens: int
    experts: int
    top_k: int
    scoring: Scoring = field(default_factory=Scoring)
    hidden: int = 40
    layers: int = 1  # predicted; 0 is no predictor
    top_m: int = 3
    dtype: torch.dtype = torch.float32


CASES = [
    # edge
    Case("no tokens", 0, 8, 2),
    Case("one expert", 3, 1, 1, top_m=1),
    Case("all experts chosen", 4, 8, 8, top_m=8),
    Case("one token", 1, 8, 2),
    Case("two tokens", 2, 8, 2, layers=2),
    Case("three tokens", 3, 12, 4, layers=2),
    Case("sizes off every tile", 33, 21, 5, hidden=71, layers=2, top_m=4),
    Case("last of one launch", 64, 16, 4),
    Case("first of the chain", 65, 16, 4, layers=2),
    Case("chain, off every tile", 130, 21, 5, hidden=33, layers=2),
    Case("many experts", 5, 300, 6, top_m=7),
    Case("no predictor", 9, 16, 4, layers=0),
    Case("no predictor, chain", 80, 16, 4, layers=0),
    # the families' rules, small
    Case("mixtral", 7, 8, 2, Scoring(normalize=True), dtype=torch.bfloat16),
    Case("granite", 7, 12, 3, Scoring("softmax_topk"), dtype=torch.bfloat16),
    Case("gpt-oss", 7, 32, 4, Scoring("softmax_topk"), dtype=torch.float16),
    Case("deepseek", 7, 32, 6, replace(SIGMOID, num_groups=4, top_groups=2), top_m=6),
    Case("groups of three", 5, 12, 4, replace(SIGMOID, num_groups=4, top_groups=2)),
    Case("three groups", 70, 15, 4, replace(SIGMOID, num_groups=3, top_groups=2)),
    Case("softmax in groups", 5, 12, 3, Scoring(num_groups=2, top_groups=1)),
    # the models' own sizes
    Case("Qwen3-30B-A3B, one token", 1, 128, 8, Scoring(normalize=True), 256, 1, 8),
    Case("DeepSeek-V3", 4, 256, 8, replace(SIGMOID, num_groups=8, top_groups=4), 128, 1, 8),
]


def make(case: Case, device: str, seed: int = 0) -> tuple[Tensor, dict[str, Any]]:
    """Logits and keyword arguments. Heads and hidden states are small integers, so every order of
    summation gives the same logits, and ties occur."""
    print(f"seed {seed}")
    generator = torch.Generator().manual_seed(seed)

    def randn(*shape: int) -> Tensor:
        return torch.randn(*shape, generator=generator)

    logits = randn(case.tokens, case.experts).to(case.dtype)
    arguments: dict[str, Any] = {
        "slot_of": torch.randint(-1, 5000, (4, case.experts), generator=generator).int(),
        "layer": 1,
    }
    sigmoid = case.scoring.kind == "sigmoid"
    if sigmoid:
        arguments["correction_bias"] = randn(case.experts).to(device)
    if case.layers:
        shape = (case.layers, case.experts)
        head = torch.randint(-2, 3, (*shape, case.hidden), generator=generator).to(case.dtype)
        hidden = torch.randint(-1, 2, (case.tokens, case.hidden), generator=generator)
        arguments["hidden"] = hidden.to(device, case.dtype)
        arguments["predictor"] = NextLayerPredictor(
            head.to(device),
            case.top_m,
            case.scoring,
            bias=randn(*shape).to(device),
            correction_bias=randn(*shape).to(device) if sigmoid else None,
        )
    arguments["slot_of"] = arguments["slot_of"].to(device)
    return logits.to(device), arguments


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("case", CASES, ids=lambda case: case.name)
def test_equals_twin(case: Case, device: str) -> None:
    logits, arguments = make(case, device)
    predictor = arguments.get("predictor")
    workspace = routing_workspace(predictor, device)
    with poisoned():
        got = route_predict_permute(
            logits, case.top_k, case.scoring, workspace=workspace, **arguments
        )
        again = route_predict_permute(
            logits, case.top_k, case.scoring, workspace=workspace, **arguments
        )
    want = reference.route_predict_permute(logits, case.top_k, case.scoring, **arguments)
    assert_same(got, want)
    assert_same(again, got, rtol=0.0)
    assert not workspace.any(), "the counters must be zero again"


@pytest.mark.skipif(not interpreting(), reason="the interpreter runs one program after another")
@pytest.mark.parametrize("order", ["reversed", "shuffled"])
@pytest.mark.parametrize("tokens", [2, 64, 80])
def test_any_order_of_programs(tokens: int, order: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Whichever program arrives last does the rest, and nothing else depends on the order."""
    from triton.runtime.interpreter import interpreter_builder as builder

    case = Case("order", tokens, 21, 4, hidden=200, layers=2)
    logits, arguments = make(case, "cpu")
    want = route_predict_permute(logits, 4, **arguments)
    generator = torch.Generator().manual_seed(tokens)
    set_index = builder.set_grid_idx
    orders: dict[int, list[int]] = {}

    def in_another_order(x: int, y: int, z: int) -> None:
        size = builder.grid_dim[0]
        if size not in orders:
            shuffled = torch.randperm(size, generator=generator).tolist()
            orders[size] = shuffled if order == "shuffled" else list(range(size))[::-1]
        set_index(orders[size][x], y, z)

    monkeypatch.setattr(builder, "set_grid_idx", in_another_order)
    with poisoned():
        got = route_predict_permute(logits, 4, **arguments)
    assert max(orders) > 1
    assert_same(got, want, rtol=0.0)


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("seed", range(3))
def test_random_sizes(seed: int, device: str) -> None:
    generator = torch.Generator().manual_seed(seed + 1000)

    def draw(low: int, high: int) -> int:
        return int(torch.randint(low, high + 1, (), generator=generator))

    experts = draw(2, 70)
    kind = ("softmax", "softmax_topk", "sigmoid")[draw(0, 2)]
    scoring = Scoring(kind, bool(draw(0, 1)))  # type: ignore[arg-type]
    top_k, top_m = draw(1, min(experts, 9)), draw(1, min(experts, 9))
    case = Case("random", draw(1, 90), experts, top_k, scoring, draw(1, 90), draw(0, 2), top_m)
    print(case)
    logits, arguments = make(case, device, seed)
    got = route_predict_permute(logits, top_k, scoring, **arguments)
    assert_same(got, reference.route_predict_permute(logits, top_k, scoring, **arguments))


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("tokens", [1, 7, 64, 65, 200])
@pytest.mark.parametrize("dtype", [torch.int32, torch.int64])
def test_permute_with_masked_ids(tokens: int, dtype: torch.dtype, device: str) -> None:
    """Ids that are not ours get no row, whichever way they are out of range."""
    generator = torch.Generator().manual_seed(tokens)
    experts, top_k = 11, 4
    ids = torch.stack([torch.randperm(15, generator=generator)[:top_k] for _ in range(tokens)]) - 2
    if dtype == torch.int64:
        ids[0, 0] = 2**40
    ids = ids.to(device, dtype)
    with poisoned():
        got = permute(ids, experts)
    assert_same(got, reference.permute(ids, experts))


@pytest.mark.parametrize("device", DEVICES)
def test_permute_example_of_the_docstring(device: str) -> None:
    rows = permute(torch.tensor([[1, 3], [3, 0], [1, 3]], device=device), 4)
    assert rows.expert_offsets.tolist() == [0, 1, 3, 3, 6]
    assert rows.row_route.tolist() == [3, 0, 4, 1, 2, 5]
    assert rows.route_row.tolist() == [[1, 3], [4, 0], [2, 5]]
    assert rows.active_experts.tolist() == [0, 1, 3, -1]


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("tokens", [5, 70])
def test_permute_all_to_one_and_to_none(tokens: int, device: str) -> None:
    for expert in (0, 9, 10):
        ids = torch.full((tokens, 1), expert, device=device)
        with poisoned():
            got = permute(ids, 10)
        assert_same(got, reference.permute(ids, 10))
    slots = torch.tensor([[4000, 1023], [1023, 7]], dtype=torch.int32, device=device)
    assert_same(permute(slots, 4096), reference.permute(slots, 4096))  # ids beyond 1000


@pytest.mark.parametrize("device", DEVICES)
def test_ties_signed_zeros_and_nan(device: str) -> None:
    nan, inf = float("nan"), float("inf")
    logits = torch.tensor(
        [
            [1.0, 3.0, 3.0, 3.0, 0.0, 1.0],
            [0.0, -0.0, 0.0, -1.0, -0.0, -1.0],
            [-inf, -inf, 5.0, -inf, -inf, -inf],
            [1.0, nan, 2.0, inf, nan, 0.0],
        ],
        device=device,
    )
    ids = route_predict_permute(logits, 3, Scoring("softmax_topk")).topk_ids
    assert ids.tolist() == [[1, 2, 3], [0, 1, 2], [2, 0, 1], [1, 4, 3]]
    # the twin, with its independent rule, agrees
    assert reference.choose(logits, 3, Scoring("softmax_topk"))[0].tolist() == ids.tolist()


@pytest.mark.parametrize("device", DEVICES)
def test_strided_inputs(device: str) -> None:
    case = Case("strided", 6, 16, 4)
    logits, arguments = make(case, device)
    hidden = torch.cat([arguments["hidden"], arguments["hidden"]], dim=1)[:, : case.hidden]
    wide = torch.cat([logits, logits], dim=1)[:, : case.experts]
    got = route_predict_permute(wide, 4, **{**arguments, "hidden": hidden})
    assert_same(got, reference.route_predict_permute(logits, 4, **arguments))


@pytest.mark.parametrize("device", DEVICES)
def test_each_argument_matters(device: str) -> None:
    base = Case("base", 6, 16, 4, replace(SIGMOID, num_groups=4, top_groups=2), layers=2)
    logits, arguments = make(base, device)
    predictor: NextLayerPredictor = arguments["predictor"]

    def run(scoring: Scoring = base.scoring, top_k: int = 4, **changes: Any) -> Routing:
        return route_predict_permute(logits, top_k, scoring, **{**arguments, **changes})

    def differ(a: Routing, b: Routing, field: str) -> bool:
        x, y = getattr(a, field), getattr(b, field)
        return x.shape != y.shape or not torch.equal(x, y)

    plain = run()
    assert differ(run(replace(base.scoring, normalize=False)), plain, "topk_weights")
    assert differ(run(replace(base.scoring, scale=1.0)), plain, "topk_weights")
    assert differ(run(replace(base.scoring, num_groups=1, top_groups=1)), plain, "topk_ids")
    assert differ(run(replace(base.scoring, top_groups=3)), plain, "topk_ids")
    assert differ(run(top_k=3), plain, "topk_ids")
    assert differ(run(correction_bias=None), plain, "topk_ids")
    assert differ(run(layer=0), plain, "topk_slots")
    assert run(weights_dtype=torch.bfloat16).topk_weights.dtype == torch.bfloat16
    first, second = plain.prediction, None
    assert first is not None
    for change in (
        replace(predictor, bias=None),
        replace(predictor, correction_bias=None),
        replace(predictor, top_m=4),
        replace(predictor, weight=-predictor.weight),
        replace(predictor, scoring=Scoring("sigmoid")),
    ):
        second = run(predictor=change).prediction
        assert second is not None
        assert not torch.equal(second.prefetch_ids, first.prefetch_ids), change
    softmax = run(Scoring(), correction_bias=None)
    assert differ(run(Scoring("softmax_topk"), correction_bias=None), softmax, "topk_weights")


# transformers' routers ------------------------------------------------------------------------

ROUTERS = {
    "mixtral": Scoring(normalize=True),
    "qwen3_moe": Scoring(normalize=True),
    "olmoe": Scoring(),
    "granitemoe": Scoring("softmax_topk"),
    "gpt_oss": Scoring("softmax_topk"),
    "deepseek_v3": SIGMOID,
    "glm4_moe": SIGMOID,
}


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("name", ROUTERS)
def test_equals_transformers_router(name: str, device: str) -> None:
    """The same experts as the family's own router, from its own logits; weights to fp32 rounding.

    Logits are drawn without ties, where torch.topk's choice is defined. Sets are compared: the
    sigmoid families ask torch.topk for no order.
    """
    pytest.importorskip("transformers")
    from tiny_models import tiny_model

    overrides = {"norm_topk_prob": True} if name == "qwen3_moe" else {}
    model = tiny_model(name, seed=3, **overrides)
    kinds = ("Router", "Gate")
    router = next(m for m in model.modules() if any(k in type(m).__name__ for k in kinds))
    generator = torch.Generator().manual_seed(5)
    experts = router.weight.shape[0]
    bias = None
    with torch.no_grad():
        router.weight.copy_(torch.randn(router.weight.shape, generator=generator))
        if getattr(router, "bias", None) is not None:
            router.bias.copy_(torch.randn(experts, generator=generator))
        if hasattr(router, "e_score_correction_bias"):
            bias = torch.randn(experts, generator=generator) * 0.3
            router.e_score_correction_bias.copy_(bias)
        router = router.to(device)
        hidden = torch.randn(40, router.weight.shape[1], generator=generator).to(device)
        results = router(hidden)
    ids = next(r for r in results if not r.dtype.is_floating_point)
    logits = next(r for r in results if r.dtype.is_floating_point and r.shape[1] == experts)
    weights = next(r for r in results if r.dtype.is_floating_point and r.shape == ids.shape)

    scoring = ROUTERS[name]
    if scoring.kind == "sigmoid":
        config = model.config
        scoring = replace(
            scoring,
            normalize=config.norm_topk_prob,
            scale=config.routed_scaling_factor,
            num_groups=config.n_group,
            top_groups=config.topk_group,
        )
    got = route_predict_permute(
        logits, ids.shape[1], scoring, correction_bias=None if bias is None else bias.to(device)
    )
    order, ours = ids.argsort(dim=1), got.topk_ids.long().argsort(dim=1)
    assert torch.equal(got.topk_ids.long().gather(1, ours), ids.gather(1, order))
    torch.testing.assert_close(
        got.topk_weights.gather(1, ours), weights.float().gather(1, order), rtol=1e-5, atol=1e-7
    )
