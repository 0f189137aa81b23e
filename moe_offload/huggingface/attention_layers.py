"""Attention layers of decoded tokens in two native calls: projections, then attention itself.

As transformers writes it, a decoded token's attention layer is some thirty operations besides its
four products: views, norms of queries and keys, rotary embeddings, the cache. A few thousand
numbers each, but between two layers a hundred megabytes of experts pass through the caches, and
every operation finds its code and its data gone: 0.6 of the 1.7 ms that such a layer of OLMoE takes
(two Zen 4 cores). `csrc/expert_gemm/cpu/projections.h` does what stands before the cache in one
call; the bits are those of the same steps one by one.

Which class computes what is read from its source, as with norms (norms.py): 19 attention classes of
transformers 5.17's MoE models are one of the texts below. Prompts, gradients, hooks on the
projections and whatever else is not the plain case go to the class's own forward.
"""

from __future__ import annotations

import functools
import inspect
import re
import sys
from collections.abc import Callable
from typing import Any, ClassVar, Literal

import torch
from torch import Tensor, nn

from moe_offload.backends.native import dense_kernels
from moe_offload.class_swap import StandIn, stand_in, swap_classes
from moe_offload.dense import NativeLinear, takes
from moe_offload.huggingface.attention import NAME, attention_forward
from moe_offload.norms import NativeNorm
from moe_offload.source_text import statements

Normed = Literal["nothing", "heads", "rows"]


def use_token_projections(model: nn.Module) -> Callable[[], None]:
    """Let attention layers that are recognised take decoded tokens natively; returns the undo.

    For a model whose linear layers and norms are native already (`dense.use_dense_kernels`): a
    layer that has others keeps its own forward.
    """
    return swap_classes(model, _native_class)


class _TokenAttention(StandIn):
    """In front of a model's own attention class, by `_native_class`."""

    normed: ClassVar[Normed]
    clips: ClassVar[bool]  # may clamp all three to `config.clip_qkv`, which is not done here

    def forward(
        self,
        hidden_states: Tensor,
        position_embeddings: tuple[Tensor, Tensor] | None = None,
        attention_mask: Tensor | None = None,
        past_key_values: Any = None,
        **kwargs: Any,
    ) -> tuple[Tensor, Tensor | None]:
        """As transformers calls it: hidden_states [B, T, H] to [B, T, H], and no weights."""
        module: Any = self
        if past_key_values is not None and position_embeddings is not None:
            layers = _plain_layers(module, hidden_states)
            if layers is not None and _angles_fit(position_embeddings, hidden_states, module):
                query, key, value = _project(module, layers, hidden_states, position_embeddings)
                key, value = past_key_values.update(key, value, module.layer_idx)
                out, _ = attention_forward(
                    module, query, key, value, attention_mask, scaling=module.scaling, **kwargs
                )
                return module.o_proj(out.reshape(len(query), 1, -1)), None
        own: tuple[Tensor, Tensor | None] = module.own.forward(
            module,
            hidden_states,
            position_embeddings=position_embeddings,
            attention_mask=attention_mask,
            past_key_values=past_key_values,
            **kwargs,
        )
        return own


# Weight, bias, weight of the norm that follows and that norm; the last two perhaps None.
_Layer = tuple[Tensor, Tensor | None, Tensor | None, Any]


def _project(
    module: Any, layers: list[_Layer], hidden: Tensor, angles: tuple[Tensor, Tensor]
) -> list[Tensor]:
    """Queries, keys and values [B, heads, 1, head_dim] of tokens [B, 1, H]."""
    hidden = hidden.contiguous()
    batch, size = len(hidden), module.head_dim
    outputs, projections, norms = [], [], []
    for weight, bias, norm_weight, norm in layers:
        features = weight.shape[0]
        out = hidden.new_empty((batch, features // size, 1, size))
        outputs.append(out)
        projections.append(
            (
                weight.data_ptr(),
                weight.stride(0) * weight.element_size(),
                0 if bias is None else bias.data_ptr(),
                features,
                out.data_ptr(),
            )
        )
        norms.append(
            None
            if norm_weight is None
            else (
                norm_weight.data_ptr(),
                norm_weight.shape[0],
                getattr(norm, norm.epsilon_name),
                norm.weight_offset,
                norm.rounds_before_weight,
            )
        )
    cos, sin = angles
    row = cos.stride(0) * cos.element_size() if len(cos) > 1 else 0
    dense_kernels(hidden.dtype).project(
        hidden.data_ptr(),
        batch,
        hidden.shape[2],
        projections[0],
        projections[1],
        projections[2],
        size,
        norms[0],
        norms[1],
        (cos.data_ptr(), sin.data_ptr(), row, cos.shape[2]),
        torch.get_num_threads(),
    )
    return outputs


# --- when ----------------------------------------------------------------------------------------


def _plain_layers(module: Any, hidden: Tensor) -> list[_Layer] | None:
    """The layers to compute, if this is a decoded token of layers that the kernels take."""
    if (
        type(hidden) is not Tensor
        or hidden.dim() != 3
        or hidden.shape[1] != 1
        or module.training
        or module.config._attn_implementation != NAME
        or (module.clips and module.config.clip_qkv is not None)
    ):
        return None
    size, normed = module.head_dim, module.normed
    modules: dict[str, Any] = module._modules
    layers: list[_Layer] = []
    for name, norm_name in (("q_proj", "q_norm"), ("k_proj", "k_norm"), ("v_proj", "")):
        layer = modules[name]
        if type(layer) is not NativeLinear or _is_watched(layer):
            return None
        parameters: dict[str, Any] = layer._parameters  # of NativeLinear: there, bias perhaps None
        weight, bias = parameters["weight"], parameters["bias"]
        features = weight.shape[0]
        if features % size or not takes(hidden, weight, bias):
            return None
        if normed == "nothing" or not norm_name:
            layers.append((weight, bias, None, None))
            continue
        norm = modules[norm_name]
        if not isinstance(norm, NativeNorm) or _is_watched(norm):
            return None
        norm_weight = norm.weight
        if (
            norm_weight.shape != (size if normed == "heads" else features,)
            or norm_weight.dtype != hidden.dtype
            or not norm_weight.is_cpu
            or not norm_weight.is_contiguous()
            or (norm_weight.requires_grad and torch.is_grad_enabled())
        ):
            return None
        layers.append((weight, bias, norm_weight, norm))
    return layers


def _is_watched(module: Any) -> bool:
    """Does somebody hook into this module's call, or replace it (accelerate does)?"""
    return bool(module._forward_hooks or module._forward_pre_hooks or "forward" in vars(module))


def _angles_fit(angles: tuple[Tensor, Tensor], hidden: Tensor, module: Any) -> bool:
    """Are these cosines and sines [B or 1, 1, rotated] in the dtype of hidden?"""
    if type(angles) is not tuple or len(angles) != 2:
        return False
    cos, sin = angles
    return (
        type(cos) is type(sin) is Tensor
        and cos.dim() == 3
        and cos.shape == sin.shape
        and cos.stride() == sin.stride()
        and cos.stride(2) == 1
        and cos.shape[0] in (1, hidden.shape[0])
        and cos.shape[1] == 1
        and cos.shape[2] <= module.head_dim
        and cos.shape[2] % 2 == 0
        and cos.dtype == sin.dtype == hidden.dtype
        and cos.is_cpu
        and sin.is_cpu
    )


# --- which classes are such layers ---------------------------------------------------------------

_BEGIN = """input_shape = hidden_states.shape[:-1]
hidden_shape = (*input_shape, -1, self.head_dim)
"""
_VALUES = "value_states = self.v_proj(hidden_states).view(hidden_shape).transpose(1, 2)\n"
_BY_ROWS = """query_states = self.q_norm(self.q_proj(hidden_states))
key_states = self.k_norm(self.k_proj(hidden_states))
value_states = self.v_proj(hidden_states)
"""
_CLIPPED = """if self.config.clip_qkv is not None:
    query_states.clamp_(min=-self.config.clip_qkv, max=self.config.clip_qkv)
    key_states.clamp_(min=-self.config.clip_qkv, max=self.config.clip_qkv)
    value_states.clamp_(min=-self.config.clip_qkv, max=self.config.clip_qkv)
"""
_VIEWS = """query_states = query_states.view(hidden_shape).transpose(1, 2)
key_states = key_states.view(hidden_shape).transpose(1, 2)
value_states = value_states.view(hidden_shape).transpose(1, 2)
"""
_END = """cos, sin = position_embeddings
query_states, key_states = apply_rotary_pos_emb(query_states, key_states, cos, sin)
if past_key_values is not None:
    key_states, value_states = past_key_values.update(key_states, value_states, self.layer_idx)
attention_interface: Callable = ALL_ATTENTION_FUNCTIONS.get_interface(\
self.config._attn_implementation, eager_attention_forward)
attn_output, attn_weights = attention_interface(self, query_states, key_states, value_states, \
attention_mask, dropout=0.0 if not self.training else self.attention_dropout, \
scaling=self.scaling, **kwargs)
attn_output = attn_output.reshape(*input_shape, -1).contiguous()
attn_output = self.o_proj(attn_output)
return (attn_output, attn_weights)"""
# It only names a function; `kernels` from the hub replace it where a user asks for them.
_NAMED_FOR_THE_HUB = "use_kernel_forward_from_hub"
# What stands between _BEGIN and _END, and what norms see there.
_FORMS: dict[str, Normed] = {
    # Qwen2-MoE, Mixtral
    "query_states = self.q_proj(hidden_states).view(hidden_shape).transpose(1, 2)\n"
    "key_states = self.k_proj(hidden_states).view(hidden_shape).transpose(1, 2)\n"
    + _VALUES: "nothing",
    # Qwen3-MoE
    "query_states = self.q_norm(self.q_proj(hidden_states).view(hidden_shape)).transpose(1, 2)\n"
    "key_states = self.k_norm(self.k_proj(hidden_states).view(hidden_shape)).transpose(1, 2)\n"
    + _VALUES: "heads",
    _BY_ROWS + _VIEWS: "rows",  # MiniMax-M2
    _BY_ROWS + _CLIPPED + _VIEWS.replace("view(", "view(*"): "rows",  # OLMoE
}
# A window is in the mask already; "sdpa" does not look at it.
_WINDOW = re.compile(
    r" sliding_window=(self\.sliding_window|getattr\(self\.config, 'sliding_window', None\)),"
)
_ROPE = """cos = cos.unsqueeze(unsqueeze_dim)
sin = sin.unsqueeze(unsqueeze_dim)
q_embed = q * cos + rotate_half(q) * sin
k_embed = k * cos + rotate_half(k) * sin
return (q_embed, k_embed)"""
_ROPE_OF_A_PART = """cos = cos.unsqueeze(unsqueeze_dim)
sin = sin.unsqueeze(unsqueeze_dim)
rotary_dim = cos.shape[-1]
q_rot, q_pass = (q[..., :rotary_dim], q[..., rotary_dim:])
k_rot, k_pass = (k[..., :rotary_dim], k[..., rotary_dim:])
q_embed = q_rot * cos + rotate_half(q_rot) * sin
k_embed = k_rot * cos + rotate_half(k_rot) * sin
q_embed = torch.cat([q_embed, q_pass], dim=-1)
k_embed = torch.cat([k_embed, k_pass], dim=-1)
return (q_embed, k_embed)"""
_ROTATE_HALF = """x1 = x[..., :x.shape[-1] // 2]
x2 = x[..., x.shape[-1] // 2:]
return torch.cat((-x2, x1), dim=-1)"""


@functools.cache
def _native_class(attention: type) -> type | None:
    """The class that computes this one natively; None where its forward is not known."""
    if not issubclass(attention, nn.Module) or not attention.__name__.endswith("Attention"):
        return None
    text = _WINDOW.sub("", statements(getattr(attention, "forward", None), None) or "")
    form = text.removeprefix(_BEGIN).removesuffix(_END)
    if text != _BEGIN + form + _END or form not in _FORMS:
        return None
    module = sys.modules[attention.__module__]
    rope: Any = getattr(module, "apply_rotary_pos_emb", None)
    if (
        statements(rope, None, _NAMED_FOR_THE_HUB) not in (_ROPE, _ROPE_OF_A_PART)
        or inspect.signature(rope).parameters["unsqueeze_dim"].default != 1
        or statements(getattr(module, "rotate_half", None), None) != _ROTATE_HALF
    ):
        return None
    return stand_in(
        *(_TokenAttention, attention, _native_class),
        normed=_FORMS[form],
        clips=_CLIPPED in form,
    )
