"""Llama 4, whose MoE block has an interface of its own: taught, paged, verified, untaught."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from tiny_models import _COMMON, NUM_EXPERTS, prompt_ids
from torch import Tensor
from transformers import AutoConfig, AutoModelForCausalLM, AutoModelForImageTextToText
from transformers.models.llama4.modeling_llama4 import Llama4TextExperts, Llama4TextMoe

import moe_offload
from moe_offload.errors import BudgetError, StateError, UnsupportedModelError
from moe_offload.huggingface.llama4 import set_implementation, teach, unteach

_TEXT: dict[str, Any] = {
    **_COMMON,
    "num_local_experts": NUM_EXPERTS,
    "interleave_moe_layer_step": 1,
    "intermediate_size_mlp": 48,
}


def tiny_llama4(
    top_k: int = 1, dtype: torch.dtype = torch.bfloat16, interleave: int = 1, images: bool = False
) -> Any:
    text = {
        **_TEXT,
        "num_experts_per_tok": top_k,
        "interleave_moe_layer_step": interleave,
    }
    if images:
        vision = {"hidden_size": 32, "num_hidden_layers": 1, "num_attention_heads": 2}
        vision |= {"intermediate_size": 32, "image_size": 28, "patch_size": 14}
        vision |= {"vision_output_dim": 32, "projector_input_dim": 32, "projector_output_dim": 32}
        config = AutoConfig.for_model("llama4", text_config=text, vision_config=vision)
    else:
        config = AutoConfig.for_model("llama4_text", **text)
    auto = AutoModelForImageTextToText if images else AutoModelForCausalLM
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        model = auto.from_config(config, dtype=dtype).eval()
        with torch.no_grad():
            for parameter in model.parameters():
                if parameter.dim() >= 2:
                    parameter.copy_(torch.randn(parameter.shape) * 0.15)
    model.generation_config.eos_token_id = None
    return model


def logits(model: Any) -> Tensor:
    with torch.no_grad():
        return model(input_ids=prompt_ids(batch=2)).logits


def resident_logits(model: Any, implementation: str = "moe_offload") -> Tensor:
    teach(model)
    set_implementation(model, implementation)
    try:
        return logits(model)
    finally:
        unteach(model)


def moe_classes(model: Any) -> list[type]:
    names = ("Llama4TextMoe", "Llama4TextExperts")
    return [type(module) for module in model.modules() if type(module).__name__ in names]


@pytest.mark.parametrize("top_k", [1, 2])
def test_taught_it_computes_what_transformers_computes(top_k: int) -> None:
    model = tiny_llama4(top_k, torch.float32)
    expected = logits(model)
    for implementation in ("moe_offload", "grouped_mm"):
        got = resident_logits(model, implementation)
        torch.testing.assert_close(got, expected, rtol=1e-4, atol=1e-5)
    assert set(moe_classes(model)) == {Llama4TextMoe, Llama4TextExperts}


@pytest.mark.parametrize("top_k", [1, 2])
@pytest.mark.parametrize("backend", ["native", "grouped_mm"])
def test_live_model_equals_resident(top_k: int, backend: str) -> None:
    model = tiny_llama4(top_k)
    implementation = "moe_offload" if backend == "native" else backend
    expected, theirs = resident_logits(model, implementation), logits(model)
    with moe_offload.offload(model, "25%", expert_backend=backend) as offloader:
        assert torch.equal(logits(model), expected)
        stats = offloader.stats()
        assert stats["lookups"] > 0
        assert stats["expert_backend"] == backend
    assert set(moe_classes(model)) == {Llama4TextMoe, Llama4TextExperts}
    assert torch.equal(logits(model), theirs)


@pytest.mark.parametrize(("interleave", "images"), [(1, False), (2, False), (1, True)])
def test_checkpoint_equals_resident(interleave: int, images: bool, tmp_path: Path) -> None:
    model = tiny_llama4(interleave=interleave, images=images)
    expected = resident_logits(model)
    model.save_pretrained(tmp_path)
    loaded = moe_offload.from_pretrained(tmp_path, device_budget="25%")
    assert type(loaded) is type(model)
    assert torch.equal(logits(loaded), expected)
    stats = moe_offload.get_offloader(loaded).stats()
    assert len(stats["per_layer"]) == 2 // interleave
    assert stats["io_mode"] in ("direct", "buffered", "mixed")
    report = moe_offload.verify(loaded, [prompt_ids()[0]], max_new_tokens=4)
    report.raise_if_different()


def test_live_verify_and_generate() -> None:
    model = tiny_llama4()
    with moe_offload.offload(model, "25%"):
        moe_offload.verify(model, [prompt_ids()[0]], max_new_tokens=4).raise_if_different()
        assert model.generate(prompt_ids(), max_new_tokens=4).shape[1] == 16


def test_plan_and_a_refused_budget_leave_the_model_as_it_is(tmp_path: Path) -> None:
    model = tiny_llama4()
    plan = moe_offload.plan(model, "50%")
    assert plan.num_pages == 2 * NUM_EXPERTS
    assert plan.experts_per_token == 1
    with pytest.raises(BudgetError):
        moe_offload.offload(model, 1)
    assert set(moe_classes(model)) == {Llama4TextMoe, Llama4TextExperts}
    model.save_pretrained(tmp_path)
    assert moe_offload.plan(tmp_path, "50%").num_pages == 2 * NUM_EXPERTS


def test_a_refused_model_is_left_as_it_is_and_an_offloaded_one_works_on() -> None:
    model = tiny_llama4()
    experts = model.model.layers[1].feed_forward.experts
    experts.forward = experts.forward  # as a hook leaves it
    with pytest.raises(UnsupportedModelError, match="replaced forward"):
        moe_offload.offload(model)
    assert set(moe_classes(model)) == {Llama4TextMoe, Llama4TextExperts}
    del experts.forward
    with moe_offload.offload(model, "25%"):
        expected = logits(model)
        with pytest.raises(StateError, match="offloaded already"):
            moe_offload.offload(model)
        assert torch.equal(logits(model), expected)


def test_traces_and_predictors_see_its_router() -> None:
    model = tiny_llama4()
    with moe_offload.offload(model, "25%", predictor="previous") as offloader:
        with moe_offload.record(model) as trace:
            model.generate(prompt_ids(), max_new_tokens=4)
        assert offloader.stats()["predictor"]["name"] == "previous"
    assert list(trace.num_experts) == [NUM_EXPERTS, NUM_EXPERTS]
