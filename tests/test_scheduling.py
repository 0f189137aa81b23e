"""batch_generate: the same tokens whatever sits beside what, and an honest report."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import torch

import moe_offload
from moe_offload.errors import StateError, UnsupportedModelError
from moe_offload.huggingface.observe import Observer, observe
from moe_offload.predictors.base import Predictor
from moe_offload.running_batches import Window
from moe_offload.scheduling import batch_generate
from tests.tiny_models import CONTEXT, NUM_EXPERTS, TOP_K, VOCAB, tiny_model


def prompts(count: int, seed: int = 0) -> list[list[int]]:
    rng = np.random.default_rng(seed)
    return [rng.integers(3, VOCAB, rng.integers(1, 11)).tolist() for _ in range(count)]


def alone(model: Any, prompt: list[int], new_tokens: int) -> list[int]:
    """The prompt by itself through transformers' generate."""
    ids = torch.tensor([prompt])
    out = model.generate(
        ids, attention_mask=torch.ones_like(ids), max_new_tokens=new_tokens, do_sample=False
    )
    return out[0, len(prompt) :].tolist()


@pytest.mark.parametrize("name", ["qwen3_moe", "deepseek_v3", "gpt_oss"])
@pytest.mark.parametrize("schedule", ["fifo", "route"])
def test_each_prompt_gets_the_tokens_it_gets_alone(name: str, schedule: Any) -> None:
    model = tiny_model(name)
    given = prompts(11)  # two full batches, and a window that is not full
    expected = [alone(model, prompt, 8) for prompt in given]
    with moe_offload.offload(model, device_budget="40%"):
        report = batch_generate(model, given, 4, schedule, max_new_tokens=8, num_running=2)
    assert report.tokens == expected


def test_route_moves_sequences_and_changes_no_token() -> None:
    model = tiny_model("qwen3_moe")
    given = prompts(12, seed=3)
    fifo = batch_generate(model, given, 4, "fifo", max_new_tokens=12, num_running=3)
    route = batch_generate(
        model, given, 4, "route", max_new_tokens=12, num_running=3, min_gain=0.01
    )
    assert route.tokens == fifo.tokens
    assert route.sequences_moved > 0
    assert route.kv_moved_bytes > 0
    assert fifo.sequences_moved == fifo.kv_moved_bytes == 0


def test_logits_are_the_same_bits_whoever_sits_beside(monkeypatch: pytest.MonkeyPatch) -> None:
    """Batches of 24 on 8 experts, whose rows are now few and now many."""
    model = tiny_model("qwen3_moe")
    given = prompts(48, seed=5)
    logits: list[torch.Tensor] = []
    seen: dict[int, list[torch.Tensor]] = {}
    take = Window._take

    def record(self: Window, batch: Any, eos_ids: set[int]) -> None:
        for row, number in enumerate(batch.sequences):
            seen.setdefault(number, []).append(logits[-1][row].clone())
        take(self, batch, eos_ids)

    monkeypatch.setattr(Window, "_take", record)
    found = {}
    with moe_offload.offload(model, device_budget="40%"):
        handle = model.register_forward_hook(lambda m, a, out: logits.append(out.logits[:, -1]))
        for schedule in ("fifo", "route"):
            report = batch_generate(
                model, given, 24, schedule, max_new_tokens=6, num_running=2, min_gain=0.01
            )
            found[schedule] = dict(seen)
            seen.clear()
        handle.remove()
    assert report.sequences_moved > 0
    for number, rows in found["fifo"].items():
        for step, (a, b) in enumerate(zip(rows, found["route"][number], strict=True)):
            assert torch.equal(a, b), f"sequence {number}, token {step}"


def test_an_oracle_of_paths_brings_like_sequences_together() -> None:
    """Told that sequences 0, 2 and 1, 3 are alike, the scheduler seats them so."""
    model = tiny_model("qwen3_moe")
    kinds = np.zeros((4, 2, NUM_EXPERTS))
    kinds[[0, 2], :, :4] = kinds[[1, 3], :, 4:] = 0.9
    asked: list[Any] = []

    def paths(newest: Any, numbers: Any) -> np.ndarray:
        asked.append((list(newest), list(numbers)))
        return kinds

    report = batch_generate(
        model, prompts(4), 2, "route", max_new_tokens=3, num_running=2, paths=paths
    )
    assert report.sequences_moved == 2
    assert asked[0][1] == [0, 1, 2, 3]
    assert asked[-1][0] == [tokens[1] for tokens in report.tokens]


def test_end_of_sequence_ends_a_sequence_and_only_that() -> None:
    model = tiny_model("olmoe")
    given = prompts(6)
    free = batch_generate(model, given, 3, max_new_tokens=8, eos_token_id=None)
    ending = free.tokens[0][2]
    report = batch_generate(model, given, 3, max_new_tokens=8, eos_token_id=ending)
    for full, cut in zip(free.tokens, report.tokens, strict=True):
        end = full.index(ending) + 1 if ending in full else len(full)
        assert cut == full[:end]
    assert report.tokens[0] == free.tokens[0][:3]


def test_padding_reaches_no_expert() -> None:
    """A layer is asked for what the tokens of both prompts chose, and for nothing else."""
    model = tiny_model("olmoe")
    given = [prompts(1, seed=1)[0][:3], [5]]
    chosen: set[tuple[int, int]] = set()

    class Notes(Observer):
        def layer_routed(self, layer: int, topk_ids: Any, topk_weights: Any) -> None:
            chosen.update((layer, expert) for expert in topk_ids.flatten().tolist())

    with observe(model, Notes()):
        for prompt in given:
            model(input_ids=torch.tensor([prompt]))
    with moe_offload.offload(model, device_budget="100%", fill=False) as offloader:
        batch_generate(model, given, 2, max_new_tokens=1)
        assert offloader.stats()["lookups"] == len(chosen) < 2 * NUM_EXPERTS


def test_finished_sequences_reach_no_expert() -> None:
    model = tiny_model("olmoe")
    free = batch_generate(model, [[5], [7]], 2, max_new_tokens=6, eos_token_id=None)
    ending = free.tokens[0][0]
    assert ending not in free.tokens[1]
    report = batch_generate(model, [[5], [7]], 2, max_new_tokens=6, eos_token_id=ending)
    assert report.decode_tokens == 5, "the second sequence alone"
    assert report.distinct_experts_per_step == 2 * TOP_K


@pytest.mark.parametrize("first", [[[5, 6, 7], [8]], [[5, 6, 7], [8, 9, 10]]])
def test_muted_rows_say_nothing_about_a_predictor(first: list[list[int]]) -> None:
    """Padding and finished rows carry nobody's id: no evidence against a router or a prediction."""
    model = tiny_model("qwen3_moe")
    free = batch_generate(model, first, 2, max_new_tokens=6, eos_token_id=None)
    ending = next(t for t in free.tokens[0][:4] if t not in free.tokens[1])
    with moe_offload.offload(model, device_budget="40%", predictor="lookahead") as offloader:
        report = batch_generate(model, first, 2, max_new_tokens=6, eos_token_id=ending)
        told = offloader.stats()["predictor"]
    assert told["refused"] == []
    # It tests itself on the prompts' call and predicts from the next one on.
    assert told["recall"]["routed+1"]["tokens"] == report.decode_tokens


def test_a_predictor_of_ones_own_may_have_any_name() -> None:
    class Own(Predictor):
        name = "rpp"

    model = tiny_model("mixtral")
    with moe_offload.offload(model, device_budget="50%", predictor=Own()):
        assert len(batch_generate(model, [[5]], 1, max_new_tokens=2).tokens[0]) == 2


def test_the_report_counts_what_happened() -> None:
    model = tiny_model("mixtral")
    report = batch_generate(model, [[5, 6, 7]], 4, max_new_tokens=5)
    assert report.decode_steps == 4
    assert report.decode_tokens == 4
    assert report.distinct_experts_per_step == 2 * TOP_K  # one sequence, two layers
    assert 0 < report.decode_seconds < report.seconds


def test_decode_counters_leave_out_the_prompts() -> None:
    model = tiny_model("mixtral")
    with moe_offload.offload(model, device_budget="100%", fill=False) as offloader:
        report = batch_generate(model, [[5, 6, 7]], 1, max_new_tokens=4)
        total = offloader.stats()
    assert report.decode_counters["lookups"] == 3 * 2 * TOP_K
    assert total["lookups"] > report.decode_counters["lookups"]
    assert batch_generate(model, [[5]], 1, max_new_tokens=2).decode_counters == {}


def test_hooks_are_gone_afterwards_also_after_an_error() -> None:
    model = tiny_model("mixtral")
    hooks = lambda: sum(len(m._forward_pre_hooks) for m in model.modules())  # noqa: E731
    before = hooks()
    batch_generate(model, [[5]], 1, max_new_tokens=2)
    with pytest.raises(ValueError, match=r"paths returned shape \(1,\)"):
        batch_generate(
            model, [[5], [6]], 1, "route", max_new_tokens=3, paths=lambda *_: np.zeros(1)
        )
    assert hooks() == before


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"prompts": []}, "expected a list of prompts"),
        ({"prompts": "one text"}, "expected a list of prompts"),
        ({"prompts": [[5], []]}, "prompt 1 has no tokens"),
        ({"prompts": ["text"]}, "give tokenizer"),
        ({"batch_size": 0}, "batch_size must be an int >= 1, got 0"),
        ({"max_new_tokens": 0}, "max_new_tokens must be"),
        ({"num_running": 0}, "num_running must be"),
        ({"schedule": "lifo"}, "schedule must be"),
        ({"prompts": [[5] * CONTEXT]}, f"exceeds the model's context of {CONTEXT}"),
    ],
)
def test_bad_arguments(change: dict[str, Any], message: str) -> None:
    arguments = {"prompts": [[5]], "batch_size": 1, "max_new_tokens": 2} | change
    with pytest.raises(ValueError, match=message):
        batch_generate(tiny_model("mixtral"), **arguments)


def test_training_mode_is_refused() -> None:
    with pytest.raises(StateError, match="training mode"):
        batch_generate(tiny_model("mixtral").train(), [[5]], 1)


def test_a_cache_without_keys_and_values_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    from moe_offload import running_batches

    monkeypatch.setattr(running_batches, "_CACHE_PARTS", ("keys", "states"))
    model = tiny_model("qwen3_moe")
    with pytest.raises(UnsupportedModelError, match="has no states"):
        batch_generate(
            model, prompts(8, seed=3), 4, "route", max_new_tokens=8, num_running=2, min_gain=0.01
        )
