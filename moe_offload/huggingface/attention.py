"""Attention of single tokens by the package's kernel, under a name that transformers knows.

A decoded token goes to `moe_offload.attention` where that is faster than torch. Where it is not and
several query heads share keys and values, torch's CPU kernel reads them once for each head (32
heads on 4, 2048 positions: 7.0 ms; repeated first, as transformers does beside a mask: 8.9); the
heads of a group as rows of one query are the same numbers and read them once: 0.56 ms (two Zen 4
cores, scratch run). Everything else goes to transformers' `sdpa_attention_forward`.
"""

from __future__ import annotations

import inspect
import sys
from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from transformers import AttentionInterface, AttentionMaskInterface
from transformers.integrations.sdpa_attention import sdpa_attention_forward
from transformers.masking_utils import sdpa_mask

from moe_offload.attention import takes, token_attention

NAME = "moe_offload_sdpa"


def register() -> None:
    """Make the name known to transformers; harmless when repeated."""
    AttentionInterface.register(NAME, attention_forward)
    AttentionMaskInterface.register(NAME, sdpa_mask)


def attention_forward(
    module: Any,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attention_mask: Tensor | None,
    dropout: float = 0.0,
    scaling: float | None = None,
    **kwargs: Any,
) -> tuple[Tensor, None]:
    """As transformers calls it: query [B, Hq, T, D], key and value [B, Hkv, S, D].

    Returns:
        ([B, T, Hq, D'], None), as `sdpa_attention_forward`.
    """
    batch, heads, length, size = query.shape
    groups = key.shape[1]
    plain = not (
        length != 1
        or query.device.type != "cpu"
        or dropout
        or kwargs.get("position_bias") is not None
        or kwargs.get("output_attentions")
        or torch.compiler.is_compiling()
    )
    if plain and takes(query, key, value, attention_mask):
        return token_attention(query, key, value, attention_mask, scaling), None
    one_mask = attention_mask is None or tuple(attention_mask.shape[1:3]) == (1, 1)
    if not plain or heads == groups or heads % groups or not one_mask:
        out, _ = sdpa_attention_forward(
            module, query, key, value, attention_mask, dropout, scaling, **kwargs
        )
        return out, None
    rows = query.reshape(batch, groups, heads // groups, size)
    out = F.scaled_dot_product_attention(rows, key, value, attention_mask, scale=scaling)
    return out.reshape(batch, 1, heads, value.shape[-1]), None


def use_token_attention(model: Any) -> Callable[[], None]:
    """Let a transformers model's "sdpa" attention be this one; returns what takes that back.

    Models that ask for "sdpa" by name in their own code keep it, as do those on other attention,
    in one of their parts too: setting a name sets it for all parts.
    """
    parts = (getattr(module, "config", None) for module in model.modules())
    names = {getattr(part, "_attn_implementation", "sdpa") for part in parts}
    if names != {"sdpa"} or _names_sdpa(type(model)) or not model._can_set_attn_implementation():
        return lambda: None
    register()
    model.set_attn_implementation(NAME)

    def undo() -> None:
        if model.config._attn_implementation == NAME:
            model.set_attn_implementation("sdpa")

    return undo


def _names_sdpa(model_class: type) -> bool:
    try:
        return '"sdpa"' in inspect.getsource(sys.modules[model_class.__module__])
    except (OSError, TypeError):  # no source: nothing is known
        return True
