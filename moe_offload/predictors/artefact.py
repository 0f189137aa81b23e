"""Trained predictors on disk: one safetensors file that says what it is for, and a card.

    folder/predictor.safetensors   weights in bf16; kind, shape and training facts in its metadata
    folder/README.md               the card: data, seed, steps, recall on sequences held out

Everything is checked when a file is read and when it is bound to a model: a predictor of other
experts, layers or another vocabulary would not fail, it would only be wrong.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from moe_offload.errors import PredictorError
from moe_offload.predictors.base import ModelFacts, Predictor

FILE, CARD = "predictor.safetensors", "README.md"
_KEY = "moe_offload.predictor"
_KINDS = ("rpp", "preattention", "pregate")


def save_predictor(
    folder: str | Path,
    kind: str,
    tensors: dict[str, Tensor],
    shape: dict[str, int],
    training: dict[str, Any],
    card: str,
) -> Path:
    """Write a trained predictor; returns the path of its weights.

    Args:
        kind: "rpp", "preattention" or "pregate".
        tensors: stored as bfloat16.
        shape: what the predictor must fit and how it is built (its config's fields).
        training: facts for the card, JSON-ready.
        card: text of README.md.
    """
    from safetensors.torch import save_file

    folder = Path(folder)
    folder.mkdir(parents=True, exist_ok=True)
    stored = {
        name: tensor.detach().to(torch.bfloat16).contiguous() for name, tensor in tensors.items()
    }
    about = {"kind": kind, "shape": shape, "training": training}
    save_file(stored, str(folder / FILE), metadata={_KEY: json.dumps(about)})
    (folder / FILE).chmod(0o644)  # safetensors writes files for their owner only
    (folder / CARD).write_text(card)
    return folder / FILE


def read_predictor(path: str | Path) -> tuple[dict[str, Any], dict[str, Tensor]]:
    """What a file says about itself (kind, shape, training), and its tensors as float32.

    Raises:
        PredictorError: no such file, not a safetensors file, or not a predictor of ours.
    """
    from safetensors import SafetensorError, safe_open

    file = Path(path) / FILE if Path(path).is_dir() else Path(path)
    hint = "Train one with `moe-offload train-predictor`."
    if not file.is_file():
        raise PredictorError(f"predictor: there is no file {file}. {hint}")
    try:
        with safe_open(str(file), framework="pt") as opened:
            metadata = opened.metadata() or {}
            tensors = {name: opened.get_tensor(name).float() for name in opened.keys()}  # noqa: SIM118
    except (SafetensorError, OSError) as error:
        raise PredictorError(f"predictor: {file} is not a safetensors file: {error}") from None
    try:
        about = json.loads(metadata[_KEY])
        known = about["kind"] in _KINDS and isinstance(about["shape"], dict)
    except (KeyError, TypeError, ValueError):
        known = False
    if not known:
        raise PredictorError(
            f"predictor: {file} is not a trained predictor: its header has no usable entry "
            f"{_KEY!r} (is it a model's checkpoint?). {hint}"
        )
    return about, tensors


def load_predictor(path: str | Path) -> Predictor:
    """A predictor ready to be bound; raises PredictorError as `read_predictor`."""
    about, tensors = read_predictor(path)
    if about["kind"] == "rpp":
        from moe_offload.predictors.rpp import RoutingPathPredictor

        return RoutingPathPredictor.from_tensors(about["shape"], tensors, str(path))
    if about["kind"] == "pregate":
        from moe_offload.predictors.pregate import PreGate

        return PreGate.from_tensors(about["shape"], tensors, str(path))
    from moe_offload.predictors.preattention import PreAttention

    return PreAttention.from_tensors(about["shape"], tensors, str(path))


def check_fits(who: str, shape: dict[str, int], facts: ModelFacts) -> None:
    """Refuse a predictor trained for a model of another shape.

    Raises:
        PredictorError: names every number that differs.
    """
    model = {
        "num_layers": facts.num_layers,
        "num_experts": facts.num_experts[0],
        "top_k": facts.top_k,
        "vocab_size": facts.vocab_size,
    }
    uneven = len(set(facts.num_experts)) != 1
    wrong = [
        f"{name} {shape[name]} (this model: {value})"
        for name, value in model.items()
        if name in shape and value is not None and shape[name] != value
    ]
    if wrong or uneven:
        what = ", ".join(wrong) or f"equal layers (this model: {sorted(set(facts.num_experts))})"
        raise PredictorError(
            f"{who} was trained for another model: {what}. Train one for this model with "
            "`moe-offload train-predictor`."
        )


def load_weights(module: torch.nn.Module, tensors: dict[str, Tensor], who: str) -> None:
    """`load_state_dict` with one clear error.

    Raises:
        PredictorError: tensors are missing, unknown or of another shape.
    """
    expected = {name: tuple(tensor.shape) for name, tensor in module.state_dict().items()}
    found = {name: tuple(tensor.shape) for name, tensor in tensors.items()}
    if expected != found:
        names = sorted(expected.keys() | found.keys())
        name = next(name for name in names if expected.get(name) != found.get(name))
        raise PredictorError(
            f"{who}: tensor {name} must be {expected.get(name, 'absent')}, got "
            f"{found.get(name, 'nothing')}; the file is damaged or of another version"
        )
    module.load_state_dict(tensors)
