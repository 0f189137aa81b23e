"""Tiny random Mixture-of-Experts models, one per family the drop-in is tested on.

Sizes are as small as each architecture allows (milliseconds per forward), weights are drawn wide
(0.15) so that a wrong expert changes tokens, and every family round-trips through
save_pretrained into its real hub layout: per-expert tensors or fused ones.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from transformers import AutoConfig, AutoModelForCausalLM, PreTrainedModel

from moe_offload.dense import use_dense_kernels
from moe_offload.huggingface.experts import NAME
from moe_offload.verification import to_aligned_memory

torch.set_num_threads(1)  # matrices this small only lose by sharing; on busy cores tenfold

VOCAB = 128
CONTEXT = 128
NUM_EXPERTS = 8
TOP_K = 2

_COMMON: dict[str, Any] = {
    "vocab_size": VOCAB,
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 8,
    "max_position_embeddings": CONTEXT,
    "tie_word_embeddings": False,
    "pad_token_id": 0,
    "bos_token_id": 1,
    "eos_token_id": 2,
    "num_experts_per_tok": TOP_K,
    "moe_intermediate_size": 16,
}
_MLA = {
    "q_lora_rank": 16,
    "kv_lora_rank": 16,
    "qk_rope_head_dim": 8,
    "qk_nope_head_dim": 8,
    "v_head_dim": 8,
    "num_key_value_heads": 4,
}
_GROUPED = {
    "n_routed_experts": NUM_EXPERTS,
    "n_shared_experts": 1,
    "n_group": 2,
    "topk_group": 1,
    "first_k_dense_replace": 1,
}


@dataclass(frozen=True)
class Family:
    """One model type: what its config needs beyond the common part, and its layout."""

    name: str
    extra: dict[str, Any] = field(default_factory=dict)
    moe_layers: int = 2
    sections: tuple[str, ...] = ("gate_up_proj", "down_proj")


FAMILIES = [
    Family("mixtral", {"num_local_experts": NUM_EXPERTS}),
    Family("qwen2_moe", {"num_experts": NUM_EXPERTS, "shared_expert_intermediate_size": 24}),
    Family(
        "qwen3_moe",
        {"num_experts": NUM_EXPERTS, "decoder_sparse_step": 1, "mlp_only_layers": []},
    ),
    Family("olmoe", {"num_experts": NUM_EXPERTS}),
    Family("deepseek_v3", _GROUPED | _MLA, moe_layers=1),
    Family("glm4_moe", _GROUPED, moe_layers=1),
    Family("granitemoe", {"num_local_experts": NUM_EXPERTS}),
    Family(
        "gpt_oss",
        {
            "num_local_experts": NUM_EXPERTS,
            "layer_types": ["sliding_attention", "full_attention"],
            "sliding_window": 16,
            "rope_parameters": {"rope_type": "default", "rope_theta": 10000.0},
        },
        sections=("gate_up_proj", "gate_up_proj_bias", "down_proj", "down_proj_bias"),
    ),
]


def family(name: str) -> Family:
    return next(entry for entry in FAMILIES if entry.name == name)


def tiny_model(
    name: str,
    dtype: torch.dtype = torch.float32,
    seed: int = 0,
    implementation: str = NAME,
    **overrides: Any,
) -> PreTrainedModel:
    """A tiny random model in eval mode; it computes as offloaded ones do."""
    config = AutoConfig.for_model(name, **{**_COMMON, **family(name).extra, **overrides})
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        model = AutoModelForCausalLM.from_config(
            config, dtype=dtype, experts_implementation=implementation
        ).eval()
        with torch.no_grad():
            for parameter in model.parameters():
                if parameter.dim() >= 2:  # norms keep their ones
                    parameter.copy_(torch.randn(parameter.shape) * 0.15)
    if implementation == NAME:
        use_dense_kernels(model)
    model.generation_config.eos_token_id = None  # every generation runs to its full length
    return model


def experts_modules(model: PreTrainedModel) -> list[tuple[str, torch.nn.Module]]:
    return [(n, m) for n, m in model.named_modules() if n.rsplit(".", 1)[-1] == "experts"]


def prompt_ids(length: int = 12, batch: int = 1, seed: int = 0) -> torch.Tensor:
    generator = torch.Generator().manual_seed(seed)
    return torch.randint(3, VOCAB, (batch, length), generator=generator)


def plain_model(folder: str | Path, **options: Any) -> PreTrainedModel:
    """A checkpoint loaded by transformers alone, its weights moved to aligned memory.

    transformers maps the file, so weights start at multiples of 8 bytes; CPU matrix kernels then
    sum in another order, and a plain model differs from itself in the last bit (6e-7 measured).
    """
    model = AutoModelForCausalLM.from_pretrained(folder, **options)
    model.set_experts_implementation(NAME)
    use_dense_kernels(model)
    to_aligned_memory(model)
    return model
