"""The bench's OLMoE checkpoint as a GGUF file, the same numbers, for llama.cpp.

Matrices stay bfloat16; norms and routers are float32, as llama.cpp's own converter writes them.
Experts of a layer are one tensor [E, F, H] (down: [E, H, F]). Tensor names and metadata follow the
GGUF specification (ggml-org/ggml, docs/gguf.md) and llama.cpp's "olmoe" architecture; there is no
tokenizer, prompts are ids. Needs the gguf package; one layer's experts are in memory at a time.
"""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
from checkpoints import Spec

_DENSE = {
    "input_layernorm": "attn_norm",
    "post_attention_layernorm": "ffn_norm",
    "self_attn.q_norm": "attn_q_norm",
    "self_attn.k_norm": "attn_k_norm",
    "self_attn.q_proj": "attn_q",
    "self_attn.k_proj": "attn_k",
    "self_attn.v_proj": "attn_v",
    "self_attn.o_proj": "attn_output",
    "mlp.gate": "ffn_gate_inp",
}
_EXPERTS = {
    "gate_proj": "ffn_gate_exps",
    "up_proj": "ffn_up_exps",
    "down_proj": "ffn_down_exps",
}


def write(spec: Spec, checkpoint: Path, path: Path) -> Path:
    """Write `path` unless it is there; returns it."""
    if path.is_file():
        return path
    import gguf

    writer = gguf.GGUFWriter(path.with_suffix(".part"), "olmoe")
    writer.add_vocab_size(spec.vocab)
    writer.add_context_length(4096)
    writer.add_embedding_length(spec.hidden)
    writer.add_block_count(spec.num_layers)
    writer.add_feed_forward_length(spec.inner)
    writer.add_head_count(spec.num_heads)
    writer.add_head_count_kv(spec.num_heads)
    writer.add_layer_norm_rms_eps(1e-5)
    writer.add_rope_freq_base(10000.0)
    writer.add_expert_count(spec.num_experts)
    writer.add_expert_used_count(spec.top_k)
    writer.add_tokenizer_model("none")
    sources = list(_sources(spec))
    for name, _, shape, plain in sources:
        kind = gguf.GGMLQuantizationType.F32 if plain else gguf.GGMLQuantizationType.BF16
        num_bytes = int(np.prod(shape)) * (4 if plain else 2)
        writer.add_tensor_info(
            name, shape, np.dtype(np.float32 if plain else np.float16), num_bytes, raw_dtype=kind
        )
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_ti_data_to_file()
    files = _open(checkpoint)
    for _, keys, shape, plain in sources:
        bits = np.stack([_bits(files[key], key) for key in keys]).reshape(shape)
        writer.write_tensor_data((bits.astype(np.uint32) << 16).view(np.float32) if plain else bits)
    writer.close()
    path.with_suffix(".part").rename(path)
    return path


def _sources(spec: Spec) -> Iterator[tuple[str, list[str], tuple[int, ...], bool]]:
    """Name in the file, keys of the checkpoint, shape, and whether it is float32."""
    hidden, inner, experts = spec.hidden, spec.inner, spec.num_experts
    yield "token_embd.weight", ["model.embed_tokens.weight"], (spec.vocab, hidden), False
    yield "output_norm.weight", ["model.norm.weight"], (hidden,), True
    yield "output.weight", ["lm_head.weight"], (spec.vocab, hidden), False
    for layer in range(spec.num_layers):
        prefix = f"model.layers.{layer}"
        for name, target in _DENSE.items():
            norm = "norm" in name
            rows = experts if name == "mlp.gate" else hidden
            shape = (hidden,) if norm else (rows, hidden)
            plain = norm or name == "mlp.gate"
            yield f"blk.{layer}.{target}.weight", [f"{prefix}.{name}.weight"], shape, plain
        for name, target in _EXPERTS.items():
            keys = [f"{prefix}.mlp.experts.{e}.{name}.weight" for e in range(experts)]
            sizes = (hidden, inner) if name == "down_proj" else (inner, hidden)
            yield f"blk.{layer}.{target}.weight", keys, (experts, *sizes), False


def _open(checkpoint: Path) -> dict[str, Any]:
    """The open file of each key."""
    from safetensors import safe_open

    files = [safe_open(path, "pt") for path in sorted(checkpoint.glob("*.safetensors"))]
    return {key: file for file in files for key in file.keys()}  # noqa: SIM118, no mapping


def _bits(file: Any, key: str) -> np.ndarray[Any, np.dtype[np.uint16]]:
    """A bfloat16 tensor's bits."""
    import torch

    found: np.ndarray[Any, np.dtype[np.uint16]] = file.get_tensor(key).view(torch.uint16).numpy()
    return found
