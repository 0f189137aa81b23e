"""Readers of routing traces that others published, into `Trace`.

Formats are recognised by the arrays a file holds. docs/traces.md says where the files come from and
what their rows mean.
"""

from __future__ import annotations

import zipfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np

from moe_offload.errors import TraceError
from moe_offload.traces import DECODE, Trace, _trace

_ESFT_TASKS = ("intent", "law", "summary", "translation")


def read_trace(path: str | Path) -> Trace:
    """Read a trace: a file of this package, or one of the known published ones.

    Args:
        path: an .npz. `file.npz#law` takes one task of a DeepSeek-V2-Lite (ESFT) file, `#0-1000`
            the rows [0, 1000) of any.

    Raises:
        TraceError: unknown format, no such task or rows, incomplete or inconsistent.
        FileNotFoundError: no such file.
    """
    name, _, part = str(path).partition("#")
    if not Path(name).is_file():
        raise FileNotFoundError(f"{name}: no such trace file")
    try:
        with np.load(name, allow_pickle=False) as arrays:
            files = set(arrays.files)
    except (OSError, ValueError, zipfile.BadZipFile, EOFError) as error:
        raise TraceError(f"{name}: not an .npz file: {error}") from error
    readers: list[tuple[bool, Callable[[str, str], Trace]]] = [
        ({"expert_ids", "n_decode", "prompt_len"} <= files, read_gpt_oss),
        (any(f"{task}_ids" in files for task in _ESFT_TASKS), read_esft),
        ("seq0_router_logits" in files, read_switch),
    ]
    reader = next((read for fits, read in readers if fits), None)
    try:
        trace = Trace.load(name) if reader is None else reader(name, part)
    except KeyError as error:
        raise TraceError(f"{name}: {error.args[0]}") from error
    if part and not (reader is read_esft and part in _ESFT_TASKS):
        first, dash, last = part.partition("-")
        if not (dash and first.isdecimal() and last.isdecimal()):
            known = ", ".join(_ESFT_TASKS) if reader is read_esft else "rows such as 0-1000"
            raise TraceError(f"{name}: cannot take the part {part!r}; expected {known}")
        trace = trace.rows(slice(int(first), int(last)))
    return trace.check(str(path))


def read_gpt_oss(path: str, part: str = "") -> Trace:
    """gpt-oss-20b decode routing (GPT-OSS-MoE-ExpertFingerprinting): 24 layers of 32, top 4.

    Row t of a generation is the routing while token `prompt_len + t` is fed; token ids are those of
    the file's local vocabulary. Weights come from the file beside it, when it is there.
    """
    with np.load(path, allow_pickle=False) as arrays:
        ids, counts = arrays["expert_ids"], arrays["n_decode"]
        starts = np.cumsum(arrays["n_tokens"]) - arrays["n_tokens"]
        local = np.arange(len(ids)) - np.repeat(np.cumsum(counts) - counts, counts)
        fed = np.repeat(starts + arrays["prompt_len"], counts) + local
        tokens = arrays["token_ids"][np.minimum(fed, len(arrays["token_ids"]) - 1)]
    beside = Path(path).with_name(Path(path).name.replace("_ids", "_weights_u8"))
    weights: Any = None
    if beside != Path(path) and beside.is_file():
        with np.load(beside, allow_pickle=False) as arrays:
            weights = (arrays["weights_u8"] / np.float16(255)).astype(np.float16)
    return _decode_only(ids, weights, counts, tokens, [32] * ids.shape[1], "gpt-oss-20b")


def read_esft(path: str, part: str = "") -> Trace:
    """DeepSeek-V2-Lite routing over whole sequences (ESFT): 26 layers of 64, top 6; four tasks.

    Rows are taken as decode steps, one token each. No tokens in the source.
    """
    tasks = [part] if part in _ESFT_TASKS else list(_ESFT_TASKS)
    with np.load(path, allow_pickle=False) as arrays:
        ids = np.concatenate([arrays[f"{task}_ids"] for task in tasks])
        weights = np.concatenate([arrays[f"{task}_weights_u8"] for task in tasks])
        counts = np.concatenate([arrays[f"{task}_seq_len"] for task in tasks])
    order = np.argsort(-weights.astype(np.int16), axis=2, kind="stable")  # source order is not
    ids = np.take_along_axis(ids, order, 2)
    weights = (np.take_along_axis(weights, order, 2) / np.float16(255)).astype(np.float16)
    name = "DeepSeek-V2-Lite " + "+".join(tasks)
    return _decode_only(ids, weights, counts, None, [64] * ids.shape[1], name)


def read_switch(path: str, part: str = "") -> Trace:
    """Switch-base-32 decoder routing on two CNN/DailyMail summaries: 6 layers of 32, top 1."""
    with np.load(path, allow_pickle=False) as arrays:
        sequences = [f"seq{i}" for i in range(len(arrays.files)) if f"seq{i}_expert_ids" in arrays]
        ids = np.concatenate([arrays[f"{name}_expert_ids"] for name in sequences])[..., None]
        logits = np.concatenate([arrays[f"{name}_router_logits"] for name in sequences])
        tokens = np.concatenate([arrays[f"{name}_output_token_ids"] for name in sequences])
        counts = np.array([len(arrays[f"{name}_expert_ids"]) for name in sequences])
    scores = np.exp(logits.astype(np.float64) - logits.max(axis=-1, keepdims=True))
    weights = np.take_along_axis(scores / scores.sum(-1, keepdims=True), ids.astype(np.int64), 2)
    return _decode_only(ids, weights, counts, tokens, [32] * ids.shape[1], "Switch-base-32")


def _decode_only(
    ids: Any, weights: Any, counts: Any, tokens: Any, num_experts: list[int], model: str
) -> Trace:
    rows = len(ids)
    return _trace(
        ids,
        weights,
        np.repeat(np.arange(len(counts)), counts),
        np.full(rows, -1) if tokens is None else tokens,
        np.full(rows, DECODE),
        np.arange(rows),
        num_experts,
        model=model,
    )
