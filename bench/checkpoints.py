"""Random-weight checkpoints in the hub's layout, written without holding them in memory.

OLMoE-1B-7B's layer (64 experts, top-8, H 2048, F 1024, bf16) with fewer layers and a smaller
vocabulary, or Qwen3-30B-A3B whole. Per-expert tensors in name order, as in the published shards, so
one expert's three matrices are neighbours in a file. Weights are Gaussian, scaled so that each
block changes the residual stream by about its own size: otherwise every layer routes on the token's
embedding alone and greedy text falls into a loop within a few tokens. Routing is close to uniform,
which is the hardest case for a cache: the expected hit rate is slots / pages and no policy can beat
it.

    python bench/checkpoints.py FOLDER [--quick | --qwen3]
"""

from __future__ import annotations

import argparse
import json
import math
import os
import zlib
from collections.abc import Iterable
from dataclasses import asdict, dataclass
from functools import lru_cache
from pathlib import Path
from typing import Any

import numpy as np

SPEC_NAME = "bench_spec.json"


@dataclass(frozen=True)
class Spec:
    """Shape of a checkpoint. Sizes are in elements; `max_shard_bytes` as in save_pretrained.

    Attributes:
        family: "olmoe" or "qwen3_moe", which has fewer key than query heads, norms per head, and
            routing weights that add up to one.
        num_kv_heads, head_dim: 0: num_heads; hidden / num_heads.
        table: weights are slices of one table of so many Gaussian numbers, from random places; 0:
            every weight is drawn by itself, which takes minutes for each ten gigabytes.
    """

    num_layers: int = 4
    num_experts: int = 64
    top_k: int = 8
    hidden: int = 2048
    inner: int = 1024
    num_heads: int = 16
    vocab: int = 8192
    max_shard_bytes: int = 1_500_000_000
    seed: int = 0
    family: str = "olmoe"
    num_kv_heads: int = 0
    head_dim: int = 0
    table: int = 0

    @property
    def head_size(self) -> int:
        return self.head_dim or self.hidden // self.num_heads

    @property
    def kv_heads(self) -> int:
        return self.num_kv_heads or self.num_heads

    @property
    def page_bytes(self) -> int:
        return 3 * self.hidden * self.inner * 2

    @property
    def expert_bytes(self) -> int:
        return self.num_layers * self.num_experts * self.page_bytes

    @property
    def dense_bytes(self) -> int:
        return sum(
            math.prod(shape) * 2
            for name, (shape, _) in tensors(self).items()
            if ".experts." not in name
        )


QUICK = Spec(num_layers=2, num_experts=8, top_k=2, hidden=128, inner=64, num_heads=4, vocab=256)

QWEN3_30B = Spec(
    family="qwen3_moe",
    num_layers=48,
    num_experts=128,
    inner=768,
    num_heads=32,
    num_kv_heads=4,
    head_dim=128,
    vocab=151_936,
    max_shard_bytes=4_000_000_000,
    table=1 << 26,
)


def tensors(spec: Spec) -> dict[str, tuple[tuple[int, ...], float]]:
    """`{name: (shape, standard deviation)}` in name order; 0.0 means all ones (norm weights)."""
    hidden, inner = spec.hidden, spec.inner
    query, key = spec.num_heads * spec.head_size, spec.kv_heads * spec.head_size
    fan_in, fan_inner = hidden**-0.5, inner**-0.5  # unit-variance output for a normalised input
    if spec.family == "olmoe":
        # top-k weights are small because OLMoE does not renormalise them
        norms, out, down = (query, key), query**-0.5, 16 * fan_inner
    else:
        # Attention adds what all tokens share: at full size it makes them alike after some layers,
        # and a prompt would need few experts.
        norms, out, down = (spec.head_size, spec.head_size), 0.2 * query**-0.5, 2 * fan_inner
    found: dict[str, tuple[tuple[int, ...], float]] = {
        "lm_head.weight": ((spec.vocab, hidden), fan_in),
        "model.embed_tokens.weight": ((spec.vocab, hidden), 0.5),
        "model.norm.weight": ((hidden,), 0.0),
    }
    for layer in range(spec.num_layers):
        prefix = f"model.layers.{layer}."
        for name in ("input_layernorm", "post_attention_layernorm"):
            found[f"{prefix}{name}.weight"] = ((hidden,), 0.0)
        for name, size in zip(("q_norm", "k_norm"), norms, strict=True):
            found[f"{prefix}self_attn.{name}.weight"] = ((size,), 0.0)
        for name, size in (("q_proj", query), ("k_proj", key), ("v_proj", key)):
            found[f"{prefix}self_attn.{name}.weight"] = ((size, hidden), fan_in)
        found[f"{prefix}self_attn.o_proj.weight"] = ((hidden, query), out)
        # logits of about unit variance: the chosen experts share about a third of the weight
        found[f"{prefix}mlp.gate.weight"] = ((spec.num_experts, hidden), fan_in)
        for expert in range(spec.num_experts):
            part = f"{prefix}mlp.experts.{expert}."
            for name in ("gate_proj", "up_proj"):
                found[f"{part}{name}.weight"] = ((inner, hidden), fan_in)
            found[f"{part}down_proj.weight"] = ((hidden, inner), down)
    return dict(sorted(found.items()))


def _config(spec: Spec) -> dict[str, object]:
    olmoe = spec.family == "olmoe"
    return {
        "architectures": ["OlmoeForCausalLM" if olmoe else "Qwen3MoeForCausalLM"],
        "model_type": spec.family,
        "dtype": "bfloat16",
        "vocab_size": spec.vocab,
        "hidden_size": spec.hidden,
        **({} if olmoe else {"moe_intermediate_size": spec.inner, "head_dim": spec.head_size}),
        "intermediate_size": spec.inner,
        "num_hidden_layers": spec.num_layers,
        "num_attention_heads": spec.num_heads,
        "num_key_value_heads": spec.kv_heads,
        "num_experts": spec.num_experts,
        "num_experts_per_tok": spec.top_k,
        "norm_topk_prob": not olmoe,
        "max_position_embeddings": 4096,
        "tie_word_embeddings": False,
        "bos_token_id": None,
        "eos_token_id": None,
        "pad_token_id": None,
    }


def write(spec: Spec, folder: str | os.PathLike[str]) -> Path:
    """Write the checkpoint unless this very one is there already; needs memory for one tensor."""
    path = Path(folder)
    stamp = path / SPEC_NAME
    wanted = json.dumps(asdict(spec))
    if stamp.is_file() and stamp.read_text() == wanted:
        return path
    path.mkdir(parents=True, exist_ok=True)
    for old in path.glob("*.safetensors*"):
        old.unlink()
    shards = _split(spec)
    weight_map: dict[str, str] = {}
    for number, names in enumerate(shards, start=1):
        file_name = (
            "model.safetensors"
            if len(shards) == 1
            else f"model-{number:05d}-of-{len(shards):05d}.safetensors"
        )
        _write_shard(spec, path / file_name, names)
        weight_map.update(dict.fromkeys(names, file_name))
    if len(shards) > 1:
        index = {"metadata": {"total_size": _size(spec, weight_map)}, "weight_map": weight_map}
        (path / "model.safetensors.index.json").write_text(json.dumps(index))
    (path / "config.json").write_text(json.dumps(_config(spec), indent=2))
    stamp.write_text(wanted)
    return path


def _size(spec: Spec, names: Iterable[str]) -> int:
    shapes = tensors(spec)
    return sum(math.prod(shapes[name][0]) * 2 for name in names)


def _split(spec: Spec) -> list[list[str]]:
    """Names per shard, filled in name order."""
    shards: list[list[str]] = [[]]
    used = 0
    for name, (shape, _) in tensors(spec).items():
        nbytes = math.prod(shape) * 2
        if shards[-1] and used + nbytes > spec.max_shard_bytes:
            shards.append([])
            used = 0
        shards[-1].append(name)
        used += nbytes
    return shards


def _write_shard(spec: Spec, path: Path, names: list[str]) -> None:
    """Format: 8-byte header length, JSON header, tensors back to back."""
    shapes = tensors(spec)
    header: dict[str, object] = {"__metadata__": {"format": "pt"}}
    position = 0
    for name in names:
        shape = shapes[name][0]
        end = position + math.prod(shape) * 2
        header[name] = {"dtype": "BF16", "shape": list(shape), "data_offsets": [position, end]}
        position = end
    raw = json.dumps(header, separators=(",", ":")).encode()
    raw += b" " * (
        -len(raw) % 8
    )  # the reference writer pads to 8 bytes; offsets stay odd on purpose
    with open(path, "wb") as file:
        file.write(len(raw).to_bytes(8, "little") + raw)
        for name in names:
            shape, std = shapes[name]
            file.write(_values(spec, name, shape, std))
        file.flush()
        os.fsync(file.fileno())


def _values(spec: Spec, name: str, shape: tuple[int, ...], std: float) -> memoryview:
    """A tensor's bytes in bfloat16."""
    if std == 0.0:
        return _rounded(np.ones(shape, dtype=np.float32))
    rng = np.random.default_rng([spec.seed, zlib.crc32(name.encode())])
    if spec.table == 0:
        return _rounded(rng.standard_normal(shape, dtype=np.float32) * np.float32(std))
    table, count = _table(spec.table, spec.seed, std), math.prod(shape)
    piece = spec.table // 2
    starts = rng.integers(0, spec.table - piece, size=-(-count // piece))
    if len(starts) == 1:
        return table[starts[0] : starts[0] + count].data
    return np.concatenate([table[start : start + piece] for start in starts])[:count].data


@lru_cache(maxsize=8)
def _table(size: int, seed: int, std: float) -> np.ndarray[Any, Any]:
    rng = np.random.default_rng(seed)
    values = rng.standard_normal(size, dtype=np.float32)
    return np.frombuffer(_rounded(values * np.float32(std)), dtype=np.uint16)


def _rounded(values: np.ndarray[Any, Any]) -> memoryview:
    """float32 as bfloat16: rounded to nearest even, lower half cut off."""
    bits = values.view(np.uint32)
    bits += 0x7FFF + ((bits >> 16) & 1)
    return np.ascontiguousarray(bits.view(np.uint16).reshape(-1)[1::2]).data


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawTextHelpFormatter
    )
    parser.add_argument("folder", type=Path)
    parser.add_argument("--quick", action="store_true", help="a checkpoint of 1 MB")
    parser.add_argument("--qwen3", action="store_true", help="Qwen3-30B-A3B's shape, 61 GB")
    arguments = parser.parse_args()
    spec = QUICK if arguments.quick else QWEN3_30B if arguments.qwen3 else Spec()
    write(spec, arguments.folder)


if __name__ == "__main__":
    main()
