"""Random experts, their plain PyTorch twin, and page files for the tests of the core."""

from __future__ import annotations

import types
from pathlib import Path

import torch
from torch import Tensor

from moe_offload.expert_layer import ExpertLayer
from moe_offload.functional import expert_ffn
from moe_offload.layer import OffloadedExperts, _as_layer
from moe_offload.sources import FilePages, Piece


def random_weights(
    num_experts: int,
    hidden: int,
    inner: int,
    dtype: torch.dtype = torch.float32,
    *,
    gate: bool = True,
    bias: bool = False,
    seed: int = 0,
) -> dict[str, Tensor]:
    generator = torch.Generator().manual_seed(seed)

    def make(*shape: int) -> Tensor:
        return (torch.randn(shape, generator=generator) * 0.2).to(dtype)

    up = "gate_up_proj" if gate else "up_proj"
    rows = 2 * inner if gate else inner
    weights = {up: make(num_experts, rows, hidden), "down_proj": make(num_experts, hidden, inner)}
    if bias:
        weights[f"{up}_bias"] = make(num_experts, rows)
        weights["down_proj_bias"] = make(num_experts, hidden)
    return weights


def random_routing(
    tokens: int, num_experts: int, top_k: int, generator: torch.Generator
) -> tuple[Tensor, Tensor]:
    scores = torch.randn(tokens, num_experts, generator=generator).softmax(-1)
    weights, ids = scores.topk(top_k, dim=-1)
    return ids, weights


def reference(
    weights: dict[str, Tensor], hidden: Tensor, ids: Tensor, topk_weights: Tensor
) -> Tensor:
    """The definition in fp64: sum over a token's experts of weight * down(act(gate) * up)."""
    gated = "gate_up_proj" in weights
    up_name = "gate_up_proj" if gated else "up_proj"
    exact = {name: tensor.double() for name, tensor in weights.items()}
    out = torch.zeros(hidden.shape[0], weights["down_proj"].shape[1], dtype=torch.float64)
    for token in range(hidden.shape[0]):
        for rank in range(ids.shape[1]):
            expert = int(ids[token, rank])
            if not 0 <= expert < weights["down_proj"].shape[0]:
                continue
            inner = exact[up_name][expert] @ hidden[token].double()
            if f"{up_name}_bias" in exact:
                inner = inner + exact[f"{up_name}_bias"][expert]
            if gated:
                gate, up = inner.chunk(2)
                inner = torch.nn.functional.silu(gate) * up
            else:
                inner = torch.nn.functional.silu(inner)
            result = exact["down_proj"][expert] @ inner
            if "down_proj_bias" in exact:
                result = result + exact["down_proj_bias"][expert]
            out[token] += topk_weights[token, rank].double() * result
    return out


def resident(
    weights: dict[str, Tensor],
    hidden: Tensor,
    ids: Tensor,
    topk_weights: Tensor,
    backend: str = "native",
) -> Tensor:
    """The same backend on whole, resident weights; grouped_mm is transformers' own forward."""
    if backend == "native":
        first = "gate_up_proj" if "gate_up_proj" in weights else "up_proj"
        return expert_ffn(
            *(hidden, weights[first], weights["down_proj"], ids, topk_weights),
            backend="native",
            gate_up_bias=weights.get(f"{first}_bias"),
            down_bias=weights.get("down_proj_bias"),
        )
    from transformers.integrations.moe import _default_apply_gate, grouped_mm_experts_forward

    module = types.SimpleNamespace(
        **weights,
        num_experts=weights["down_proj"].shape[0],
        has_gate="gate_up_proj" in weights,
        has_bias="down_proj_bias" in weights,
        is_transposed=False,
        act_fn=torch.nn.functional.silu,
    )
    module._apply_gate = lambda x: _default_apply_gate(module, x)
    return grouped_mm_experts_forward(module, hidden, ids, topk_weights)


def write_page_file(
    path: Path, layers: list[dict[str, Tensor]]
) -> tuple[list[ExpertLayer], FilePages]:
    """Lay all experts of all layers in one raw file, each section at an odd offset."""
    pages, described = FilePages(), []
    with path.open("wb") as file:
        for index, weights in enumerate(layers):
            described.append(_as_layer(weights, f"layers.{index}.experts"))
            for expert in range(weights["down_proj"].shape[0]):
                pieces = []
                for name, tensor in weights.items():
                    file.write(b"\0" * 13)
                    raw = tensor[expert].contiguous().view(torch.uint8).numpy().tobytes()
                    half = len(raw) // 2
                    for start, part in ((0, raw[:half]), (half, raw[half:])):
                        pieces.append(Piece(name, start, str(path), file.tell(), len(part)))
                        file.write(part)
                pages.add(index, expert, pieces)
    return described, pages


__all__ = [
    "OffloadedExperts",
    "random_routing",
    "random_weights",
    "reference",
    "resident",
    "write_page_file",
]
