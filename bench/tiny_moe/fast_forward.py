"""The training twin of Qwen3MoeForCausalLM's forward: same weights, same numbers, several times
faster on CPU.

transformers owns the parameters (fp32) and the checkpoint; this file only computes. Once per step
`working_copy` casts them to bf16, everything below runs in bf16 with fp32 softmax, norm statistics
and loss. Expert rows are sorted by expert once, and forward and backward are loops of one `mm` per
expert into preallocated buffers; both directions use gathers only, since a bf16 scatter-add on CPU
is many times slower. The routing weight is applied to the F-wide inner activation, not the H-wide
output: the same product, a quarter of the traffic.
"""

from dataclasses import dataclass
from itertools import pairwise

import torch
import torch.nn.functional as F
from torch import Tensor
from transformers import Qwen3MoeConfig

from moe_offload.predictors.pregate import PreGates

# Rows of an expert are padded to a multiple of this. oneDNN builds a kernel for every new matrix
# height, so unpadded experts spend most of their time in code generation: all `mm` of a step of
# 5120 tokens took 917 ms without padding and 315 ms with it (2 cores of AMD EPYC Genoa, bf16).
ROW_BLOCK = 64


def working_copy(params: dict[str, Tensor]) -> dict[str, Tensor]:
    """bf16 leaves whose .grad the backward pass fills."""
    return {n: p.detach().to(torch.bfloat16).requires_grad_() for n, p in params.items()}


class _Experts(torch.autograd.Function):
    """x [T, H], weights [T, A], ids [T, A], gate_up [E, 2F, H], down [E, H, F] -> [T, H]."""

    @staticmethod
    def forward(ctx, x, weights, ids, gate_up, down):
        num_experts, top_k = gate_up.shape[0], ids.shape[1]
        flat = ids.flatten()
        order = flat.argsort(stable=True)
        counts = flat.bincount(minlength=num_experts)
        padded = (counts + ROW_BLOCK - 1) // ROW_BLOCK * ROW_BLOCK
        offsets = [0, *padded.cumsum(0).tolist()]
        shift = (padded - counts).cumsum(0) - (padded - counts)  # padding rows before each expert
        place = torch.arange(len(order)) + shift[flat[order]]  # sorted pair -> padded row
        inverse = torch.empty_like(order)
        inverse[order] = place
        # A padding row reads token 0 with weight 0, so it adds nothing to any output or gradient.
        token = torch.zeros(offsets[-1], dtype=torch.int64)
        token[place] = order // top_k
        row_weight = weights.new_zeros(offsets[-1], 1)
        row_weight[place, 0] = weights.flatten()[order]
        rows = x.index_select(0, token)  # [R, H]
        pre = rows.new_empty(len(rows), gate_up.shape[1])  # [R, 2F]
        for e in range(num_experts):
            s, t = offsets[e], offsets[e + 1]
            if t > s:
                torch.mm(rows[s:t], gate_up[e].T, out=pre[s:t])
        gate, up = pre.chunk(2, dim=1)
        inner = F.silu(gate) * up * row_weight  # [R, F]
        out = torch.empty_like(rows)
        for e in range(num_experts):
            s, t = offsets[e], offsets[e + 1]
            if t > s:
                torch.mm(inner[s:t], down[e].T, out=out[s:t])
        ctx.save_for_backward(rows, pre, inner, row_weight, token, inverse, gate_up, down)
        ctx.offsets, ctx.shape = offsets, ids.shape
        return out.index_select(0, inverse).view(*ids.shape, -1).sum(1)

    @staticmethod
    def backward(ctx, grad_out):
        rows, pre, inner, row_weight, token, inverse, gate_up, down = ctx.saved_tensors
        grad_rows_out = grad_out.index_select(0, token)  # [R, H]
        grad_inner = torch.empty_like(inner)
        grad_down = torch.zeros_like(down)
        grad_gate_up = torch.zeros_like(gate_up)
        frozen = not ctx.needs_input_grad[3]
        spans = [(e, s, t) for e, (s, t) in enumerate(pairwise(ctx.offsets)) if t > s]
        for e, s, t in spans:
            torch.mm(grad_rows_out[s:t], down[e], out=grad_inner[s:t])
            if not frozen:
                torch.mm(grad_rows_out[s:t].T, inner[s:t], out=grad_down[e])
        gate, up = pre.chunk(2, dim=1)
        act = F.silu(gate)
        grad_weight = (grad_inner * act * up).sum(1)  # [R]
        grad_inner = grad_inner * row_weight
        grad_pre = torch.cat(
            (torch.ops.aten.silu_backward(grad_inner * up, gate), grad_inner * act), dim=1
        )
        grad_rows = torch.empty_like(rows)
        for e, s, t in spans:
            torch.mm(grad_pre[s:t], gate_up[e], out=grad_rows[s:t])
            if not frozen:
                torch.mm(grad_pre[s:t].T, rows[s:t], out=grad_gate_up[e])
        grad_x = grad_rows.index_select(0, inverse).view(*ctx.shape, -1).sum(1)
        grad_weight = grad_weight[inverse].view(ctx.shape)
        if frozen:
            return grad_x, grad_weight, None, None, None
        return grad_x, grad_weight, None, grad_gate_up, grad_down


@dataclass
class Routing:
    """One layer's routing of a batch."""

    probs: Tensor  # [B, S, E] fp32
    ids: Tensor  # [B, S, A]


def _rms(x: Tensor, weight: Tensor, eps: float) -> Tensor:
    return F.rms_norm(x, (x.shape[-1],), weight, eps)


def rope_table(config: Qwen3MoeConfig, seq_len: int) -> tuple[Tensor, Tensor]:
    theta = config.rope_parameters["rope_theta"]
    steps = torch.arange(0, config.head_dim, 2, dtype=torch.float32) / config.head_dim
    angle = torch.arange(seq_len)[:, None] * theta**-steps  # [S, D / 2]
    return angle.cos().bfloat16(), angle.sin().bfloat16()


def _rotate(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    a, b = x.chunk(2, dim=-1)
    return torch.cat((a * cos - b * sin, b * cos + a * sin), dim=-1)


def forward(
    w: dict[str, Tensor],
    config: Qwen3MoeConfig,
    ids: Tensor,
    rope: tuple[Tensor, Tensor],
    pregates: PreGates | None = None,
) -> tuple[Tensor, list[Routing]]:
    """ids [B, S] -> normed final hidden states [B, S, H], before the tied head, and the routing.

    With `pregates` each layer but the first executes what the gate of the layer before names.
    """
    cos, sin = rope
    batch, seq_len = ids.shape
    eps, head_dim = config.rms_norm_eps, config.head_dim
    x = F.embedding(ids, w["model.embed_tokens.weight"])
    routing: list[Routing] = []
    ahead: Tensor | None = None  # logits that the layer before made for this one
    for layer in range(config.num_hidden_layers):
        p = f"model.layers.{layer}."
        h = _rms(x, w[p + "input_layernorm.weight"], eps)
        qkv = torch.cat([w[p + f"self_attn.{n}_proj.weight"] for n in "qkv"])
        heads = F.linear(h, qkv).view(batch, seq_len, -1, head_dim).transpose(1, 2)
        num_q, num_kv = config.num_attention_heads, config.num_key_value_heads
        q, k, v = heads.split((num_q, num_kv, num_kv), dim=1)
        q = _rotate(_rms(q, w[p + "self_attn.q_norm.weight"], eps), cos, sin)
        k = _rotate(_rms(k, w[p + "self_attn.k_norm.weight"], eps), cos, sin)
        k, v = (z.repeat_interleave(num_q // num_kv, dim=1) for z in (k, v))
        a = F.scaled_dot_product_attention(q, k, v, is_causal=True)
        a = a.transpose(1, 2).reshape(batch, seq_len, -1)
        x = x + F.linear(a, w[p + "self_attn.o_proj.weight"])

        h = _rms(x, w[p + "post_attention_layernorm.weight"], eps).view(batch * seq_len, -1)
        logits = F.linear(h, w[p + "mlp.gate.weight"]).float() if ahead is None else ahead
        if pregates is not None and layer + 1 < config.num_hidden_layers:
            ahead = pregates(layer, h)
        probs = logits.softmax(-1)  # [T, E]
        top, top_ids = probs.topk(config.num_experts_per_tok, dim=-1)
        if config.norm_topk_prob:
            top = top / top.sum(-1, keepdim=True)
        top = top.bfloat16()
        gate_up, down = (w[p + f"mlp.experts.{n}_proj"] for n in ("gate_up", "down"))
        x = x + _Experts.apply(h, top, top_ids, gate_up, down).view_as(x)
        routing.append(Routing(probs.view(batch, seq_len, -1), top_ids.view(batch, seq_len, -1)))
    return _rms(x, w["model.norm.weight"], eps), routing


def token_loss(w: dict[str, Tensor], hidden: Tensor, targets: Tensor) -> Tensor:
    """Mean cross-entropy in nats through the tied head."""
    logits = F.linear(hidden.flatten(0, 1), w["model.embed_tokens.weight"])
    return F.cross_entropy(logits.float(), targets.flatten())
