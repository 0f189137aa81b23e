"""Whole models on a GPU that could hold a part of their experts: tokens per second at four budgets.

Random-weight models of real shapes, with as many layers as fit the time, built in host memory.
Contenders: experts paged on demand with policy="lru" (the default, "auto", can learn nothing from
random routing), and accelerate's CPU offload, which moves each experts module whole.
The same prompt and the same greedy loop for all; a budget whose tokens differ from those with
everything resident prints no time. Random routers route close to uniformly: the hardest case for
a cache, so hit rates here are lower than a trained model's.
"""

from __future__ import annotations

import statistics
import time
from collections.abc import Iterator
from dataclasses import dataclass, field
from typing import Any

import torch
from harness import Row
from page_copies import copy_roof

COLUMNS = {
    "case": "case",
    "budget": "budget",
    "decode_tok_s": "decode tok/s",
    "prefill_tok_s": "prefill tok/s",
    "hit_percent": "hit %",
    "link_percent": "% link floor",
    "speedup": "x accelerate",
    "note": "note",
}
BUDGETS = ("100%", "45%", "25%", "15%")
PROMPT_TOKENS, NEW_TOKENS = 256, 16


@dataclass(frozen=True)
class Shape:
    """A transformers config of a real model with fewer layers."""

    name: str
    config_class: str
    num_layers: int
    sizes: dict[str, Any] = field(default_factory=dict)


SHAPES = (
    Shape(
        "Qwen3-30B-A3B shape",
        "Qwen3MoeConfig",
        8,
        {
            "vocab_size": 32000,
            "hidden_size": 2048,
            "intermediate_size": 6144,
            "moe_intermediate_size": 768,
            "num_attention_heads": 32,
            "num_key_value_heads": 4,
            "head_dim": 128,
            "num_experts": 128,
            "num_experts_per_tok": 8,
        },
    ),
    Shape(
        "Mixtral-8x7B shape",
        "MixtralConfig",
        3,
        {
            "vocab_size": 32000,
            "hidden_size": 4096,
            "intermediate_size": 14336,
            "num_attention_heads": 32,
            "num_key_value_heads": 8,
            "num_local_experts": 8,
            "num_experts_per_tok": 2,
        },
    ),
)


def build(shape: Shape) -> Any:
    """The model on the CPU in bf16; its weights repeat one random block: drawing takes minutes."""
    import transformers

    config = getattr(transformers, shape.config_class)(
        **shape.sizes, num_hidden_layers=shape.num_layers, tie_word_embeddings=False
    )
    torch.manual_seed(0)
    with torch.device("meta"):
        model = transformers.AutoModelForCausalLM.from_config(config, dtype=torch.bfloat16)
    model = model.to_empty(device="cpu")
    block = (torch.randn(1 << 24) * 0.02).to(torch.bfloat16)
    shift = 0
    for name, parameter in model.named_parameters():
        flat = parameter.data.view(-1)
        if "norm" in name:
            flat.fill_(1.0)
            continue
        for start in range(0, flat.numel(), block.numel()):
            part = flat[start : start + block.numel()]
            shift = (shift + 7919 * 64) % block.numel()
            part.copy_(block.roll(shift)[: part.numel()])
    for module in model.modules():  # rotary tables are buffers that to_empty left undefined
        if hasattr(module, "inv_freq") and hasattr(module, "compute_default_rope_parameters"):
            inv_freq, _ = module.compute_default_rope_parameters(module.config, "cpu")
            module.inv_freq = inv_freq
            if hasattr(module, "original_inv_freq"):
                module.original_inv_freq = inv_freq
    return model.eval()


def generate(model: Any, new_tokens: int) -> tuple[list[int], float, list[float]]:
    """Greedy tokens, seconds of the prompt, seconds of each token after the first."""
    generator = torch.Generator().manual_seed(1)
    feed = torch.randint(3, 31000, (1, PROMPT_TOKENS), generator=generator).cuda()
    cache, tokens, seconds = None, [], []
    for _ in range(new_tokens + 1):
        torch.cuda.synchronize()
        start = time.perf_counter()
        with torch.no_grad():
            out = model(input_ids=feed, past_key_values=cache, use_cache=True, logits_to_keep=1)
        cache = out.past_key_values
        feed = out.logits[:, -1].argmax(dim=-1, keepdim=True)
        tokens.append(int(feed))
        seconds.append(time.perf_counter() - start)
    return tokens, seconds[0], seconds[1:]


def run(budget_s: float) -> Iterator[Row]:
    deadline = time.perf_counter() + budget_s
    roof = copy_roof()
    for number, shape in enumerate(SHAPES):
        share = (deadline - time.perf_counter()) / (len(SHAPES) - number)
        try:
            yield from compare(shape, roof, time.perf_counter() + share)
        except Exception as error:  # the other model is still of interest
            failed = f"failed: {type(error).__name__}: {str(error)[:200]}"
            yield {"case": shape.name, "note": failed}


def compare(shape: Shape, roof: float, deadline: float) -> Iterator[Row]:
    import moe_offload

    start = time.perf_counter()
    model = build(shape)
    seconds = time.perf_counter() - start
    yield {"case": f"{shape.name}, {shape.num_layers} layers: built", "seconds": seconds}
    paged: dict[str, float] = {}
    expected: list[int] | None = None
    for budget in BUDGETS:
        if time.perf_counter() > deadline:
            yield {"case": f"{shape.name}: no time left for {budget}", "budget": budget}
            break
        offloader = moe_offload.offload(
            model, device="cuda", device_budget=budget, policy="lru", fill=True
        )
        try:
            offloader.wait_until_pinned()  # happens once, in the background: not a token's time
            generate(model, 2)  # cuBLAS handles, allocator, first touches
            offloader.reset_stats()
            tokens, prefill, decode = generate(model, NEW_TOKENS)
            stats = offloader.stats()
        finally:
            offloader.restore()
        if expected is None:
            expected = tokens
        if tokens != expected:
            raise AssertionError(f"WRONG TOKENS: {shape.name} at {budget}: {tokens} != {expected}")
        paged[budget] = 1 / statistics.median(decode)
        total = prefill + sum(decode)
        yield {
            "case": f"{shape.name}, paged, lru",
            "budget": budget,
            "decode_tok_s": paged[budget],
            "prefill_tok_s": PROMPT_TOKENS / prefill,
            "hit_percent": 100 * stats["hit_rate"],
            # how near all of it came to moving its demand bytes at the roof and doing nothing else
            "link_percent": 100 * stats["demand_bytes"] / 1e9 / roof / total,
            "stats": {name: value for name, value in stats.items() if name != "per_layer"},
            "decode_seconds": decode,
            "prefill_seconds": prefill,
        }
    if time.perf_counter() > deadline:
        yield {"case": f"{shape.name}: no time left for accelerate"}
        return
    slow = accelerate_offload(model, shape)
    yield slow
    for budget, rate in paged.items():
        ratio = rate / slow["decode_tok_s"]
        yield {
            "case": f"{shape.name}, paged against accelerate",
            "budget": budget,
            "speedup": ratio,
        }


def accelerate_offload(model: Any, shape: Shape) -> Row:
    """accelerate.dispatch_model with every experts module on the CPU, the rest on the GPU."""
    import accelerate

    device_map: dict[str, Any] = {"model.embed_tokens": 0, "model.norm": 0, "lm_head": 0}
    device_map["model.rotary_emb"] = 0
    for index, layer in enumerate(model.model.layers):
        for name, child in layer.named_children():
            path = f"model.layers.{index}.{name}"
            if not hasattr(child, "experts"):
                device_map[path] = 0
                continue
            for inner, _ in child.named_children():
                device_map[f"{path}.{inner}"] = "cpu" if inner == "experts" else 0
    accelerate.dispatch_model(model, device_map, main_device=0)
    generate(model, 1)
    tokens, prefill, decode = generate(model, 3)  # the model is not used afterwards
    return {
        "case": f"{shape.name}, accelerate CPU offload",
        "decode_tok_s": 1 / statistics.median(decode),
        "prefill_tok_s": PROMPT_TOKENS / prefill,
        "tokens": tokens,
        "decode_seconds": decode,
    }
