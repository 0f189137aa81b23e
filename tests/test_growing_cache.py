"""A cache that appends in place against transformers' own, which concatenates.

The twin of a `GrowingLayer` is a `DynamicLayer` that was told the same things; bits, shapes and
every view handed out earlier have to stay equal, whatever is done to the layer in between.
"""

from __future__ import annotations

import copy
import pickle
import random
from collections.abc import Callable
from typing import Any

import pytest
import tiny_models
import torch
from tiny_models import prompt_ids
from torch import Tensor
from transformers import DynamicCache, StaticCache
from transformers.cache_utils import DynamicLayer, DynamicSlidingWindowLayer, EncoderDecoderCache

import moe_offload
from moe_offload.huggingface import growing_cache
from moe_offload.huggingface.growing_cache import GrowingLayer, room_for, use_growing_caches

HEADS, SIZE, VALUE_SIZE = 3, 8, 5


def new_tokens(
    generator: torch.Generator, count: int, batch: int = 2, dtype: torch.dtype = torch.float32
) -> tuple[Tensor, Tensor]:
    """Keys and values as attention makes them: heads transposed out of one projection."""
    keys = torch.randn((batch, count, HEADS, SIZE), generator=generator).to(dtype)
    values = torch.randn((batch, count, HEADS, VALUE_SIZE), generator=generator).to(dtype)
    return keys.transpose(1, 2), values.transpose(1, 2)


def growing_layer() -> Any:
    layer = DynamicLayer()
    layer.__class__ = GrowingLayer
    return layer


@pytest.fixture(autouse=True)
def no_grad() -> Any:
    with torch.no_grad():
        yield


@pytest.fixture(autouse=True)
def poisoned(monkeypatch: pytest.MonkeyPatch) -> None:
    """Room that was never written is NaN."""
    plain = growing_cache.empty

    def empty(like: Tensor, shape: tuple[int, ...]) -> Tensor:
        return plain(like, shape).fill_(float("nan"))

    monkeypatch.setattr(growing_cache, "empty", empty)


def equal(mine: Any, twin: Any) -> bool:
    return (
        torch.equal(mine.keys, twin.keys)
        and torch.equal(mine.values, twin.values)
        and mine.get_seq_length() == twin.get_seq_length()
        and mine.get_mask_sizes(1) == twin.get_mask_sizes(1)
    )


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_a_token_is_written_behind_the_others_and_nothing_else_moves(dtype: torch.dtype) -> None:
    generator = torch.Generator().manual_seed(0)
    mine, twin = growing_layer(), DynamicLayer()
    buffers, moves = set(), []
    for step in range(3 * room_for(0)):
        tokens = new_tokens(generator, 5 if step == 0 else 1, dtype=dtype)
        shown = mine.update(*tokens)
        expected = twin.update(*tokens)
        assert shown[0] is mine.keys
        assert shown[1] is mine.values
        assert torch.equal(shown[0], expected[0])
        assert torch.equal(shown[1], expected[1])
        assert equal(mine, twin)
        moves += [step] if mine.keys.data_ptr() not in buffers else []
        buffers.add(mine.keys.data_ptr())
    # The prompt as it is, room from the first token on, and again whenever it is used up.
    assert moves == [0, 1, 2 + room_for(0), 3 + 2 * room_for(0)]


def test_memory_is_what_is_promised() -> None:
    assert [room_for(n) for n in (0, 1, 512, 513, 519, 520, 4096)] == [64, 64, 64, 64, 64, 65, 512]
    generator = torch.Generator().manual_seed(0)
    layer = growing_layer()
    layer.update(*new_tokens(generator, 1000))
    assert layer.keys.untyped_storage().nbytes() == layer.keys.nbytes  # a prompt alone: none
    layer.update(*new_tokens(generator, 1))
    for kept in (layer.keys, layer.values):
        assert kept.untyped_storage().nbytes() * 1001 == kept.nbytes * (1001 + 125)


def crop(layer: Any, rng: random.Random) -> None:
    layer.crop(-rng.randint(1, max(1, layer.get_seq_length() - 1)))


def reorder(layer: Any, rng: random.Random) -> None:
    layer.reorder_cache(torch.tensor([rng.randrange(2) for _ in range(2)]))


def repeat_and_select(layer: Any, rng: random.Random) -> None:
    layer.batch_repeat_interleave(2)
    layer.batch_select_indices(torch.tensor([rng.randrange(4), rng.randrange(4)]))


def through_a_pickle(layer: Any, rng: random.Random) -> None:
    state = vars(pickle.loads(pickle.dumps(layer)))
    layer.keys, layer.values = state["keys"], state["values"]


def assign(layer: Any, rng: random.Random) -> None:
    layer.keys = layer.keys.flip(1)


def assign_part(layer: Any, rng: random.Random) -> None:
    layer.values = layer.values[:]  # the same numbers in another object


def write_rows(layer: Any, rng: random.Random) -> None:
    layer.keys, layer.values = layer.keys.clone(), layer.values.clone()
    layer.keys[0] = layer.keys[1]


def offload_and_prefetch(layer: Any, rng: random.Random) -> None:
    layer.offload()
    layer.prefetch()


ACTIONS: list[Callable[[Any, random.Random], None]] = [
    crop,
    reorder,
    repeat_and_select,
    through_a_pickle,
    assign,
    assign_part,
    write_rows,
    offload_and_prefetch,
    lambda layer, rng: layer.reset(),
    lambda layer, rng: layer.crop(0),
]


@pytest.mark.parametrize("seed", range(8))
def test_whatever_is_done_in_between_every_view_stays_as_it_was(seed: int) -> None:
    print(f"seed {seed}")
    rng, generator = random.Random(seed), torch.Generator().manual_seed(seed)
    layers: list[tuple[Any, DynamicLayer]] = [(growing_layer(), DynamicLayer())]
    shown: list[tuple[Tensor, Tensor]] = []  # what was handed out, and what it looked like
    in_place = 0
    for _ in range(300):
        mine, twin = rng.choice(layers)
        kind = rng.random()
        if mine.is_initialized and kind < 0.15:
            action, same = rng.choice(ACTIONS), rng.randrange(1 << 30)
            action(mine, random.Random(same))
            action(twin, random.Random(same))
        elif mine.is_initialized and kind < 0.2 and len(layers) < 6:
            fork = copy.deepcopy if rng.random() < 0.5 else copy.copy
            layers.append((fork(mine), copy.deepcopy(twin)))
            layers[-1][0].__class__ = GrowingLayer  # as the next call would
        elif mine.is_initialized and kind < 0.25 and len(layers) < 6:
            shared = growing_layer()  # one that has our attributes, and goes on by itself
            vars(shared).update(vars(mine))
            layers.append((shared, copy.deepcopy(twin)))
        else:
            before = mine.keys.data_ptr() if mine.is_initialized else None
            tokens = new_tokens(generator, rng.choice((1, 1, 1, 1, 7, 90)))
            keys, values = mine.update(*tokens)
            in_place += keys.data_ptr() == before
            twin.update(*tokens)
            shown += [(keys, keys.clone()), (values, values.clone())]
        assert equal(mine, twin)
        assert all(torch.equal(now, then) for now, then in shown[-200:])
    assert in_place > 50


def test_a_reset_does_not_reach_what_was_shown_before() -> None:
    generator = torch.Generator().manual_seed(0)
    layer = growing_layer()
    for _ in range(3):
        shown, _ = layer.update(*new_tokens(generator, 2))
    kept = shown.clone()
    layer.reset()
    assert not layer.keys.any()
    assert torch.equal(shown, kept)


@pytest.mark.parametrize("made_in", [True, False])
def test_inference_tensors_and_others_mix(made_in: bool) -> None:
    generator = torch.Generator().manual_seed(0)
    mine, twin = growing_layer(), DynamicLayer()
    for step in range(9):
        with torch.inference_mode(made_in if step < 3 or step > 5 else not made_in):
            tokens = new_tokens(generator, 1)
            shown = mine.update(*tokens)
            twin.update(*tokens)
            assert torch.equal(shown[0], twin.keys)
            assert torch.equal(shown[1], twin.values)


def test_gradients_other_dtypes_and_devices_are_left_to_transformers() -> None:
    generator = torch.Generator().manual_seed(0)
    mine = growing_layer()
    for _ in range(3):
        mine.update(*new_tokens(generator, 1))
    with torch.enable_grad():
        keys, values = new_tokens(generator, 1)
        shown, _ = mine.update(keys.requires_grad_(), values)
        shown.sum().backward()
        assert keys.grad is not None
        assert shown.is_contiguous()
    mine = growing_layer()
    for _ in range(3):
        mine.update(*new_tokens(generator, 1, dtype=torch.bfloat16))
    keys, values = new_tokens(generator, 1)
    shown, _ = mine.update(keys, values)
    assert shown.dtype == torch.float32  # as torch.cat promotes
    assert torch.equal(shown[:, :, -1:], keys)
    with pytest.raises(RuntimeError, match="Sizes of tensors must match"):
        mine.update(*new_tokens(generator, 1, batch=3))
    meta = growing_layer()
    for length in (1, 2, 3):
        assert meta.update(*(t.to("meta") for t in new_tokens(generator, 1)))[0].shape[2] == length
        assert meta.keys.is_contiguous()


def test_copies_and_pickles_are_plain_layers_of_the_tokens_alone() -> None:
    generator = torch.Generator().manual_seed(0)
    layer = growing_layer()
    for _ in range(3):
        layer.update(*new_tokens(generator, 1))
    for made in (
        copy.copy(layer),
        copy.deepcopy(layer),
        pickle.loads(pickle.dumps(layer)),
        copy.deepcopy(growing_layer()),
    ):
        assert type(made) is DynamicLayer
        assert vars(made).keys() == vars(DynamicLayer()).keys() | (
            {"dtype", "device"} if made.is_initialized else set()
        )
        if made.is_initialized:
            assert equal(made, layer)
            assert made.keys.untyped_storage().nbytes() == made.keys.nbytes


# --- in models -----------------------------------------------------------------------------------


def types_of(cache: Any) -> set[type]:
    return {type(layer) for layer in cache.layers}


def test_only_plain_layers_of_plain_caches_change() -> None:
    model = tiny_models.tiny_model("mixtral", implementation="grouped_mm")
    undo = use_growing_caches(model)

    class Own(DynamicCache):
        pass

    class OwnLayer(DynamicLayer):
        pass

    ids = prompt_ids(4)
    plain = DynamicCache(config=model.config)
    model(ids, past_key_values=plain)
    assert types_of(plain) == {GrowingLayer}
    lazy = DynamicCache()
    for _ in range(2):
        model(ids, past_key_values=lazy)
    assert types_of(lazy) == {GrowingLayer}
    positional = DynamicCache(config=model.config)
    model.model(ids, None, None, positional)  # the inner model has no hook
    assert types_of(positional) == {DynamicLayer}
    model(ids, torch.ones(1, 8, dtype=torch.long), None, positional)
    assert types_of(positional) == {GrowingLayer}
    own, own_layers = Own(config=model.config), DynamicCache(config=model.config)
    own_layers.layers = [OwnLayer() for _ in own_layers.layers]
    sliding = DynamicCache(config=model.config)
    sliding.layers = [DynamicSlidingWindowLayer(64) for _ in sliding.layers]
    static = StaticCache(config=model.config, max_cache_len=8)
    both = EncoderDecoderCache(DynamicCache(config=model.config), DynamicCache(config=model.config))
    for cache, kept in (
        (own, DynamicLayer),
        (own_layers, OwnLayer),
        (sliding, DynamicSlidingWindowLayer),
    ):
        model(ids, past_key_values=cache)
        assert types_of(cache) == {kept}
    kinds = types_of(static)
    model(ids, past_key_values=static)
    assert types_of(static) == kinds
    growing_cache._grow(model, (), {"past_key_values": both})
    assert types_of(both.self_attention_cache) == {DynamicLayer}
    undo()
    again = DynamicCache(config=model.config)
    model(ids, past_key_values=again)
    assert types_of(again) == {DynamicLayer}
    model(ids, past_key_values=plain)  # goes on working
    assert plain.get_seq_length() == 8


@pytest.mark.slow
def test_a_compiled_model_keeps_its_caches() -> None:
    model = tiny_models.tiny_model("mixtral", implementation="eager")
    undo = use_growing_caches(model)
    cache = DynamicCache(config=model.config)
    torch.compile(model, backend="eager")(prompt_ids(4), past_key_values=cache)
    assert types_of(cache) == {DynamicLayer}
    undo()


GENERATIONS: dict[str, dict[str, Any]] = {
    "greedy": {},
    "beams": {"num_beams": 3},
    "prompt lookup": {"prompt_lookup_num_tokens": 3},
    "sampling": {"do_sample": True},
}


@pytest.mark.parametrize("name", GENERATIONS)
@pytest.mark.parametrize("family", ["mixtral", "qwen3_moe"])
def test_the_same_tokens_and_logits_as_with_transformers_cache(name: str, family: str) -> None:
    model = tiny_models.tiny_model(family, implementation="grouped_mm")
    options: dict[str, Any] = {
        "max_new_tokens": 90,
        "output_logits": True,
        "return_dict_in_generate": True,
        "pad_token_id": 0,
        **GENERATIONS[name],
    }
    batch = 1 if name == "prompt lookup" else 3
    ids = prompt_ids(6, batch=batch).repeat(1, 2)
    mask = torch.ones_like(ids)
    mask[0, : 5 if batch > 1 else 0] = 0

    def generate() -> Any:
        torch.manual_seed(0)
        return model.generate(ids, attention_mask=mask, **options)

    undo = use_growing_caches(model)
    mine = generate()
    undo()
    expected = generate()
    assert types_of(mine.past_key_values) == {GrowingLayer}
    assert types_of(expected.past_key_values) == {DynamicLayer}
    assert torch.equal(mine.sequences, expected.sequences)
    for a, b in zip(mine.logits, expected.logits, strict=True):
        assert torch.equal(a, b), (a - b).abs().max()


def test_an_assistant_and_a_kept_prefix_give_the_same_tokens() -> None:
    model = tiny_models.tiny_model("mixtral", implementation="grouped_mm")
    assistant = tiny_models.tiny_model("mixtral", seed=1, implementation="grouped_mm")
    prefix, ids = prompt_ids(10), torch.cat([prompt_ids(10), prompt_ids(5, seed=2)], dim=1)

    def generate() -> list[Tensor]:
        found = [model.generate(ids, max_new_tokens=40, assistant_model=assistant, pad_token_id=0)]
        kept = DynamicCache(config=model.config)
        model(prefix, past_key_values=kept)
        model(prefix, past_key_values=kept)  # so that there is room, which must not be shared
        kept.crop(-10)
        for _ in range(2):
            fork = copy.deepcopy(kept)
            found.append(model.generate(ids, past_key_values=fork, max_new_tokens=9))
            longer = torch.cat([found[-1], prompt_ids(3, seed=5)], dim=1)
            found.append(model.generate(longer, past_key_values=fork, max_new_tokens=9))
        return found

    undo, undo_assistant = use_growing_caches(model), use_growing_caches(assistant)
    mine = generate()
    undo()
    undo_assistant()
    assert all(map(torch.equal, mine, generate()))


def test_offloaded_models_have_it_until_they_are_restored() -> None:
    model = tiny_models.tiny_model("mixtral", implementation="grouped_mm")
    resident = tiny_models.tiny_model("mixtral")  # with use_dense_kernels
    ids = prompt_ids(9)
    options: dict[str, Any] = {"max_new_tokens": 20, "return_dict_in_generate": True}
    with moe_offload.offload(model, "50%") as offloader:
        out, expected = model.generate(ids, **options), resident.generate(ids, **options)
        assert torch.equal(out.sequences, expected.sequences)
        assert types_of(out.past_key_values) == {GrowingLayer}
        assert types_of(expected.past_key_values) == {GrowingLayer}
        offloader.restore()
    assert types_of(model.generate(ids, **options).past_key_values) == {DynamicLayer}
    with moe_offload.offload(model, "50%", dense_backend="torch"):
        assert types_of(model.generate(ids, **options).past_key_values) == {DynamicLayer}
