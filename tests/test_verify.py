"""verify finds what differs, and leaves the model as it was when nothing does."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from tiny_models import experts_modules, plain_model, prompt_ids, tiny_model

import moe_offload
from moe_offload import verification
from moe_offload.errors import MoEOffloadError, StateError
from moe_offload.verification import verify

PROMPTS = [prompt_ids(6, seed=1), prompt_ids(9, seed=2)[0], [5, 6, 7, 8]]


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("qwen3_moe")
    tiny_model("qwen3_moe").save_pretrained(path)
    return path


def state(model: Any) -> dict[str, Any]:
    offloader = moe_offload.get_offloader(model)
    experts = [module for _, module in experts_modules(model)]
    return {
        "slots": [pool.num_slots for pool in offloader.pools],
        "classes": [type(module) for module in experts],
        "placeholders": [module.gate_up_proj.device.type for module in experts],
        "implementation": model.get_experts_implementation(),
        "parameters": [name for name, _ in model.named_parameters()],
    }


@pytest.mark.parametrize("budget", ["25%", "100%"])
@pytest.mark.parametrize("source", ["live", "checkpoint"])
def test_correct_model_verifies_and_stays_as_it_was(source: str, budget: str, folder: Path) -> None:
    if source == "live":
        model = tiny_model("qwen3_moe")
        moe_offload.offload(model, device_budget=budget)
    else:
        model = moe_offload.from_pretrained(folder, device_budget=budget)
    before = state(model)
    report = verify(model, PROMPTS, max_new_tokens=5)
    assert report.identical_tokens
    assert report.max_abs_logit_diff == 0.0
    report.raise_if_different()
    assert [(row.prompt, row.new_tokens) for row in report.rows] == [(i, 5) for i in (0, 1, 2)] * 2
    assert report.stats["evictions"] > 0
    assert state(model) == before
    offloader = moe_offload.get_offloader(model)
    offloader.reset_stats()
    with torch.no_grad():
        model(prompt_ids())
        model(prompt_ids())
    if budget == "100%":
        assert offloader.stats()["demand_misses"] == 0, "the full fill was not put back"
    assert offloader.stats()["hits"] > 0


def test_hostile_timing_ends_with_the_run(monkeypatch: pytest.MonkeyPatch) -> None:
    """Also when the present budget is the smallest, so that no pager is ever replaced."""
    model = tiny_model("olmoe")
    offloader = moe_offload.offload(model, device_budget="25%")
    offloader.resize(offloader.smallest_budget_bytes)
    calls: list[dict[str, Any]] = []
    real = offloader.chaos

    def chaos(seed: int = 0, **options: Any) -> None:
        calls.append(options)
        real(seed, **options)

    monkeypatch.setattr(offloader, "chaos", chaos)
    verify(model, PROMPTS[:1], max_new_tokens=1)
    assert all(call["evict_probability"] > 0 and call["reorder"] for call in calls[:-1])
    assert len(calls) == 3
    assert calls[-1] == {}


def test_table_has_one_line_per_prompt_and_setting() -> None:
    model = tiny_model("olmoe")
    moe_offload.offload(model)
    lines = str(verify(model, PROMPTS, max_new_tokens=3)).splitlines()
    assert lines[0] == "OlmoeForCausalLM, offloaded against itself on its resident parameters"
    assert lines[1].split() == [
        "setting",
        "prompt",
        "tokens",
        "identical",
        "max",
        "|logit",
        "diff|",
        "misses",
    ]
    assert len(lines) == 2 + 6 + 1
    assert sum(line.startswith("smallest budget") for line in lines) == 3
    assert lines[-1] == "tokens identical, max |logit difference| 0"


@pytest.mark.parametrize("what", ["dense", "expert"])
def test_a_different_reference_is_found(what: str, folder: Path) -> None:
    model = moe_offload.from_pretrained(folder)
    reference = plain_model(folder)
    reference.set_experts_implementation("eager")
    verify(model, PROMPTS, max_new_tokens=4, reference=reference).raise_if_different()
    assert set(reference.get_experts_implementation().values()) == {"eager"}
    with torch.no_grad():
        if what == "dense":
            reference.model.norm.weight[0] += 5.0
        else:
            experts_modules(reference)[1][1].down_proj.mul_(-1)
    report = verify(model, PROMPTS, max_new_tokens=4, reference=reference, hostile=False)
    assert report.max_abs_logit_diff > 1e-3
    assert len(report.rows) == len(PROMPTS)
    with pytest.raises(MoEOffloadError, match="differs from the resident one"):
        report.raise_if_different()
    if not report.identical_tokens:
        assert "no, from" in str(report)


def test_wrong_bytes_in_a_slot_are_found(folder: Path) -> None:
    """The fault verify exists for: a page that is not what the file says."""
    model = moe_offload.from_pretrained(folder, device_budget="100%")
    pool = moe_offload.get_offloader(model).pools[0]
    pool.views["down_proj"].mul_(1.5)
    report = verify(model, PROMPTS, max_new_tokens=4, hostile=False)
    assert report.max_abs_logit_diff > 0


def test_nan_on_one_side_is_an_infinite_difference() -> None:
    nan, one = torch.tensor([[float("nan"), 1.0]]), torch.tensor([[1.0, 1.0]])
    assert verification._max_diff(nan, one) == float("inf")
    assert verification._max_diff(nan, nan.clone()) == 0.0
    assert verification._max_diff(one, one + 0.5) == 0.5


def test_texts_need_a_tokenizer_and_models_an_offloader(folder: Path) -> None:
    class Tokenizer:
        def __call__(self, text: str, return_tensors: str) -> Any:
            ids = torch.tensor([[3 + ord(c) % 100 for c in text]])
            return type("Encoding", (), {"input_ids": ids})

    model = tiny_model("olmoe")
    with pytest.raises(StateError, match="not offloaded"):
        verify(model, PROMPTS)
    moe_offload.offload(model)
    with pytest.raises(ValueError, match="pass tokenizer"):
        verify(model, ["hello"])
    with pytest.raises(ValueError, match="at least one prompt"):
        verify(model, [])
    with pytest.raises(ValueError, match=r"rows of a batch one by one"):
        verify(model, [prompt_ids(4, batch=2)])
    report = verify(model, ["hello"], max_new_tokens=2, tokenizer=Tokenizer())
    assert report.identical_tokens


def test_reference_that_does_not_fit_is_refused_before_loading(
    folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    model = moe_offload.from_pretrained(folder)
    monkeypatch.setattr(verification, "available_memory_bytes", lambda: 100)
    with pytest.raises(StateError, match=r"only 100 B are available.*Pass reference="):
        verify(model, PROMPTS)


def test_a_failing_run_still_puts_budget_and_timing_back(monkeypatch: pytest.MonkeyPatch) -> None:
    model = tiny_model("olmoe")
    offloader = moe_offload.offload(model, device_budget="50%")
    before = state(model)
    answers = iter([verification._answer(model, prompt_ids(4), 1)])

    def answer(*_: Any) -> Any:
        try:
            return next(answers)
        except StopIteration:
            raise RuntimeError("interrupted") from None

    monkeypatch.setattr(verification, "_answer", answer)
    with pytest.raises(RuntimeError, match="interrupted"):
        verify(model, [prompt_ids(4)], max_new_tokens=1)
    assert state(model) == before
    assert offloader.device_budget_bytes == sum(
        pool.num_slots * pool.layout.slot_stride for pool in offloader.pools
    )
