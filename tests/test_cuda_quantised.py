"""Quantised pages behind the CUDA backend, without a GPU: layouts as checkpoints' pages have them,
kernels in emulation, and whole checkpoints through the fake driver."""

from __future__ import annotations

import types
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch
from experts import random_routing
from torch import Tensor

from moe_offload import quantization, reference
from moe_offload.activations import Activation, ExpertForm
from moe_offload.backends.cuda import Cuda
from moe_offload.cuda_pages import SlabPages
from moe_offload.pages import PageLayout, find_slab, pack_experts

EXPERTS, HIDDEN, INNER = 4, 128, 128
SILU = ExpertForm(torch.nn.functional.silu, has_gate=True, has_bias=False)


def quantised(form: str, bias: bool = False) -> tuple[dict[str, Tensor], dict[str, Tensor]]:
    """A layer's sections, and the numbers they mean, in float64."""
    generator = torch.Generator().manual_seed(3)
    sections, exact = {}, {}
    for name, rows, columns in (
        ("gate_up_proj", 2 * INNER, HIDDEN),
        ("down_proj", HIDDEN, INNER),
    ):
        weight = torch.randn(EXPERTS, rows, columns, generator=generator) / columns**0.5
        group = 32 if form == "int4_group" else 0
        codes, scales = quantization.lossy_quantise(form, weight, torch.bfloat16, group)
        assert scales is not None
        sections |= {name: codes.contiguous(), name + quantization.SCALES: scales.contiguous()}
        exact[name] = quantization.dequantise(form, codes, scales, torch.float64)
        if bias:
            key = f"{name}_bias"
            sections[key] = torch.randn(EXPERTS, rows, generator=generator).bfloat16()
            exact[key] = sections[key].double()
    return sections, exact


def layout_of(sections: dict[str, Tensor]) -> PageLayout:
    return PageLayout.build({n: (tuple(t.shape[1:]), t.dtype) for n, t in sections.items()})


def computed(module: Any, sections: dict[str, Tensor], *arguments: Tensor) -> Tensor:
    """One expert at a time, as they would arrive."""
    layout = layout_of(sections)
    assert Cuda().supports(module, layout) is None
    run = Cuda().bind(module, layout, EXPERTS).start(*arguments)
    slab, stride, _ = find_slab(pack_experts(sections)) or pytest.fail("packed pages are a slab")
    for ready in enumerate(run.experts):
        run.compute_pages(SlabPages(slab, stride), [ready])
    return run.finish()


def inputs(tokens: int) -> tuple[Tensor, Tensor, Tensor]:
    generator = torch.Generator().manual_seed(tokens)
    ids, weights = random_routing(tokens, EXPERTS, 2, generator)
    return torch.randn(tokens, HIDDEN, generator=generator).bfloat16(), ids, weights


@pytest.mark.parametrize("tokens", [5, 60])  # decode, prefill
@pytest.mark.parametrize("form", ["fp8_block", "mxfp4", "int4_group"])
def test_error_is_that_of_torch_on_what_the_page_says(
    kernels: types.ModuleType, form: str, tokens: int
) -> None:
    sections, exact = quantised(form)
    arguments = inputs(tokens)
    torch.use_deterministic_algorithms(True)  # fills torch.empty with NaN
    try:
        got = computed(SILU, sections, *arguments).double()
    finally:
        torch.use_deterministic_algorithms(False)
    weights = exact["gate_up_proj"], exact["down_proj"]
    silu = Activation("silu", True)
    want = reference.expert_ffn(arguments[0], *weights, *arguments[1:], silu)
    own = reference.expert_ffn(
        *(arguments[0], *weights, *arguments[1:], silu), dtype=torch.bfloat16
    ).double()
    assert (got - want).norm() <= 1.2 * (own - want).norm()


@pytest.mark.parametrize("tokens", [5, 60])
def test_mxfp4_as_gpt_oss_has_it(kernels: types.ModuleType, tokens: int) -> None:
    """Its module says "transposed" of bf16 parameters; blocks are rows all the same."""
    act = Activation("clamped_swiglu", True, 1.702, 1.5, 1.0)
    module = types.SimpleNamespace(has_gate=True, has_bias=True, is_transposed=True)
    module.is_concatenated = False
    module._apply_gate = lambda both: act(both[..., ::2], both[..., 1::2])
    sections, exact = quantised("mxfp4", bias=True)
    arguments = inputs(tokens)
    got = computed(module, sections, *arguments).double()
    first, bias = (
        torch.cat([part[:, ::2], part[:, 1::2]], 1)
        for part in (exact["gate_up_proj"], exact["gate_up_proj_bias"])
    )
    all_of_it = (arguments[0], first, exact["down_proj"], *arguments[1:], act, bias)
    want = reference.expert_ffn(*all_of_it, exact["down_proj_bias"])
    own = reference.expert_ffn(*all_of_it, exact["down_proj_bias"], dtype=torch.bfloat16).double()
    assert (got - want).norm() <= 1.2 * (own - want).norm()


def test_what_the_kernels_do_not_read_is_named() -> None:
    sections, _ = quantised("fp8_block")

    def reason(**changes: Tensor | None) -> str:
        changed = {**sections, **changes}
        layout = layout_of({name: t for name, t in changed.items() if t is not None})
        return str(Cuda().supports(SILU, layout))

    assert reason() == "None"
    scales = sections["down_proj_scales"]
    assert "must be torch.float32 [1, 1], got torch.bfloat16" in reason(
        down_proj_scales=scales.bfloat16()
    )
    assert "no section 'gate_up_proj_scales'" in reason(gate_up_proj_scales=None)
    narrow = {
        "gate_up_proj": torch.zeros(4, 192, 128).to(torch.float8_e4m3fn),
        "gate_up_proj_scales": torch.ones(4, 2, 1),
        "down_proj": torch.zeros(4, 128, 96).to(torch.float8_e4m3fn),
    }
    assert "gate and up do not share a block's scale, got 96" in reason(**narrow)
    assert "must be torch.float8_e4m3fn" in reason(gate_up_proj=torch.zeros(4, 256, 128).half())
    ints, _ = quantised("int4_group")
    for scales, text in (
        (torch.ones(4, 128, 4).half(), "must be torch.bfloat16 [128, 4], got torch.float16"),
        (torch.ones(4, 128, 8).bfloat16(), "a power of two from 32, got 16"),
    ):
        assert text in str(Cuda().supports(SILU, layout_of({**ints, "down_proj_scales": scales})))
    biased = ExpertForm(torch.nn.functional.silu, has_gate=True, has_bias=True)
    wide = {f"{name}_bias": torch.zeros(4, 256) for name in ("gate_up_proj", "down_proj")}
    found = Cuda().supports(biased, layout_of({**sections, **wide}))
    assert "several dtypes" in str(found)


@pytest.mark.parametrize("name", ["mxfp4", "fp8", "int4", "gptq"])
def test_a_checkpoint_is_paged_as_stored_with_the_same_bits_at_every_budget(
    gpu: Any, name: str, tmp_path: Path
) -> None:
    pytest.importorskip("transformers")
    import quantised_checkpoints
    from tiny_models import prompt_ids

    import moe_offload

    makers: dict[str, tuple[Any, str]] = {
        "mxfp4": (quantised_checkpoints.mxfp4, "mxfp4"),
        "fp8": (partial(quantised_checkpoints.fp8, moe_intermediate_size=128), "fp8_block"),
        "int4": (quantised_checkpoints.int4, "int4_group"),
        "gptq": (partial(quantised_checkpoints.gptq, scale_dtype=torch.bfloat16), "int4_group"),
    }
    (make, form), stored = makers[name], tmp_path / "as_stored"
    make(stored)
    twin = quantised_checkpoints.dequantise(stored, tmp_path / "twin")

    def logits(folder: Path, budget: str, form: str) -> list[Tensor]:
        model = moe_offload.from_pretrained(
            folder, device="cuda", device_budget=budget, expert_backend="cuda"
        )
        stats = moe_offload.get_offloader(model).stats()
        assert (stats["expert_backend"], stats["weight_format"]) == ("cuda", form)
        assert all(row["dequantised"] is None for row in stats["per_layer"])
        with torch.no_grad():
            found = [model(prompt_ids(length)).logits for length in (1, 110)]  # decode, prefill
        moe_offload.get_offloader(model).close()
        return found

    resident, paged = logits(stored, "100%", form), logits(stored, "35%", form)
    assert all(map(torch.equal, resident, paged))
    few, many = logits(twin, "100%", "plain")
    assert torch.equal(paged[1], many)  # prefill unpacks to the weights of the twin
    assert float((paged[0] - few).float().norm() / few.float().norm()) < 0.02
