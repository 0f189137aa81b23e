"""RMSNorm layers on the CPU kernels: against fp64, recognised by their source, put back."""

from __future__ import annotations

import copy
import inspect
import pickle

import pytest
import torch
from torch import Tensor, nn

from moe_offload import _core
from moe_offload.backends.native import DTYPES
from moe_offload.norms import rms_norm, use_native_norms

EPSILON = 1e-5


def exact(x: Tensor, weight: Tensor, offset: float = 0.0) -> Tensor:
    wide = x.double()
    scale = torch.rsqrt(wide.pow(2).mean(-1, keepdim=True) + EPSILON)
    return wide * scale * (weight.double() + offset)


def plain(x: Tensor, weight: Tensor, offset: float, rounds_before_weight: bool) -> Tensor:
    """The PyTorch twin, as transformers' models have it."""
    wide = x.float()
    scaled = wide * torch.rsqrt(wide.pow(2).mean(-1, keepdim=True) + EPSILON)
    if rounds_before_weight:
        return weight * scaled.to(x.dtype)
    return (scaled * (weight.float() + offset)).to(x.dtype)


def forced(x: Tensor, weight: Tensor, offset: float, before: bool, isa: str, threads: int = 2):
    y = torch.full_like(x, torch.nan)
    size = x.shape[-1]
    kernels = _core.DenseKernels(DTYPES[x.dtype], isa)
    kernels.rms_norm(
        *(x.data_ptr(), x.numel() // size, size, weight.data_ptr(), EPSILON, offset, before),
        *(y.data_ptr(), threads),
    )
    return y


CASES = [(dtype, isa) for dtype in DTYPES for isa in _core.cpu_isas(DTYPES[dtype])]


@pytest.mark.parametrize(("dtype", "isa"), CASES)
@pytest.mark.parametrize("size", [1, 7, 16, 100, 128, 2048 + 8])
@pytest.mark.parametrize(("before", "offset"), [(True, 0.0), (False, 0.0), (False, 1.0)])
def test_error_is_no_larger_than_torchs(dtype, isa, size, before, offset) -> None:
    x = (3 * torch.randn(37, size)).to(dtype)
    weight = torch.randn(size).to(dtype)
    got = forced(x, weight, offset, before, isa)
    twin = plain(x, weight, offset, before)
    reference = exact(x, weight, offset)
    error = (got.double() - reference).norm() / reference.norm()
    torchs = (twin.double() - reference).norm() / reference.norm()
    # float32: some eight roundings of each number here and there, in another order
    assert error <= max(1.2 * torchs, 8 * 2.0**-24 if dtype == torch.float32 else 0.0)
    assert not got.isnan().any()


@pytest.mark.parametrize(("dtype", "isa"), CASES)
def test_bits_do_not_depend_on_threads_or_neighbours(dtype, isa) -> None:
    x, weight = torch.randn(600, 1000).to(dtype), torch.randn(1000).to(dtype)
    whole = forced(x, weight, 0.0, True, isa, threads=2)
    assert torch.equal(whole, forced(x, weight, 0.0, True, isa, threads=1))
    for row in (0, 1, 599):
        assert torch.equal(whole[row], forced(x[row].clone(), weight, 0.0, True, isa))


def test_rows_of_zeros_infinities_and_nan_are_torchs() -> None:
    x = torch.randn(4, 40)
    x[0], x[1, 3], x[2, 39] = 0.0, torch.inf, torch.nan
    weight = torch.randn(40)
    torch.testing.assert_close(
        rms_norm(x, weight, EPSILON), plain(x, weight, 0.0, True), equal_nan=True
    )


@pytest.mark.parametrize(
    ("x", "weight"),
    [
        (torch.zeros(2, 4), torch.zeros(5)),
        (torch.zeros(2, 4), torch.zeros(4).bfloat16()),
        (torch.zeros(2, 4).double(), torch.zeros(4).double()),
        (torch.zeros(2, 4), torch.zeros(8)[::2]),
        (torch.zeros(2, 4, device="meta"), torch.zeros(4)),
        (torch.zeros(2, 0), torch.zeros(0)),
    ],
)
def test_what_does_not_fit_is_named(x, weight) -> None:
    with pytest.raises(ValueError, match=r"rms_norm: expected x \[\.\.\., N\].* got x \["):
        rms_norm(x, weight, EPSILON)


def norms_of_transformers() -> list[tuple[type, bool, float]]:
    pytest.importorskip("transformers")
    from transformers.models.gpt_oss.modeling_gpt_oss import GptOssRMSNorm
    from transformers.models.olmoe.modeling_olmoe import OlmoeRMSNorm
    from transformers.models.qwen3_moe.modeling_qwen3_moe import Qwen3MoeRMSNorm
    from transformers.models.qwen3_next.modeling_qwen3_next import Qwen3NextRMSNorm

    return [
        (OlmoeRMSNorm, True, 0.0),
        (Qwen3MoeRMSNorm, True, 0.0),
        (GptOssRMSNorm, False, 0.0),
        (Qwen3NextRMSNorm, False, 1.0),
    ]


def test_transformers_norms_are_recognised_and_put_back() -> None:
    for norm, before, offset in norms_of_transformers():
        model = nn.Sequential(norm(48, eps=EPSILON), nn.LayerNorm(48)).bfloat16()
        model[0].weight.data.normal_()
        x = torch.randn(2, 3, 48).bfloat16()
        text, own = repr(model), model[0](x)
        undo = use_native_norms(model)
        assert isinstance(model[0], norm)
        assert type(model[0]) is not norm
        assert type(model[1]) is nn.LayerNorm
        assert repr(model) == text
        with torch.no_grad():
            got = model[0](x)
            (name,) = list(inspect.signature(norm.forward).parameters)[1:]
            assert torch.equal(model[0](**{name: x}), got)
        expected = rms_norm(
            *(x, model[0].weight.detach(), EPSILON),
            weight_offset=offset,
            rounds_before_weight=before,
        )
        assert torch.equal(got, expected)
        torch.testing.assert_close(got, own)
        assert torch.equal(copy.deepcopy(model)[0](x.detach()), own)  # with gradients: its own
        again = pickle.loads(pickle.dumps(model))
        assert type(again[0]) is type(model[0])
        with torch.no_grad():
            assert torch.equal(again[0](x), got)
        undo()
        assert type(model[0]) is norm


def test_each_form_is_computed_as_its_class_does() -> None:
    """float64 tells the forms apart: each must be nearest to its own class."""
    for norm, before, offset in norms_of_transformers():
        module = norm(512, eps=EPSILON).bfloat16()
        module.weight.data.normal_()
        x = torch.randn(64, 512).bfloat16()
        with torch.no_grad():
            own = module(x)
        for form in [(True, 0.0), (False, 0.0), (False, 1.0)]:
            got = rms_norm(
                *(x, module.weight.detach(), EPSILON),
                rounds_before_weight=form[0],
                weight_offset=form[1],
            )
            share = (got != own).float().mean().item()
            assert (share < 0.01) == (form == (before, offset)), (norm, form, share)


def test_what_only_looks_like_a_norm_is_left_alone() -> None:
    class OtherRMSNorm(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.weight, self.variance_epsilon = nn.Parameter(torch.ones(8)), EPSILON

        def forward(self, hidden_states):
            input_dtype = hidden_states.dtype
            hidden_states = hidden_states.to(torch.float32)
            variance = hidden_states.pow(2).mean(-1, keepdim=True)
            hidden_states = hidden_states * torch.rsqrt(variance + self.variance_epsilon)
            return 2 * self.weight * hidden_states.to(input_dtype)

    module = OtherRMSNorm()
    use_native_norms(module)
    assert type(module) is OtherRMSNorm


def test_gradients_strides_and_other_dtypes_go_to_the_class_itself() -> None:
    norm = norms_of_transformers()[0][0]
    module, same = norm(16, eps=EPSILON), norm(16, eps=EPSILON)
    use_native_norms(module)
    x = torch.randn(3, 16, requires_grad=True)
    module(x).sum().backward()
    assert x.grad is not None
    with torch.no_grad():
        wide = torch.randn(3, 16, dtype=torch.float64)
        assert torch.equal(module(wide), same(wide))
        apart = torch.randn(16, 3).t()
        torch.testing.assert_close(module(apart), same(apart))
        assert module(torch.zeros(0, 16)).shape == (0, 16)
