"""Tiny random models of every further family that uses transformers' common experts interface.

`tiny_models.FAMILIES` are the families tested in depth; these show that a family needs no code of
its own. Configs name the same thing in many ways, so one table has all the names, and each config
is given those it knows.
"""

from __future__ import annotations

from typing import Any

import torch
from tiny_models import _COMMON, _MLA, NUM_EXPERTS, TOP_K
from transformers import (
    AutoConfig,
    AutoModelForCausalLM,
    AutoModelForImageTextToText,
    PreTrainedModel,
)

from moe_offload.dense import use_dense_kernels
from moe_offload.huggingface.experts import NAME

_SYNONYMS: dict[str, Any] = {
    **_MLA,
    "num_experts": NUM_EXPERTS,
    "num_local_experts": NUM_EXPERTS,
    "n_routed_experts": NUM_EXPERTS,
    "moe_num_experts": NUM_EXPERTS,
    "num_experts_per_token": TOP_K,
    "top_k": TOP_K,
    "top_k_experts": TOP_K,
    "moe_topk": TOP_K,
    "moe_k": TOP_K,
    "n_group": 2,
    "topk_group": 1,
    "n_shared_experts": 1,
    "num_shared_experts": 1,
    "moe_num_shared_experts": 1,
    "shared_expert_intermediate_size": 24,
    "shared_intermediate_size": 24,
    "moe_shared_expert_intermediate_size": 16,
    "first_k_dense_replace": 1,
    "num_dense_layers": 1,
    "moe_layer_start_index": 1,
    "decoder_sparse_step": 1,
    "mlp_only_layers": [],
    "enable_moe_block": True,
    "expert_layer_period": 1,
    "expert_layer_offset": 0,
    "attn_layer_period": 2,
    "attn_layer_offset": 1,
    "sliding_window": 16,
    "index_n_heads": 2,
    "index_head_dim": 16,
    "index_topk": 64,
    "linear_num_key_heads": 2,
    "linear_num_value_heads": 4,
    "linear_key_head_dim": 8,
    "linear_value_head_dim": 8,
    "mamba_d_state": 8,
    "mamba_n_heads": 4,
    "mamba_d_head": 16,
    "mamba_n_groups": 1,
    "mamba_dt_rank": 4,
    "mamba_num_heads": 4,
    "mamba_head_dim": 16,
    "ssm_state_size": 8,
    "n_groups": 1,
}
_VISION: dict[str, Any] = {
    "hidden_size": 32,
    "intermediate_size": 32,
    "out_hidden_size": 32,
    "num_heads": 2,
    "num_attention_heads": 2,
    "depth": 1,
    "num_hidden_layers": 1,
    "patch_size": 4,
    "image_size": 16,
    "deepstack_visual_indexes": [],
}
_LINEAR: dict[str, Any] = {"layer_types": ["linear_attention", "full_attention"]}

# Model type: what it needs besides the names above.
FURTHER: dict[str, dict[str, Any]] = {
    "afmoe": {},
    "axk1": {},
    "axk2": {},
    "cohere2_moe": {},
    "deepseek_v2": {},
    "deepseek_v32": {},
    "deepseek_v4": {},
    "dots1": {},
    "ernie4_5_moe": {},
    "exaone_moe": {},
    "flex_olmo": {},
    "gemma4_text": {
        "layer_types": ["sliding_attention", "full_attention"],
        "hidden_size_per_layer_input": 0,
        "num_kv_shared_layers": 0,
    },
    "glm4_moe_lite": {},
    "glm4v_moe": {
        "rope_parameters": {"rope_type": "default", "rope_theta": 1e4, "mrope_section": [0, 1, 1]}
    },
    "glm_moe_dsa": {},
    "granitemoe_swa": {},
    "granitemoehybrid": {"layer_types": ["mamba", "attention"]},
    "granitemoeshared": {},
    "hunyuan_v1_moe": {},
    "hy_v3": {},
    "hy_v4": {},
    "inkling_text": {},
    "jamba": {},
    "kimi_linear": _LINEAR,
    "laguna": {},
    "lfm2_moe": {"layer_types": ["conv", "full_attention"]},
    "mellum": {},
    "mimo_v2_flash": {"layer_types": ["full_attention", "full_attention"]},
    "minimax": {},
    "minimax_m2": {},
    "minimax_m3_vl": {},
    "mistral4": {"head_dim": 16},
    "nemotron_h": {},
    "phimoe": {},
    "qwen3_5_moe": _LINEAR,
    "qwen3_next": _LINEAR,
    "qwen3_vl_moe": {},
    "qwen4_exp": {
        "ngram_vocab_size_base": 256,
        "split_ngram_parts": 2,
        "indexer_n_heads": 2,
        "indexer_kv_heads": 1,
        "indexer_head_dim": 16,
        "indexer_budget": 16,
        "indexer_compress_ratio": 4,
        **_LINEAR,
    },
    "solar_open": {},
    "zaya": {"num_experts_per_tok": 1},
}
# Not tested, each with its reason.
UNTESTED = {
    "deepseek_ocr2": "no text-only forward",
    "diffusion_gemma": "no causal language model",
    "ernie4_5_vl_moe": "its checkpoints mix text and vision experts: from_pretrained refuses them",
    "glm5_next": "passes, but its linear attention in plain PyTorch takes 20 seconds",
    "openai_privacy_filter": "no causal language model",
    "qwen3_omni_moe": "no text-only forward",
}


# Keeps some weights in float32 when loaded in bfloat16, and then multiplies the two.
_FLOAT32 = ("deepseek_v4",)


def further_model(name: str) -> PreTrainedModel:
    """A tiny random bfloat16 model of a family in FURTHER, in eval mode, on our kernels."""
    default = AutoConfig.for_model(name)
    text = getattr(default, "text_config", default)
    known = {*vars(text), *getattr(type(text), "attribute_map", {})}
    wanted = {**_COMMON, **{k: v for k, v in _SYNONYMS.items() if k in known}, **FURTHER[name]}
    if text is not default:
        vision = {**_VISION, "model_type": default.vision_config.model_type}
        wanted = {
            "text_config": {**wanted, "model_type": text.model_type},
            "vision_config": vision,
        }
    config = AutoConfig.for_model(name, **wanted)
    causal = type(config) in AutoModelForCausalLM._model_mapping and text is default
    auto = AutoModelForCausalLM if causal else AutoModelForImageTextToText
    dtype = torch.float32 if name in _FLOAT32 else torch.bfloat16
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        model = auto.from_config(config, dtype=dtype, experts_implementation=NAME).eval()
        with torch.no_grad():
            for parameter in model.parameters():
                if parameter.dim() >= 2:
                    parameter.copy_(torch.randn(parameter.shape) * 0.15)
    use_dense_kernels(model)
    return model
