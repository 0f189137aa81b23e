"""The drop-in leaves a normal model while it is there, and no trace once it is restored."""

from __future__ import annotations

import copy
import gc
import io
import pickle
import threading
import weakref
from pathlib import Path

import pytest
import torch
from tiny_models import CONTEXT, NUM_EXPERTS, experts_modules, prompt_ids, tiny_model
from torch import nn

import moe_offload
from moe_offload.errors import BudgetError, StateError


def everything_about(model: nn.Module) -> dict[str, object]:
    """All that offloading may touch, by identity where identity is promised."""
    modules = dict(model.named_modules())
    return {
        "parameters": {name: id(p) for name, p in model.named_parameters()},
        "values": {name: p.data_ptr() for name, p in model.named_parameters()},
        "order": list(model.state_dict()),
        "classes": {name: type(module) for name, module in modules.items()},
        "attributes": {name: sorted(vars(module)) for name, module in modules.items()},
        "hooks": [len(module._forward_pre_hooks) for module in modules.values()],
        "repr": repr(model),
        "requires_grad": [p.requires_grad for p in model.parameters()],
    }


@pytest.mark.parametrize("name", ["qwen3_moe", "gpt_oss"])
def test_restore_puts_everything_back(name: str) -> None:
    model = tiny_model(name)
    before = everything_about(model)
    offloader = moe_offload.offload(model, device_budget="25%")
    model(prompt_ids())
    assert everything_about(model) != before
    offloader.restore()
    assert everything_about(model) == before
    offloader = moe_offload.offload(model, device_budget="50%")  # and again
    offloader.restore()
    assert everything_about(model) == before


def test_failed_offload_changes_nothing() -> None:
    model = tiny_model("olmoe")
    before = everything_about(model)
    with pytest.raises(BudgetError, match=r"at least"):
        moe_offload.offload(model, device_budget=1000)
    with pytest.raises(TypeError, match=r"unknown option 'io_thread'"):
        moe_offload.offload(model, io_thread=2)
    assert everything_about(model) == before


def test_offloaded_model_looks_normal() -> None:
    model = tiny_model("qwen3_moe")
    text, dense = repr(model), sum("experts." not in name for name in model.state_dict())
    moe_offload.offload(model)
    _name, experts = experts_modules(model)[0]
    assert repr(model) == text
    assert type(experts).__name__ == "Qwen3MoeExperts"
    assert type(experts).__module__ == "transformers.models.qwen3_moe.modeling_qwen3_moe"
    assert isinstance(
        experts, moe_offload.huggingface.attach.experts_module.__globals__["nn"].Module
    )
    assert experts.gate_up_proj.device.type == "meta"
    assert experts.gate_up_proj.shape[0] == NUM_EXPERTS
    assert len(model.state_dict()) == dense
    assert model.to("cpu") is model
    assert model.to(torch.float32) is model
    assert model.eval() is model


def test_state_dict_still_loads_into_the_dense_part() -> None:
    model, donor = tiny_model("qwen3_moe"), tiny_model("qwen3_moe", seed=1)
    moe_offload.offload(model)
    dense = {name: t for name, t in donor.state_dict().items() if ".experts." not in name}
    assert model.load_state_dict(dense).missing_keys == []
    assert torch.equal(model.lm_head.weight, donor.lm_head.weight)


@pytest.mark.parametrize("name", ["mixtral", "gpt_oss"])
def test_arguments_by_position_and_by_the_family_s_own_names(name: str) -> None:
    model = tiny_model(name)
    experts = experts_modules(model)[0][1]
    names = {
        "mixtral": ("top_k_index", "top_k_weights"),
        "gpt_oss": ("router_indices", "routing_weights"),
    }[name]
    generator = torch.Generator().manual_seed(0)
    hidden = torch.randn(5, 32, generator=generator)
    ids = torch.randint(0, NUM_EXPERTS, (5, 2), generator=generator)
    weights = torch.rand(5, 2, generator=generator)
    expected = experts(hidden, ids, weights)
    moe_offload.offload(model)
    with torch.no_grad():
        assert torch.allclose(experts(hidden, ids, weights), expected, atol=1e-6)
        by_name = {names[0]: ids, names[1]: weights}
        assert torch.allclose(experts(hidden, **by_name), expected, atol=1e-6)
        with pytest.raises(TypeError, match=f"expected the arguments hidden_states, {names[0]}"):
            experts(hidden, ids)
        with pytest.raises(TypeError, match=r"expected the arguments"):
            experts(hidden, ids, **by_name)


def test_get_offloader_finds_it_and_says_when_there_is_none() -> None:
    model = tiny_model("olmoe")
    with pytest.raises(StateError, match=r"not offloaded"):
        moe_offload.get_offloader(model)
    offloader = moe_offload.offload(model)
    assert moe_offload.get_offloader(model) is offloader
    offloader.restore()
    with pytest.raises(StateError, match=r"not offloaded"):
        moe_offload.get_offloader(model)
    with pytest.raises(StateError, match=r"not offloaded"):
        moe_offload.get_offloader("a path")


def test_double_offload_is_refused() -> None:
    model = tiny_model("olmoe")
    offloader = moe_offload.offload(model)
    with pytest.raises(StateError, match=r"offloaded already.*resize"):
        moe_offload.offload(model)
    offloader.restore()


def test_use_after_restore_and_close_is_refused() -> None:
    model = tiny_model("olmoe")
    offloader = moe_offload.offload(model)
    offloader.restore()
    for call in (offloader.restore, offloader.stats, lambda: offloader.resize("50%")):
        with pytest.raises(StateError, match=r"restored or closed"):
            call()
    model(prompt_ids())
    offloader = moe_offload.offload(model)
    offloader.close()
    with pytest.raises(StateError, match=r"after close"):
        model(prompt_ids())
    offloader.restore()
    model(prompt_ids())
    with pytest.raises(StateError, match=r"restored or closed"):
        offloader.restore()


def test_leaving_a_with_block_restores_the_model() -> None:
    model = tiny_model("olmoe")
    expected = model(prompt_ids()).logits
    with moe_offload.offload(model) as offloader:
        assert torch.equal(model(prompt_ids()).logits, expected)
    assert offloader.closed
    assert torch.equal(model(prompt_ids()).logits, expected)


def test_save_pretrained_is_refused_until_restored(tmp_path: Path) -> None:
    model = tiny_model("olmoe")
    offloader = moe_offload.offload(model)
    for part in (model, model.model):
        with pytest.raises(StateError, match=r"without its experts.*restore"):
            part.save_pretrained(tmp_path / "x")
    with pytest.raises(StateError, match=r"without its experts"):
        model.push_to_hub("nobody/nothing")
    assert not (tmp_path / "x").exists()
    offloader.restore()
    model.save_pretrained(tmp_path / "x")
    assert (tmp_path / "x" / "model.safetensors").is_file()


def test_copies_and_pickles_are_refused() -> None:
    model = tiny_model("olmoe")
    offloader = moe_offload.offload(model)
    experts = experts_modules(model)[0][1]
    for copier in (copy.deepcopy, pickle.dumps, lambda m: torch.save(m, io.BytesIO())):
        for thing in (model, model.model, experts):
            with pytest.raises(StateError, match=r"cannot be copied or pickled.*restore"):
                copier(thing)
    offloader.restore()
    assert torch.equal(copy.deepcopy(model)(prompt_ids()).logits, model(prompt_ids()).logits)


@pytest.mark.parametrize("change", ["half", "bfloat16", "double"])
def test_dtype_changes_are_refused_before_anything_changed(change: str) -> None:
    model = tiny_model("olmoe")
    offloader = moe_offload.offload(model)
    wrapped = nn.Sequential(model)
    for owner in (model, wrapped):
        with pytest.raises(StateError, match=r"dtype.*torch.float32.*restore"):
            getattr(owner, change)()
    assert all(p.dtype == torch.float32 for p in model.parameters())
    offloader.restore()
    assert all(p.dtype != torch.float32 for p in getattr(model, change)().parameters())


def test_training_mode_is_refused_at_offload_and_at_forward() -> None:
    model = tiny_model("olmoe").train()
    with pytest.raises(StateError, match=r"training mode.*model.eval"):
        moe_offload.offload(model)
    moe_offload.offload(model.eval())
    model.train()
    with pytest.raises(StateError, match=r"model.eval"):
        model(prompt_ids())
    model.eval()
    model(prompt_ids())


def test_gradients_are_refused_at_offload_and_at_backward() -> None:
    model = tiny_model("olmoe", implementation="grouped_mm")
    model(prompt_ids()).logits.sum().backward()
    with pytest.raises(StateError, match=r"holds a gradient"):
        moe_offload.offload(model)
    model.zero_grad(set_to_none=True)
    moe_offload.offload(model)
    logits = model(prompt_ids()).logits  # without no_grad the forward works
    with pytest.raises(StateError, match=r"no_grad"):
        logits.sum().backward()


@pytest.mark.parametrize("how", ["prompt", "generate", "cached", "embeds"])
def test_prompt_longer_than_the_context_is_refused(how: str) -> None:
    model = tiny_model("olmoe")
    offloader = moe_offload.offload(model)
    fits, long = prompt_ids(CONTEXT), prompt_ids(CONTEXT + 1)
    model(fits)
    past = model(fits[:, :100], use_cache=True).past_key_values
    call = {
        "prompt": lambda: model(long),
        "generate": lambda: model.generate(long, max_new_tokens=1),
        "cached": lambda: model(long[:, :29], past_key_values=past),
        "embeds": lambda: model(inputs_embeds=model.get_input_embeddings()(long)),
    }[how]
    with pytest.raises(ValueError, match=f"129 tokens exceeds the model's context of {CONTEXT}"):
        call()
    assert torch.isfinite(model(fits).logits).all()
    offloader.restore()
    model(long)  # plain transformers again, with its own idea of long prompts


def test_padding_beyond_the_context_is_not_a_long_prompt() -> None:
    model = tiny_model("olmoe")
    ids = torch.cat([torch.zeros(1, 10, dtype=torch.long), prompt_ids(CONTEXT)], dim=1)
    mask = (torch.arange(ids.shape[1]) >= 10).long()[None]
    positions = (mask.cumsum(-1) - 1).clamp(min=0)
    inputs = {"input_ids": ids, "attention_mask": mask, "position_ids": positions}
    expected = model(**inputs).logits
    moe_offload.offload(model)
    assert torch.equal(model(**inputs).logits, expected)


def test_a_dead_model_leaves_no_threads_and_no_memory() -> None:
    def threads() -> int:
        return len(list(Path("/proc/self/task").iterdir()))

    gc.collect()  # offloaded models of earlier tests
    before = threads()
    model = tiny_model("olmoe")
    offloader = moe_offload.offload(model, io_threads=4)
    model(prompt_ids())
    assert threads() >= before + 4
    alive = weakref.ref(model), weakref.ref(experts_modules(model)[0][1])
    del model
    gc.collect()
    assert alive[0]() is None
    assert offloader.closed
    assert threads() == before
    with pytest.raises(StateError):
        offloader.restore()
    del offloader
    gc.collect()
    assert alive[1]() is None


def test_restored_model_is_not_kept_by_its_offloader() -> None:
    model = tiny_model("olmoe")
    moe_offload.offload(model).restore()
    alive = weakref.ref(model)
    del model
    gc.collect()
    assert alive() is None


def test_two_models_are_independent() -> None:
    prompt, models = prompt_ids(), [tiny_model("olmoe", seed=seed) for seed in (0, 1)]
    expected = [model(prompt).logits for model in models]
    offloaders = [moe_offload.offload(model) for model in models]
    for model, logits in zip(models, expected, strict=True):
        assert torch.equal(model(prompt).logits, logits)
    offloaders[0].restore()
    assert torch.equal(models[1](prompt).logits, expected[1])


def test_nan_weights_stay_with_the_tokens_that_route_to_them() -> None:
    """Expert 3 of layer 0 is all NaN. Rows without it must be exact, before and after its page
    has been through every slot, and so must calls that never touch it."""
    model = tiny_model("mixtral")
    experts = experts_modules(model)[0][1]
    with torch.no_grad():
        experts.gate_up_proj[3] = float("nan")
        experts.down_proj[3] = float("nan")
    prompts = torch.arange(3, 43)[:, None]  # forty one-token prompts
    with torch.no_grad():
        expected = model(prompts).logits[:, -1]
        poisoned = expected.isnan().any(dim=-1)
        assert 3 < poisoned.sum() < 30, "the test needs tokens of both kinds"
        offloader = moe_offload.offload(model, device_budget=1 << 30)
        offloader.resize(offloader.smallest_budget_bytes)
        together = model(prompts).logits[:, -1]
        assert torch.equal(together[~poisoned], expected[~poisoned])
        assert together[poisoned].isnan().any(dim=-1).all()
        order = torch.randperm(40, generator=torch.Generator().manual_seed(0)).tolist()
        for index in order:
            logits = model(prompts[index : index + 1]).logits[:, -1]
            assert logits.isnan().any() == poisoned[index]
            if not poisoned[index]:
                assert torch.allclose(logits, expected[index : index + 1], atol=1e-5)
        assert offloader.stats()["evictions"] > 40


def test_several_threads_get_exact_results() -> None:
    model = tiny_model("qwen3_moe")
    prompts = [prompt_ids(8, seed=seed) for seed in range(6)]
    expected = [model.generate(p, max_new_tokens=6, do_sample=False) for p in prompts]
    offloader = moe_offload.offload(model, device_budget="25%")
    for budget in ("25%", offloader.smallest_budget_bytes):
        offloader.resize(budget)
        results: dict[int, object] = {}

        def work(index: int, results: dict[int, object] = results) -> None:
            try:
                results[index] = model.generate(prompts[index], max_new_tokens=6, do_sample=False)
            except BaseException as error:
                results[index] = error

        threads = [threading.Thread(target=work, args=(i,)) for i in range(len(prompts))]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join(timeout=120)
        for index, tokens in enumerate(expected):
            assert isinstance(results[index], torch.Tensor), results[index]
            assert torch.equal(results[index], tokens)
