"""Observation: every family, offloaded and resident, the same events; nothing left behind."""

import pytest
import torch
from tiny_models import FAMILIES, TOP_K, prompt_ids, tiny_model

import moe_offload
from moe_offload.errors import UnsupportedModelError
from moe_offload.huggingface.observe import Observer, observe, routed_layers
from moe_offload.layer import OffloadedExperts, OffloadedMoE


class Log(Observer):
    """Writes down every event."""

    def __init__(self):
        self.events, self.calls, self.routed = [], [], []

    def call_begins(self, call):
        self.events.append("begin")
        self.calls.append(call)

    def layer_begins(self, layer, hidden):
        self.events.append(("layer", layer, tuple(hidden.shape)))

    def block_begins(self, layer, hidden):
        self.events.append(("block", layer, tuple(hidden.shape)))

    def layer_routed(self, layer, topk_ids, topk_weights):
        self.events.append(("routed", layer, tuple(topk_ids.shape)))
        self.routed.append((topk_ids.clone(), topk_weights.clone()))

    def call_ends(self, call):
        assert call is self.calls[-1]
        self.events.append("end")


def count_hooks(model):
    return sum(len(m._forward_pre_hooks) + len(m._forward_hooks) for m in model.modules())


@pytest.mark.parametrize("family", FAMILIES, ids=lambda f: f.name)
def test_events_are_alike_offloaded_and_resident(family):
    model = tiny_model(family.name)
    inputs = prompt_ids(length=5, batch=2)
    logs = []
    for offloaded in (False, True):
        offloader = moe_offload.offload(model, "25%") if offloaded else None
        log, before = Log(), count_hooks(model)
        with observe(model, log):
            model.generate(inputs, max_new_tokens=3, do_sample=False)
        assert count_hooks(model) == before
        if offloader:
            offloader.restore()
        logs.append(log)
    resident, paged = logs
    assert resident.events == paged.events
    assert all(torch.equal(a[0], b[0]) for a, b in zip(resident.routed, paged.routed, strict=True))
    assert [(c.phase, c.batch, c.length, c.position) for c in paged.calls] == [
        ("prefill", 2, 5, 0),
        ("decode", 2, 1, 5),
        ("decode", 2, 1, 6),
    ]
    hidden = model.config.hidden_size
    expected = ["begin"]
    for layer in range(family.moe_layers):
        expected += [
            ("layer", layer, (2, 5, hidden)),
            ("block", layer, (2, 5, hidden)),
            ("routed", layer, (10, TOP_K)),
        ]
    assert paged.events[: len(expected) + 1] == [*expected, "end"]
    assert torch.equal(paged.calls[0].input_ids, inputs)


def test_an_exception_ends_the_call_and_leaves_no_hook():
    class Stop(Exception):
        pass

    class Failing(Log):
        def block_begins(self, layer, hidden):
            raise Stop

    model, log = tiny_model("mixtral"), Failing()
    before = count_hooks(model)
    with pytest.raises(Stop), observe(model, log):  # an observer's own mistake reaches the caller
        model(prompt_ids())
    assert log.events == ["begin", ("layer", 0, (1, 12, 32)), "end"]
    assert count_hooks(model) == before
    with observe(model, Log()):
        model(prompt_ids())


def test_events_nobody_wants_have_no_hook():
    class OnlyRouting(Observer):
        def layer_routed(self, layer, topk_ids, topk_weights):
            pass

    model = tiny_model("mixtral")
    before = count_hooks(model)
    with observe(model, OnlyRouting()):
        assert count_hooks(model) == before + 2 + 2  # the model's two, one per layer


def test_plain_modules_are_observed_too():
    weights = {"gate_up_proj": torch.randn(4, 16, 8), "down_proj": torch.randn(4, 8, 8)}
    experts = OffloadedExperts(weights, device_budget="50%")
    block = OffloadedMoE(torch.nn.Linear(8, 4), experts, top_k=2)
    log = Log()
    with observe(block, log):
        block(torch.randn(3, 8))
    assert ("routed", 0, (3, 2)) in log.events
    assert log.calls[0].length == 3


def test_a_model_without_experts_is_refused():
    with pytest.raises(UnsupportedModelError, match="Linear has no routed experts to observe"):
        routed_layers(torch.nn.Linear(2, 2))
