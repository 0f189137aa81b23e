"""One token at a time through a Routing Path Predictor, in numpy.

A decoder step is small: 0.45 M multiply-adds at the default shape. As torch modules it is some
eighty calls of a few microseconds each, which costs more than the arithmetic; here the norms'
scales are folded into the matrices behind them, and what is left is numpy on arrays that stay in
cache. The prompt is still encoded by the torch modules, once.
"""

from __future__ import annotations

import numpy as np
import torch
from torch import Tensor

from moe_offload.predictors.rpp_model import _EPS, RppConfig, RppModel, _buckets, _DecoderBlock

_NEVER = np.float32(-1e9)  # added to scores of padding


class RppDecoder:
    """The weights of a model as a session uses them: fp32, folded, row vectors times matrices."""

    def __init__(self, model: RppModel) -> None:
        self.model, self.config = model, model.config
        self.blocks = [_Block(block) for block in model.decoder_blocks()]
        self.embed = _array(model.embed.weight)
        self.token = _array(model.token.weight)
        head = _array(model.head.weight).T.copy()  # [d_model + token_width, L * E]
        head[: self.config.d_model] *= _array(model.decoder_norm.weight)[:, None]
        self.head, self.bias = head, _array(model.head.bias)
        distance = -torch.arange(self.config.max_decoded - 1, -1, -1)
        with torch.no_grad():
            table = model.decoder_positions(_buckets(distance, both_ways=False))
        self.positions = _array(table).T.copy()  # [heads, max_decoded], the last column distance 0


class _Block:
    def __init__(self, block: _DecoderBlock) -> None:
        norm, cross = _array(block.norm.weight), _array(block.cross_norm.weight)
        mlp = _array(block.mlp_norm.weight)
        own = torch.cat((block.attention.q.weight, block.attention.kv.weight))
        self.qkv = _array(own).T * norm[:, None]  # [d_model, 3 * heads * d_kv]
        self.out = _array(block.attention.out.weight).T.copy()
        self.cross_q = _array(block.cross.q.weight).T * cross[:, None]
        self.cross_out = _array(block.cross.out.weight).T.copy()
        self.up = _array(block.up.weight).T * mlp[:, None]
        self.down = _array(block.down.weight).T.copy()


class RppSession:
    """Incremental use: read a prompt once, then one decoder step per token.

    Args:
        decoder: the weights.
        prompt: [B, P] ids, of which the last `max_prompt` are read.
        keep: [B, P] bool, False for padding.

    Cost of a step: 2 x (decoder parameters + head) FLOPs, 0.94 MFLOP at the default shape, and
    attention over prompt and decoded tokens. Logits equal those of `RppModel.forward` on the whole
    sequence up to rounding.
    """

    def __init__(self, decoder: RppDecoder, prompt: Tensor, keep: Tensor | None = None) -> None:
        self._decoder = decoder
        config = decoder.config
        prompt = prompt[:, -config.max_prompt :]
        self._hidden_prompt: np.ndarray | None = None
        if keep is not None:
            keep = keep[:, -config.max_prompt :]
            self._hidden_prompt = np.where(keep.numpy(), np.float32(0), _NEVER)[:, None, None, :]
        self.batch = len(prompt)
        self._memory = []
        with torch.no_grad():
            memory = decoder.model.encode(prompt, keep)
            for block in decoder.model.decoder_blocks():
                keys, values = block.read(memory)  # [B, heads, P, d_kv]
                self._memory.append((_array(keys.transpose(2, 3)).copy(), _array(values).copy()))
        self._past = [KeysValues(self.batch, config) for _ in decoder.blocks]

    def chances(self, tokens: Tensor) -> np.ndarray:
        """`step` as probabilities, [B, L, E]."""
        found: np.ndarray = 1 / (1 + np.exp(np.minimum(-self.step(tokens), 80)))
        return found

    def step(self, tokens: Tensor) -> np.ndarray:
        """[B] ids just generated -> logits [B, L, E] of the routing while they are fed."""
        decoder, config = self._decoder, self._decoder.config
        ids = tokens.numpy()
        x = decoder.embed[ids]  # [B, d_model]
        inner = config.num_heads * config.d_kv
        shape = (len(ids), config.num_heads, 1, config.d_kv)
        for block, memory, past in zip(decoder.blocks, self._memory, self._past, strict=True):
            qkv = _normed(x) @ block.qkv
            keys, values = past.append(
                qkv[:, inner : 2 * inner].reshape(shape), qkv[:, 2 * inner :].reshape(shape)
            )
            bias = decoder.positions[:, None, config.max_decoded - past.length :]
            mixed = _attend(qkv[:, :inner].reshape(shape), keys, values, bias)
            x = x + mixed.reshape(len(ids), inner) @ block.out
            queries = (_normed(x) @ block.cross_q).reshape(shape)
            mixed = _attend(queries, *memory, self._hidden_prompt)
            x = x + mixed.reshape(len(ids), inner) @ block.cross_out
            up = _normed(x) @ block.up
            np.maximum(up, 0, out=up)
            x = x + up @ block.down
        both = np.concatenate((_normed(x), decoder.token[ids]), 1)
        logits: np.ndarray = both @ decoder.head + decoder.bias
        return logits.reshape(len(ids), config.num_layers, config.num_experts)


class KeysValues:
    """Keys and values of the tokens so far, room for `capacity`; the older half leaves when full.

    Positions count by distance, so what remains is attended to as before.
    """

    def __init__(self, batch: int, config: RppConfig) -> None:
        shape = (batch, config.num_heads, config.max_decoded, config.d_kv)
        self._keys = np.zeros((shape[0], shape[1], shape[3], shape[2]), np.float32)
        self._values = np.zeros(shape, np.float32)
        self._capacity = config.max_decoded
        self.length = 0

    def append(self, keys: np.ndarray, values: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        """[B, heads, 1, d_kv] each -> keys [B, heads, d_kv, n], values [B, heads, n, d_kv]."""
        if self.length == self._capacity:
            kept = self._capacity // 2
            begin = self.length - kept
            self._keys[..., :kept] = self._keys[..., begin:].copy()
            self._values[:, :, :kept] = self._values[:, :, begin:].copy()
            self.length = kept
        self._keys[..., self.length] = keys[:, :, 0]
        self._values[:, :, self.length] = values[:, :, 0]
        self.length += 1
        return self._keys[..., : self.length], self._values[:, :, : self.length]


def _attend(
    queries: np.ndarray, keys: np.ndarray, values: np.ndarray, bias: np.ndarray | None
) -> np.ndarray:
    """Queries [B, heads, 1, d_kv], keys transposed -> [B, heads, 1, d_kv]."""
    scores = queries @ keys  # [B, heads, 1, n]
    if bias is not None:
        scores = scores + bias
    scores = np.exp(scores - scores.max(-1, keepdims=True))
    mixed: np.ndarray = (scores @ values) / scores.sum(-1, keepdims=True)
    return mixed


def _normed(x: np.ndarray) -> np.ndarray:
    """Rows at unit root mean square; the norm's scale is in the matrix that follows."""
    power = np.einsum("bd,bd->b", x, x) / x.shape[1] + _EPS
    out: np.ndarray = x * (power**-0.5)[:, None]
    return out


def _array(tensor: Tensor) -> np.ndarray:
    out: np.ndarray = tensor.detach().float().numpy()
    return out
