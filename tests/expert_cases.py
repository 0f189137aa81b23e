"""One call of the CPU expert kernels: its sizes, its inputs, and how far it may be from the truth.

`reference.expert_ffn` is the oracle. In the 16-bit dtypes the bound is the error of torch's own
operations on the same inputs times 1.2; in fp32 it is 4 rounding steps times sqrt(K) of the sum.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any

import pytest
import torch
from torch import Tensor

from moe_offload import _core, reference
from moe_offload.activations import Activation
from moe_offload.backends.native import DTYPES, BoundLayer

torch.set_num_threads(1)  # matrices this small only lose by sharing
SILU = Activation("silu")
GPT_OSS = Activation("clamped_swiglu", True, 1.702, 0.5, 1.0)
PATHS = [
    pytest.param(isa, dtype, id=f"{isa}-{name}")
    for dtype, name in DTYPES.items()
    for isa in _core.cpu_isas(name)
]


@dataclass(frozen=True)
class Case:
    """Sizes of one call; `bias` also gives both projections biases."""

    name: str
    tokens: int
    top_k: int
    experts: int
    hidden: int
    inner: int
    activation: Activation = SILU
    bias: bool = False


@dataclass
class Inputs:
    """Tensors of one call, and the call."""

    case: Case
    hidden: Tensor
    weights: dict[str, Tensor]
    ids: Tensor
    topk: Tensor

    @classmethod
    def make(cls, case: Case, dtype: torch.dtype, seed: int = 0) -> Inputs:
        generator = torch.Generator().manual_seed(seed)

        def draw(*shape: int, scale: float = 1.0) -> Tensor:
            return (torch.randn(shape, generator=generator) * scale).to(dtype)

        act, experts = case.activation, case.experts
        first = "gate_up_proj" if act.gated else "up_proj"
        rows = case.inner * (2 if act.gated else 1)
        scale = 1 / math.sqrt(case.hidden)
        weights = {
            first: draw(experts, rows, case.hidden, scale=scale),
            "down_proj": draw(experts, case.hidden, case.inner, scale=1 / math.sqrt(case.inner)),
        }
        if case.bias:
            weights[f"{first}_bias"] = draw(experts, rows, scale=0.3)
            weights["down_proj_bias"] = draw(experts, case.hidden, scale=0.3)
        scores = torch.randn(case.tokens, experts, generator=generator).softmax(-1)
        topk, ids = scores.topk(case.top_k, dim=-1)
        return cls(case, draw(case.tokens, case.hidden), weights, ids, topk)

    def layer(self, isa: str = "auto", **layout: bool) -> BoundLayer:
        case = self.case
        return BoundLayer(
            *(case.activation, case.hidden, case.inner, case.experts, self.hidden.dtype),
            **layout,
            isa=isa,
        )

    def native(self, isa: str = "auto", num_threads: int = 1) -> Tensor:
        """All experts at once, into an output full of NaN."""
        layer = self.layer(isa)
        run = self.start(layer, num_threads)
        run.compute_all(layer.weights(self.weights))
        return self.finish(run)

    def start(self, layer: BoundLayer, num_threads: int, rows_apart: bool = False) -> _core.FfnRun:
        return layer.ffn.start(
            *(self.hidden.data_ptr(), self.ids.data_ptr(), True, self.topk.data_ptr(), "float32"),
            *(*self.ids.shape, num_threads, rows_apart),
        )

    def finish(self, run: _core.FfnRun) -> Tensor:
        out = torch.full_like(self.hidden, float("nan"))
        run.finish(out.data_ptr())
        return out

    @property
    def arguments(self) -> tuple[Any, ...]:
        first = "gate_up_proj" if self.case.activation.gated else "up_proj"
        w = self.weights
        return (
            *(self.hidden, w[first], w["down_proj"], self.ids, self.topk, self.case.activation),
            *(w.get(f"{first}_bias"), w.get("down_proj_bias")),
        )

    def exact(self) -> Tensor:
        return reference.expert_ffn(*self.arguments)

    def by_torch(self) -> Tensor:
        """The same operations in the dtype itself, each rounded: what torch reaches."""
        hidden, first, down, ids, topk, act, first_bias, down_bias = self.arguments
        out = torch.zeros(hidden.shape, dtype=torch.float32)
        for expert in ids.unique().tolist():
            tokens, ranks = (ids == expert).nonzero(as_tuple=True)
            inner = hidden[tokens] @ first[expert].T
            inner = inner if first_bias is None else inner + first_bias[expert]
            gate, up = inner.chunk(2, dim=-1) if act.gated else (None, inner)
            y = act(gate, up) @ down[expert].T
            y = y if down_bias is None else y + down_bias[expert]
            out.index_add_(0, tokens, y.float() * topk[tokens, ranks, None])
        return out.to(hidden.dtype)


def check(inputs: Inputs, got: Tensor) -> None:
    exact = inputs.exact()
    assert got.shape == exact.shape
    if got.numel() == 0:
        return
    assert got.isfinite().all()
    error, size = rms(got.double() - exact), rms(exact)
    if got.dtype == torch.float32:
        bound = 4 * 2**-24 * math.sqrt(max(inputs.case.hidden, inputs.case.inner)) * (1 + size)
    else:
        # never below two roundings: torch may be lucky on a few elements
        bound = 1.2 * max(
            rms(inputs.by_torch().double() - exact), size * torch.finfo(got.dtype).eps
        )
    assert error <= bound, f"rms error {error:.3g} above {bound:.3g} (rms output {size:.3g})"


def rms(x: Tensor) -> float:
    return x.square().mean().sqrt().item()
