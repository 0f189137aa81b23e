"""`generate` on an offloaded model: every decoding mode gives the resident model's tokens."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import pytest
import torch
from tiny_models import NUM_EXPERTS, experts_modules, prompt_ids, tiny_model
from torch import Tensor
from transformers import PreTrainedModel

import moe_offload

FAMILIES = ["qwen3_moe", "gpt_oss", "deepseek_v3"]


def padded_batch() -> dict[str, Tensor]:
    """Three prompts of 12, 7 and 3 tokens, padded on the left as decoder models need."""
    ids, lengths = prompt_ids(12, batch=3), torch.tensor([12, 7, 3])
    mask = (torch.arange(12)[None] >= 12 - lengths[:, None]).long()
    return {"input_ids": ids * mask, "attention_mask": mask}


def single() -> dict[str, Tensor]:
    return {"input_ids": prompt_ids(10)}


MODES: dict[str, tuple[Any, dict[str, Any]]] = {
    "greedy": (single, {}),
    "sampling": (single, {"do_sample": True, "temperature": 1.3, "top_k": 20}),
    "beams": (single, {"num_beams": 4, "num_return_sequences": 2}),
    "left_padded_batch": (padded_batch, {}),
    "padded_beams": (padded_batch, {"num_beams": 2}),
    "prompt_lookup": (single, {"prompt_lookup_num_tokens": 3}),
    "static_cache": (single, {"cache_implementation": "static", "disable_compile": True}),
    "no_cache": (single, {"use_cache": False}),
    "repetition_penalty": (single, {"repetition_penalty": 1.5}),
}


@pytest.fixture(params=FAMILIES, scope="module")
def models(request: pytest.FixtureRequest) -> Iterator[tuple[PreTrainedModel, PreTrainedModel]]:
    """The same model twice: resident, and offloaded with two slots per pool."""
    offloaded = tiny_model(request.param)
    offloader = moe_offload.offload(offloaded, device_budget="25%")
    offloader.resize(offloader.smallest_budget_bytes)
    yield tiny_model(request.param), offloaded
    offloader.close()


def run(model: PreTrainedModel, inputs: dict[str, Tensor], options: dict[str, Any]) -> Tensor:
    torch.manual_seed(7)
    return model.generate(**inputs, max_new_tokens=8, **{"do_sample": False, **options})


@pytest.mark.parametrize("mode", MODES)
def test_generate_equals_resident(
    mode: str, models: tuple[PreTrainedModel, PreTrainedModel]
) -> None:
    resident, offloaded = models
    make_inputs, options = MODES[mode]
    inputs = make_inputs()
    tokens = run(offloaded, inputs, options)
    assert tokens.shape[1] == inputs["input_ids"].shape[1] + 8
    assert torch.equal(tokens, run(resident, inputs, options))


def test_sampling_depends_on_the_seed(models: tuple[PreTrainedModel, PreTrainedModel]) -> None:
    """Guards the sampling case above: it would pass on a model that ignores the seed."""
    _, offloaded = models
    options = {"max_new_tokens": 8, "do_sample": True, "temperature": 1.3}
    torch.manual_seed(1)
    first = offloaded.generate(**single(), **options)
    torch.manual_seed(2)
    assert not torch.equal(first, offloaded.generate(**single(), **options))


@pytest.mark.parametrize("who", ["both", "target", "assistant"])
def test_assisted_generation_with_an_offloaded_pair(who: str) -> None:
    def pair() -> tuple[PreTrainedModel, PreTrainedModel]:
        target, assistant = tiny_model("qwen3_moe"), tiny_model("qwen3_moe")
        with torch.no_grad():  # close enough to be accepted often, not always
            noise = torch.Generator().manual_seed(3)
            for parameter in assistant.model.layers[1].parameters():
                parameter += torch.randn(parameter.shape, generator=noise) * 0.02
        return target, assistant

    target, assistant = pair()
    expected = run(target, single(), {"assistant_model": assistant})
    target, assistant = pair()
    if who in ("both", "target"):
        moe_offload.offload(target, device_budget="25%")
    if who in ("both", "assistant"):
        moe_offload.offload(assistant, device_budget="25%")
    assert torch.equal(run(target, single(), {"assistant_model": assistant}), expected)


def test_streaming_and_stopping_callbacks_work() -> None:
    from transformers.generation.streamers import BaseStreamer

    class Collector(BaseStreamer):
        def __init__(self) -> None:
            self.tokens: list[int] = []

        def put(self, value: Tensor) -> None:
            self.tokens += value.flatten().tolist()

        def end(self) -> None:
            self.tokens.append(-1)

    model, collector = tiny_model("olmoe"), Collector()
    moe_offload.offload(model)
    tokens = run(model, single(), {"streamer": collector})
    assert collector.tokens == [*tokens[0].tolist(), -1]


def test_scores_hidden_states_and_router_logits_are_the_model_s_own() -> None:
    resident, offloaded = tiny_model("qwen3_moe"), tiny_model("qwen3_moe")
    moe_offload.offload(offloaded, device_budget="25%")
    options = {"output_hidden_states": True, "output_router_logits": True}
    with torch.no_grad():
        expected, got = resident(prompt_ids(), **options), offloaded(prompt_ids(), **options)
    for name in ("hidden_states", "router_logits"):
        pairs = zip(expected[name], got[name], strict=True)
        assert all(torch.equal(a, b) for a, b in pairs), name


def test_pipeline_accepts_an_offloaded_model() -> None:
    from tokenizers import Tokenizer, models, pre_tokenizers
    from transformers import PreTrainedTokenizerFast, pipeline

    vocabulary = {f"w{i}": i for i in range(128)}
    raw = Tokenizer(models.WordLevel(vocabulary, unk_token="w0"))
    raw.pre_tokenizer = pre_tokenizers.Whitespace()
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=raw, pad_token="w0", eos_token="w2")

    def text(model: PreTrainedModel) -> str:
        pipe = pipeline("text-generation", model=model, tokenizer=tokenizer)
        return pipe("w5 w6 w7", max_new_tokens=5, do_sample=False)[0]["generated_text"]

    model = tiny_model("olmoe")
    expected = text(model)
    moe_offload.offload(model)
    assert text(model) == expected


def test_experts_implementation_of_the_config_is_left_alone() -> None:
    """An offloaded model computes as its backend does, whatever the config names."""
    model = tiny_model("qwen3_moe")
    expected = model(prompt_ids()).logits
    model.set_experts_implementation("eager")
    eager = model(prompt_ids()).logits
    offloader = moe_offload.offload(model)
    assert torch.equal(model(prompt_ids()).logits, expected)
    assert set(model.get_experts_implementation().values()) == {"eager"}
    offloader.restore()
    assert torch.equal(model(prompt_ids()).logits, eager)


def test_decode_moves_only_what_it_misses() -> None:
    model = tiny_model("qwen3_moe")
    offloader = moe_offload.offload(model, device_budget="100%")
    model.generate(**single(), max_new_tokens=8, do_sample=False)
    stats = offloader.stats()
    assert (stats["demand_misses"], stats["demand_bytes"], stats["evictions"]) == (0, 0, 0)
    page = sum(
        t[0].numel() * 4 for t in (experts_modules(tiny_model("qwen3_moe"))[0][1].parameters())
    )
    offloader.resize("25%")
    offloader.reset_stats()
    model.generate(**single(), max_new_tokens=8, do_sample=False)
    stats = offloader.stats()
    assert stats["demand_misses"] > NUM_EXPERTS
    assert stats["demand_bytes"] == stats["demand_misses"] * page
