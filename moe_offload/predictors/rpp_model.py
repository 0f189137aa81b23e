"""The network of the Routing Path Predictor of ExpertFlow (arXiv 2410.17954, section 3).

A T5-shaped encoder-decoder (arXiv 1910.10683: pre-norm, RMS norms and linear maps without bias,
ReLU, relative position buckets, unscaled dot products) that never sees a hidden state: the encoder
reads the prompt, the decoder the tokens generated since, and one linear head turns each decoder
position into logits for all MoE layers x experts at once. Hidden size 32 and feed-forward 2048 are
the paper's grid search; with three layers a side and 4 heads of 16 the weights take 3.7 MB in fp32
for a vocabulary of 2048, which a CPU core streams from its cache in about 0.1 ms.

Deviations from the published code: heads of 16 instead of 64 (with hidden 32, T5's default would
spend more on attention than on everything else), three layers instead of six, a bias in the head,
which is the popularity of each expert, and a second, wider embedding of the token that is fed,
which goes straight to the head. The last is for what hidden size 32 loses: without it, on the
gpt-oss-20b trace, recall@4 was 56 %, below the 59 % of a plain table of counts per token.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from moe_offload.errors import PredictorError

_NUM_BUCKETS, _MAX_DISTANCE = 32, 128
_EPS = 1e-6


@dataclass(frozen=True)
class RppConfig:
    """Shape of a Routing Path Predictor.

    Attributes:
        vocab_size: V, tokens of the MoE model's own vocabulary.
        num_layers: L, MoE layers. `num_experts`: E of each of them. `top_k`: A.
        d_model, d_ff, num_heads, d_kv, num_blocks: hidden size, feed-forward size, heads, size of
            a head, blocks in the encoder and as many in the decoder.
        token_width: size of the token embedding that goes straight to the head.
        max_prompt, max_decoded: tokens the encoder reads (the last ones) and the decoder keeps.
    """

    vocab_size: int
    num_layers: int
    num_experts: int
    top_k: int
    d_model: int = 32
    d_ff: int = 2048
    num_heads: int = 4
    d_kv: int = 16
    num_blocks: int = 3
    token_width: int = 64
    max_prompt: int = 256
    max_decoded: int = 512

    def __post_init__(self) -> None:
        for name, value in vars(self).items():
            if isinstance(value, bool) or not isinstance(value, int) or value < 1:
                raise PredictorError(f"rpp: {name} must be a whole number >= 1, got {value!r}")


class RppModel(nn.Module):
    """tokens of prompt [B, P] and of what was generated [B, N] -> logits [B, N, L, E].

    The dot products are unscaled as in T5; `reset_parameters` starts accordingly small.
    """

    def __init__(self, config: RppConfig) -> None:
        super().__init__()
        self.config = config
        self.embed = nn.Embedding(config.vocab_size, config.d_model)  # both sides, as in T5
        self.encoder = nn.ModuleList(_Block(config) for _ in range(config.num_blocks))
        self.encoder_norm = nn.RMSNorm(config.d_model, eps=_EPS)
        self.decoder = nn.ModuleList(_DecoderBlock(config) for _ in range(config.num_blocks))
        self.decoder_norm = nn.RMSNorm(config.d_model, eps=_EPS)
        # one table per side, shared by its blocks
        self.encoder_positions = nn.Embedding(_NUM_BUCKETS, config.num_heads)
        self.decoder_positions = nn.Embedding(_NUM_BUCKETS, config.num_heads)
        self.token = nn.Embedding(config.vocab_size, config.token_width)  # straight to the head
        width = config.d_model + config.token_width
        self.head = nn.Linear(width, config.num_layers * config.num_experts)
        self.reset_parameters()

    def reset_parameters(self) -> None:
        """T5's initial scales; the head starts at zero and its bias at A of E."""
        config = self.config
        nn.init.normal_(self.embed.weight, std=1.0)
        nn.init.normal_(self.token.weight, std=1.0)
        for block in [*self.encoder, *self.decoder]:
            inner = config.num_heads * config.d_kv
            for attention in (m for m in block.modules() if isinstance(m, _Attention)):
                nn.init.normal_(attention.q.weight, std=(config.d_model * config.d_kv) ** -0.5)
                nn.init.normal_(attention.kv.weight, std=config.d_model**-0.5)
                nn.init.normal_(attention.out.weight, std=inner**-0.5)
            nn.init.normal_(block.up.weight, std=config.d_model**-0.5)
            nn.init.normal_(block.down.weight, std=config.d_ff**-0.5)
        for table in (self.encoder_positions, self.decoder_positions):
            nn.init.normal_(table.weight, std=0.1)
        share = min(max(config.top_k / config.num_experts, 1e-3), 1 - 1e-3)
        nn.init.zeros_(self.head.weight)
        nn.init.constant_(self.head.bias, math.log(share / (1 - share)))

    def encode(self, prompt: Tensor, keep: Tensor | None = None) -> Tensor:
        """[B, P] ids, keep [B, P] bool (False: padding) -> [B, P, d_model]."""
        bias = _bias(self.encoder_positions, prompt.shape[1], both_ways=True)  # [heads, P, P]
        if keep is not None:
            bias = bias + _hide(~keep[:, None, None, :])
        hidden = self.embed(prompt)
        for block in self.encoder:
            hidden = block(hidden, bias)
        return self.encoder_norm(hidden)

    def forward(self, prompt: Tensor, decoded: Tensor, keep: Tensor | None = None) -> Tensor:
        """Whole sequences at once, for training: [B, P], [B, N] -> logits [B, N, L, E]."""
        memory = self.encode(prompt, keep)
        count = decoded.shape[1]
        bias = _bias(self.decoder_positions, count, both_ways=False)
        later = torch.ones(count, count, dtype=torch.bool, device=prompt.device).triu(1)
        bias = bias + _hide(later)
        cross_bias = None if keep is None else _hide(~keep[:, None, None, :])
        hidden = self.embed(decoded)
        for block in self.decoder_blocks():
            hidden = block(hidden, bias, block.read(memory), cross_bias)
        return self.logits(hidden, decoded)

    def decoder_blocks(self) -> list[_DecoderBlock]:
        return list(self.decoder)  # type: ignore[arg-type]

    def logits(self, hidden: Tensor, tokens: Tensor) -> Tensor:
        """[..., d_model] of the last decoder block and its tokens [...] -> [..., L, E]."""
        out: Tensor = self.head(torch.cat((self.decoder_norm(hidden), self.token(tokens)), -1))
        return out.unflatten(-1, (self.config.num_layers, self.config.num_experts))


class _Attention(nn.Module):
    def __init__(self, config: RppConfig) -> None:
        super().__init__()
        inner = config.num_heads * config.d_kv
        self.num_heads, self.d_kv = config.num_heads, config.d_kv
        self.q = nn.Linear(config.d_model, inner, bias=False)
        self.kv = nn.Linear(config.d_model, 2 * inner, bias=False)
        self.out = nn.Linear(inner, config.d_model, bias=False)

    def keys_values(self, hidden: Tensor) -> tuple[Tensor, Tensor]:
        """[B, N, d_model] -> keys and values [B, heads, N, d_kv]."""
        both = self.kv(hidden).unflatten(-1, (2, self.num_heads, self.d_kv))
        keys, values = both.permute(2, 0, 3, 1, 4)
        return keys, values

    def forward(
        self, hidden: Tensor, keys_values: tuple[Tensor, Tensor], bias: Tensor | None
    ) -> Tensor:
        keys, values = keys_values
        queries = self.q(hidden).unflatten(-1, (self.num_heads, self.d_kv)).transpose(1, 2)
        scores = queries @ keys.transpose(-1, -2)  # [B, heads, N, M]
        if bias is not None:
            scores = scores + bias
        mixed = scores.softmax(-1) @ values
        return self.out(mixed.transpose(1, 2).flatten(-2))


class _Block(nn.Module):
    """Self-attention and feed-forward."""

    def __init__(self, config: RppConfig) -> None:
        super().__init__()
        self.norm = nn.RMSNorm(config.d_model, eps=_EPS)
        self.attention = _Attention(config)
        self.mlp_norm = nn.RMSNorm(config.d_model, eps=_EPS)
        self.up = nn.Linear(config.d_model, config.d_ff, bias=False)
        self.down = nn.Linear(config.d_ff, config.d_model, bias=False)

    def forward(self, hidden: Tensor, bias: Tensor) -> Tensor:
        """[B, N, d_model] -> same."""
        normed = self.norm(hidden)
        hidden = hidden + self.attention(normed, self.attention.keys_values(normed), bias)
        return self.feed_forward(hidden)

    def feed_forward(self, hidden: Tensor) -> Tensor:
        out: Tensor = hidden + self.down(self.up(self.mlp_norm(hidden)).relu())
        return out


class _DecoderBlock(_Block):
    """A block that also attends to the prompt."""

    def __init__(self, config: RppConfig) -> None:
        super().__init__(config)
        self.cross_norm = nn.RMSNorm(config.d_model, eps=_EPS)
        self.cross = _Attention(config)

    def read(self, memory: Tensor) -> tuple[Tensor, Tensor]:
        """Keys and values of the encoded prompt, the same for every step."""
        return self.cross.keys_values(memory)

    def forward(  # type: ignore[override]
        self,
        hidden: Tensor,
        bias: Tensor,
        memory: tuple[Tensor, Tensor],
        memory_bias: Tensor | None,
    ) -> Tensor:
        """[B, N, d_model] -> same."""
        normed = self.norm(hidden)
        hidden = hidden + self.attention(normed, self.attention.keys_values(normed), bias)
        hidden = hidden + self.cross(self.cross_norm(hidden), memory, memory_bias)
        return self.feed_forward(hidden)


def _hide(hidden: Tensor) -> Tensor:
    """True -> a large negative number to add to scores (not -inf: a row may be all padding)."""
    return hidden.to(torch.float32) * -1e9


def _bias(table: nn.Embedding, count: int, *, both_ways: bool) -> Tensor:
    """[heads, count, count]: what the distance of query i and key j adds to their score."""
    distance = torch.arange(count)[None, :] - torch.arange(count)[:, None]  # key - query
    return table(_buckets(distance, both_ways=both_ways)).permute(2, 0, 1)


def _buckets(distance: Tensor, *, both_ways: bool) -> Tensor:
    """T5's buckets: half of them exact distances, the rest logarithmic up to _MAX_DISTANCE.

    Example: one way, distances 0, -1, ..., -15 are buckets 0 to 15, -16 is 16, -128 and beyond 31.
    """
    num_buckets = _NUM_BUCKETS
    offset = torch.zeros_like(distance)
    if both_ways:
        num_buckets //= 2
        offset = (distance > 0).to(distance.dtype) * num_buckets
        magnitude = distance.abs()
    else:
        magnitude = (-distance).clamp(min=0)
    exact = num_buckets // 2
    ratio = torch.log(magnitude.clamp(min=1).to(torch.float32) / exact) / math.log(
        _MAX_DISTANCE / exact
    )
    far = exact + (ratio * (num_buckets - exact)).to(distance.dtype)
    far = far.clamp(max=num_buckets - 1)
    return offset + torch.where(magnitude < exact, magnitude, far)
