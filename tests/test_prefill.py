"""A long prompt reads each missing expert once, and leaves most of what decoding had cached."""

from __future__ import annotations

import pytest
import torch

import moe_offload
from moe_offload.models import tiny_moe_path

pytest.importorskip("transformers")

PROMPT_TOKENS, BEFORE, AFTER = 512, 24, 24


@pytest.fixture(scope="module")
def model():
    num_threads = torch.get_num_threads()
    torch.set_num_threads(1)  # matrices this small only wait for each other's threads
    model = moe_offload.from_pretrained(tiny_moe_path(), device_budget="25%")
    yield model
    moe_offload.get_offloader(model).close()
    torch.set_num_threads(num_threads)


def pages_read(stats) -> int:
    return stats["demand_misses"] + stats["prefetch_hits"] + stats["joined_prefetches"]


def decode(model, cache, token, steps: int):
    for _ in range(steps):
        out = model(input_ids=token, past_key_values=cache, use_cache=True)
        cache, token = out.past_key_values, out.logits[:, -1:].argmax(-1)
    return cache, token


@torch.no_grad()
def hit_rate_of_later_tokens(model, seed: int, prompt_between: bool) -> float:
    """Decode, perhaps serve another prompt, decode on: the same tokens either way."""
    generator = torch.Generator().manual_seed(seed)
    start = torch.randint(model.config.vocab_size, (1, 16), generator=generator)
    other = torch.randint(model.config.vocab_size, (1, PROMPT_TOKENS), generator=generator)
    offloader = moe_offload.get_offloader(model)
    out = model(input_ids=start, use_cache=True)
    cache, token = decode(model, out.past_key_values, out.logits[:, -1:].argmax(-1), BEFORE)
    if prompt_between:
        offloader.reset_stats()
        model(input_ids=other, use_cache=False)
        stats = offloader.stats()
        assert stats["acquires"] == model.config.num_hidden_layers  # each layer asks once
        assert stats["lookups"] <= stats["num_pages"]
        payload = stats["demand_bytes"] / stats["demand_misses"]
        assert stats["disk_bytes"] <= pages_read(stats) * (payload + 2 * 4096 * 3)
    offloader.reset_stats()
    decode(model, cache, token, AFTER)
    return offloader.stats()["hit_rate"]


def test_a_prompt_of_512_tokens_costs_decoding_at_most_three_points(model) -> None:
    lost = []
    for seed in range(3):
        without = hit_rate_of_later_tokens(model, seed, prompt_between=False)
        lost.append(100 * (without - hit_rate_of_later_tokens(model, seed, prompt_between=True)))
    assert sum(lost) / len(lost) <= 3, f"points lost: {lost}"
    print(f"points lost: {lost}")


@torch.no_grad()
@pytest.mark.parametrize("policy", ["lru", "auto"])
def test_a_prompt_reads_the_next_layer_while_this_one_is_computed(policy) -> None:
    """Into the slots that the scan gives back: it reads no page more, and none twice.

    A policy that chooses what stays is not asked about what was read ahead: of each layer at most
    as many pages as are read ahead do not stay that would have, and have to be read again.
    """
    model = moe_offload.from_pretrained(tiny_moe_path(), device_budget="25%", policy=policy)
    offloader = moe_offload.get_offloader(model)
    (pool,) = offloader.pools
    generator = torch.Generator().manual_seed(7)
    first, second = torch.randint(
        model.config.vocab_size, (2, 1, PROMPT_TOKENS), generator=generator
    )
    seen = {}
    for reads_ahead in (True, False):
        pool.reads_ahead = reads_ahead
        pool.resize(pool.num_slots)  # the cache starts empty
        model(input_ids=first, use_cache=False)
        offloader.reset_stats()
        logits = model(input_ids=second, use_cache=False).logits
        seen[reads_ahead] = logits, offloader.stats()
    (logits, ahead), (expected, without) = seen[True], seen[False]
    assert torch.equal(logits, expected)
    more = pages_read(ahead) - pages_read(without)
    if policy == "lru":
        assert more == 0
    else:
        assert more <= ahead["prefetch_hits"] + ahead["joined_prefetches"]
    assert ahead["prefetch_bytes_wasted"] == without["prefetch_bytes_used"] == 0
    used = [row["prefetch_bytes_used"] > 0 for row in ahead["per_layer"]]
    assert used == [False] + [True] * (len(used) - 1)
    offloader.close()
