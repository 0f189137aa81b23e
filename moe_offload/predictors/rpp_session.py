"""One token at a time through a Routing Path Predictor, natively.

A decoder step is small: 0.45 M multiply-adds at the default shape. As torch modules it is some
eighty calls of a few microseconds each, which costs more than the arithmetic; as numpy products it
woke a BLAS's threads on the cores that the model needed (csrc/predictors/dense.h).
Here the norms' scales are folded into the matrices behind them, which are rounded to bfloat16,
because reading them from memory is what a step waits for, and csrc/predictors/rpp_step.cpp does the
rest in the calling thread. The prompt is still encoded by the torch modules, once.
"""

from __future__ import annotations

import numpy as np
import torch
from torch import Tensor

from moe_offload import _core
from moe_offload.predictors.rpp_model import RppModel, _buckets, _DecoderBlock

_NEVER = np.float32(-1e9)  # added to scores of padding


class RppDecoder:
    """The weights of a model as a session uses them: folded, row vectors times matrices.

    Attributes:
        tensors: what is looked up or added, fp32.
        head, blocks: what is multiplied by, packed bfloat16 (csrc/predictors/dense.h).
    """

    def __init__(self, model: RppModel) -> None:
        self.model, self.config = model, model.config
        self.blocks = [_folded(block) for block in model.decoder_blocks()]
        head = _array(model.head.weight).T.copy()  # [d_model + token_width, L * E]
        head[: self.config.d_model] *= _array(model.decoder_norm.weight)[:, None]
        self.head = packed(head)
        distance = -torch.arange(self.config.max_decoded - 1, -1, -1)
        with torch.no_grad():
            table = model.decoder_positions(_buckets(distance, both_ways=False))
        self.tensors = {
            "embed": _array(model.embed.weight),
            "token": _array(model.token.weight),
            "bias": _array(model.head.bias),
            "positions": np.ascontiguousarray(_array(table).T),  # [heads, max_decoded]
        }


def _folded(block: _DecoderBlock) -> list[np.ndarray]:
    """qkv, out, cross_q, cross_out, up, down as rpp_step.h takes them."""
    norm, cross = _array(block.norm.weight), _array(block.cross_norm.weight)
    own = torch.cat((block.attention.q.weight, block.attention.kv.weight))
    found = (
        _array(own).T * norm[:, None],
        _array(block.attention.out.weight).T,
        _array(block.cross.q.weight).T * cross[:, None],
        _array(block.cross.out.weight).T,
        _array(block.up.weight).T * _array(block.mlp_norm.weight)[:, None],
        _array(block.down.weight).T,
    )
    return [packed(matrix) for matrix in found]


def packed(matrix: np.ndarray) -> np.ndarray:
    """[inner, columns] fp32 -> [columns / PANEL, rounded up, inner, PANEL], bits of bfloat16."""
    inner, columns = matrix.shape
    width = _core.PANEL
    padded = np.zeros((inner, -(-columns // width) * width), np.float32)
    padded[:, :columns] = matrix
    panels = padded.reshape(inner, -1, width).transpose(1, 0, 2)
    halves = torch.from_numpy(np.ascontiguousarray(panels)).bfloat16().view(torch.int16)
    found: np.ndarray = halves.numpy().view(np.uint16)
    return found


class RppSession:
    """Incremental use: read a prompt once, then one decoder step per token.

    Args:
        decoder: the weights.
        prompt: [B, P] ids, of which the last `max_prompt` are read.
        keep: [B, P] bool, False for padding.

    Cost of a step: 2 x (decoder parameters + head) FLOPs, 0.94 MFLOP at the default shape, and
    attention over prompt and decoded tokens, in the calling thread. Logits equal those of
    `RppModel.forward` on the whole sequence up to rounding, the folded weights' to bfloat16 first,
    and a sequence's do not depend on its neighbours in the batch.
    """

    def __init__(self, decoder: RppDecoder, prompt: Tensor, keep: Tensor | None = None) -> None:
        config = decoder.config
        prompt = prompt[:, -config.max_prompt :]
        hidden: list[float] = []
        if keep is not None:
            keep = keep[:, -config.max_prompt :]
            hidden = np.where(keep.numpy(), np.float32(0), _NEVER).ravel().tolist()
        self.batch = len(prompt)
        self._shape = (self.batch, config.num_layers, config.num_experts)
        memory = []
        with torch.no_grad():
            encoded = decoder.model.encode(prompt, keep)
            for block in decoder.model.decoder_blocks():
                keys, values = block.read(encoded)  # [B, heads, P, d_kv]
                memory.append(
                    (_array(keys.transpose(2, 3).contiguous()), _array(values.contiguous()))
                )
        self._step = _core.RppStep(decoder.tensors, decoder.head, decoder.blocks, memory, hidden)

    def chances(self, tokens: Tensor) -> np.ndarray:
        """`step` as probabilities, [B, L, E]."""
        return self._step.step(tokens.numpy(), True).reshape(self._shape)

    def step(self, tokens: Tensor) -> np.ndarray:
        """[B] ids just generated -> logits [B, L, E] of the routing while they are fed."""
        return self._step.step(tokens.numpy(), False).reshape(self._shape)


def _array(tensor: Tensor) -> np.ndarray:
    out: np.ndarray = tensor.detach().float().numpy()
    return out
