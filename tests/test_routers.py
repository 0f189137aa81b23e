"""Routers on the CPU kernels: logits against fp64, choices against torch.topk, ties included."""

from __future__ import annotations

from itertools import product

import pytest
import torch
from torch import Tensor

from moe_offload import _core
from moe_offload.backends.native import DTYPES
from moe_offload.router_rules import Rule
from moe_offload.routing import route
from moe_offload.triton_kernels import reference
from moe_offload.triton_kernels.scoring import Scoring

CASES = [(dtype, isa) for dtype in DTYPES for isa in _core.cpu_isas(DTYPES[dtype])]
ULP = {torch.float32: 2.0**-23, torch.bfloat16: 2.0**-7, torch.float16: 2.0**-10}  # relative

SOFTMAX = Rule("softmax", 3)
RULES = {
    "softmax": SOFTMAX,
    "normalised": SOFTMAX._replace(normalises=True),
    "mixtral": SOFTMAX._replace(normalises=True, float_weights=True),
    "granite": Rule("softmax_topk", 3, float_logits=True),
    "gpt-oss": Rule("softmax_topk", 3),
    "minimax": Rule("sigmoid", 3, sorted=False, normalises=True, float_weights=True),
    "deepseek-v3": Rule(
        *("sigmoid", 3, False, False, True, 1e-20, 2.5, (4, 2, 2), -torch.inf, True, True)
    ),
    "deepseek-v2": Rule(
        *("softmax", 3, False, False, False, 0.0, 16.0, (4, 2, 1), 0.0, True, True)
    ),
}


def forced(x, weight, rule, isa, bias=None, correction=None, threads=2):
    num_experts, width = weight.shape
    rows = x.numel() // width
    float32, dtype = torch.float32, x.dtype
    logits = torch.full((rows, num_experts), torch.nan, dtype=dtype)
    weights = torch.full((rows, rule.top_k), torch.nan, dtype=dtype)
    logits = logits.to(float32) if rule.float_logits else logits
    weights = weights.to(float32) if rule.float_weights else weights
    ids = torch.full((rows, rule.top_k), -1)
    _core.DenseKernels(DTYPES[dtype], isa).route(
        *(x.data_ptr(), rows, width, num_experts, weight.data_ptr()),
        *(0 if t is None else t.data_ptr() for t in (bias, correction)),
        _core.RouterRule(*rule),
        *(logits.data_ptr(), weights.data_ptr(), ids.data_ptr(), threads),
    )
    return logits, weights, ids


def choose(logits: Tensor, rule: Rule, correction: Tensor | None) -> tuple[Tensor, Tensor]:
    """The PyTorch twin, from logits on: fp32 as the models have it; weights [T, A] and ids."""
    scores = logits.float()
    if rule.score == "softmax":
        scores = scores.softmax(-1)
    elif rule.score == "sigmoid":
        scores = scores.sigmoid()
    choice = scores if correction is None else scores + correction
    num_groups, kept, best = rule.groups
    if num_groups > 1:
        grouped = choice.view(len(choice), num_groups, -1)
        group_scores = grouped.topk(best, dim=-1)[0].sum(dim=-1)
        group_ids = group_scores.topk(kept, dim=-1, sorted=False)[1]
        out = torch.ones_like(group_scores, dtype=torch.bool).scatter_(1, group_ids, False)
        choice = grouped.masked_fill(out.unsqueeze(-1), rule.masked).view_as(choice)
    ids = choice.topk(rule.top_k, dim=-1, sorted=rule.sorted)[1]
    weights = scores.gather(1, ids)
    if rule.score == "softmax_topk":
        weights = weights.softmax(-1)
    if rule.normalises:
        weights = weights / (weights.sum(-1, keepdim=True) + rule.epsilon)
    return weights * rule.scale, ids


def close(got: Tensor, wanted: Tensor) -> bool:
    """Within 2^-20 in fp32: exp to 2 ulp, a sum's and two or three other roundings on both sides,
    below 16 ulp of 2^-24; then one rounding of each to got's dtype, so that one ulp is left."""
    bound = 2.0**-20 + (ULP[got.dtype] if got.dtype != torch.float32 else 0.0)
    return torch.allclose(got.double(), wanted.double(), rtol=bound, atol=1e-37, equal_nan=True)


def grid(num_tokens: int, width: int, num_experts: int, dtype: torch.dtype):
    """x and weight whose products are exact in every dtype and order, and tie often."""
    x = torch.randint(-1, 2, (num_tokens, width)).to(dtype)
    return x, (torch.randint(-2, 3, (num_experts, width)) / 8).to(dtype)


def corrections(num_groups: int, size: int) -> Tensor:
    """The same for all of a group: sums of two choices that are equal are equal in all their parts,
    else the last bit of a sigmoid would decide which is larger."""
    return (torch.randint(0, 4, (num_groups,)) / 8.0).repeat_interleave(size)


@pytest.fixture(autouse=True)
def seed() -> None:
    torch.manual_seed(0)


@pytest.mark.parametrize(("dtype", "isa"), CASES)
@pytest.mark.parametrize(
    ("width", "num_experts"), [(1, 4), (7, 12), (64, 8), (100, 20), (2048 + 8, 64), (520, 260)]
)
def test_logits_against_fp64(dtype, isa, width, num_experts) -> None:
    x, weight = torch.randn(11, width).to(dtype), torch.randn(num_experts, width).to(dtype)
    bias = torch.randn(num_experts).to(dtype)
    exact = x.double() @ weight.double().t() + bias.double()
    size = x.double().abs() @ weight.double().abs().t() + bias.double().abs()
    logits, _, _ = forced(x, weight, Rule("sigmoid", 3, False, float_logits=True), isa, bias)
    # a sum of width products: at most width + 1 roundings of 2^-24 of partial sums below `size`
    assert ((logits - exact).abs() <= (width + 1) * 2.0**-24 * size).all()
    rounded, _, _ = forced(x, weight, RULES["gpt-oss"], isa, bias)
    assert torch.equal(rounded, logits.to(dtype))
    granite, _, _ = forced(x, weight, RULES["granite"], isa, bias)
    assert torch.equal(granite, rounded.float())


@pytest.mark.parametrize(("dtype", "isa"), CASES)
@pytest.mark.parametrize("name", RULES)
def test_choices_and_weights_are_those_of_torch(dtype, isa, name) -> None:
    rule = RULES[name]
    x, weight = grid(200, 40, 24, dtype)
    bias = torch.full((24,), 1 / 32, dtype=dtype)  # no logits are opposite, see corrections
    correction = corrections(4, 6) if rule.score == "sigmoid" else None
    logits, weights, ids = forced(x, weight, rule, isa, bias, correction)
    assert torch.equal(logits.double(), x.double() @ weight.double().t() + 1 / 32)
    wanted, wanted_ids = choose(logits, rule, correction)
    assert torch.equal(ids, wanted_ids)
    assert close(weights, wanted)


@pytest.mark.parametrize("name", ["softmax", "normalised", "deepseek-v3"])
def test_rows_without_ties_are_as_the_triton_kernels_twin_has_them(name) -> None:
    rule = RULES[name]
    x, weight = torch.randn(40, 30), torch.randn(16, 30)
    correction = 0.1 * torch.randn(16) if rule.score == "sigmoid" else None
    logits, weights, ids = route(x, weight, rule, correction=correction)
    scoring = Scoring(rule.score, rule.normalises, *rule.groups[:2], rule.scale)
    wanted_ids, wanted, _ = reference.choose(logits, 3, scoring, correction)
    ids, order = ids.sort(-1)
    wanted_ids, wanted_order = wanted_ids.sort(-1)
    assert torch.equal(ids, wanted_ids)
    assert close(weights.gather(1, order), rule.scale * wanted.gather(1, wanted_order))


SIZES = [(1, 1), (4, 4), (7, 1), (8, 2), (16, 4), (60, 4), (64, 1), (64, 6), (64, 8), (72, 8)]
SIZES += [(128, 2), (128, 8), (160, 6), (256, 4), (256, 8), (384, 8), (512, 8), (512, 10)]


@pytest.mark.parametrize(("num_experts", "top_k"), SIZES)
@pytest.mark.parametrize("is_sorted", [True, False])
def test_equal_choices_are_chosen_in_torchs_order(num_experts, top_k, is_sorted) -> None:
    rule = Rule("softmax_topk", top_k, sorted=is_sorted)
    for levels in (1, 2, 3, 20):
        logits = torch.randint(0, levels, (50, num_experts)).float()
        got, _, ids = route(torch.eye(50), logits.t().contiguous(), rule)
        assert torch.equal(got, logits)
        assert torch.equal(ids, logits.topk(top_k, sorted=is_sorted)[1])


@pytest.mark.parametrize("name", RULES)
def test_nan_and_infinite_logits_are_torchs(name) -> None:
    rule = RULES[name]
    payload = torch.tensor(0x7FC00001, dtype=torch.int32).view(torch.float32)  # a NaN as well
    specials = (torch.nan, payload, torch.inf, -torch.inf)
    for special, at in product(specials, ([5], [0, 5, 11], range(12))):
        weight = torch.arange(12.0)[:, None]
        weight[list(at)] = special
        logits, weights, ids = route(torch.ones(1, 1), weight, rule)
        assert torch.equal(logits.isnan(), weight.t().isnan())
        wanted, wanted_ids = choose(logits, rule, None)
        assert torch.equal(ids, wanted_ids)
        assert close(weights, wanted)


def test_probabilities_below_the_normal_numbers_still_differ() -> None:
    logits = torch.tensor([-200.0, -103.0, 0.0, -95.0, -86.0, -90.0, -88.0])
    _, weights, ids = route(torch.ones(1, 1), logits[:, None], Rule("softmax", 6))
    assert ids.tolist() == [[2, 4, 6, 5, 3, 1]]
    wanted = logits.double().softmax(-1)[ids]
    # gradual underflow: steps of 2^-149, and the square doubles an error of 2 ulp
    assert ((weights - wanted).abs() <= 2.0**-20 * wanted + 2.0**-149).all()


@pytest.mark.parametrize(("dtype", "isa"), CASES)
def test_bits_do_not_depend_on_threads_or_neighbours(dtype, isa) -> None:
    rule = RULES["deepseek-v3"]._replace(top_k=8, groups=(8, 4, 2))
    x, weight = torch.randn(37, 1100).to(dtype), torch.randn(256, 1100).to(dtype)
    correction = torch.randn(256)
    whole = forced(x, weight, rule, isa, None, correction)
    alone = forced(x, weight, rule, isa, None, correction, threads=1)
    assert all(map(torch.equal, whole, alone))
    for first, last in [(0, 1), (1, 3), (4, 12), (30, 37)]:
        some = forced(x[first:last].clone(), weight, rule, isa, None, correction)
        assert all(torch.equal(a[first:last], b) for a, b in zip(whole, some, strict=True))


@pytest.mark.parametrize(
    ("x", "weight", "rule", "bias"),
    [
        (torch.zeros(2, 4), torch.zeros(8, 5), SOFTMAX, None),
        (torch.zeros(2, 4), torch.zeros(8, 4).bfloat16(), SOFTMAX, None),
        (torch.zeros(2, 4).double(), torch.zeros(8, 4).double(), SOFTMAX, None),
        (torch.zeros(2, 4), torch.zeros(4, 8).t(), SOFTMAX, None),
        (torch.zeros(2, 4, device="meta"), torch.zeros(8, 4), SOFTMAX, None),
        (torch.zeros(0, 4), torch.zeros(8, 4), SOFTMAX, None),
        (torch.zeros(2, 4), torch.zeros(8, 4), SOFTMAX, torch.zeros(7)),
        (torch.zeros(2, 4), torch.zeros(2, 4), SOFTMAX, None),
        (torch.zeros(2, 4), torch.zeros(9, 4), RULES["deepseek-v3"], None),
    ],
)
def test_what_does_not_fit_is_named(x, weight, rule, bias) -> None:
    with pytest.raises(ValueError, match=r"route: expected contiguous x .* got x \["):
        route(x, weight, rule, bias=bias)


@pytest.mark.parametrize(
    "changes",
    [
        {"top_k": 0},
        {"top_k": 13},
        {"groups": (5, 1, 1)},
        {"groups": (4, 5, 1)},
        {"groups": (4, 0, 1)},
        {"groups": (4, 4, 0)},
        {"groups": (12, 12, 2)},
        {"groups": (6, 1, 1)},
        {"groups": (0, 0, 1)},
    ],
)
def test_rules_that_do_not_fit_twelve_experts(changes) -> None:
    assert SOFTMAX.fits(12)
    rule = SOFTMAX._replace(**changes)
    assert not rule.fits(12)
    assert not _core.RouterRule(*rule).fits(12)
    with pytest.raises(ValueError, match="does not fit 12 experts"):
        forced(torch.zeros(1, 4), torch.zeros(12, 4), rule, "plain")
