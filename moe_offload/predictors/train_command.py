"""`moe-offload train-predictor`: traces in, a folder with a predictor and its card out."""

from __future__ import annotations

import argparse
import importlib
import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np

from moe_offload.errors import PredictorError
from moe_offload.predictors.artefact import FILE
from moe_offload.predictors.rpp_model import RppConfig
from moe_offload.predictors.rpp_training import Sample
from moe_offload.predictors.training import train_preattention_to, train_rpp_to

_MIN_DECODED = 4
_DECODE = 1  # a trace's phase of a row that was decoded


def samples_from_trace(trace: Any, domain: str = "") -> list[Sample]:
    """The sequences of a trace, each split into its prompt and what was decoded.

    A sequence that was only ever read as a prompt (teacher-forced text) is split after its first
    quarter, at most 64 tokens. Sequences without token ids or with under 4 decoded tokens are
    left out.
    """
    samples = []
    order = np.argsort(trace.sequence, kind="stable")
    keys, starts = np.unique(trace.sequence[order], return_index=True)
    for key, rows in zip(keys, np.split(order, starts[1:]), strict=True):
        tokens = trace.token_id[rows]
        if key < 0 or (tokens < 0).any():
            continue
        decoded = np.flatnonzero(trace.phase[rows] == _DECODE)
        cut = int(decoded[0]) if len(decoded) else min(64, len(rows) // 4)
        cut = max(cut, 1)
        if len(rows) - cut >= _MIN_DECODED:
            experts = trace.ids[rows[cut:]]
            samples.append(Sample(tokens[:cut], tokens[cut:], experts, domain))
    return samples


def train_predictor(args: argparse.Namespace) -> int:
    """The command. Returns its exit code."""
    from moe_offload.cli_generate import quiet

    quiet()
    if args.kind == "preattention" and args.model is None:
        raise PredictorError(
            "preattention reads the layers of a model: give --model (and --trace or --prompts)"
        )
    if not args.trace and (args.model is None or args.prompts is None):
        raise PredictorError(
            "nothing to learn from: give --trace F, or --model MODEL and --prompts F to record one"
        )
    if args.prompts is not None and not Path(args.prompts).is_file():
        raise PredictorError(f"train-predictor: there is no file {args.prompts}")
    model, facts = (None, None) if args.model is None else _load(args)
    samples, num_experts, top_k, vocab = _gather(args, model, facts)
    say = print if not args.json else (lambda line: None)
    options = {
        "data": args.data or _describe(args),
        "steps": args.steps,
        "minutes": args.minutes,
        "batch": args.batch,
        "seed": args.seed,
        "held_out": args.held_out,
        "log": lambda line: say(line),
    }
    if args.kind == "rpp":
        config = RppConfig(vocab, len(num_experts), num_experts[0], top_k)
        report = train_rpp_to(args.out, samples, config, **options)
    else:
        report = train_preattention_to(
            args.out, model, samples, num_experts=num_experts[0], top_k=top_k, **options
        )
    if args.json:
        print(json.dumps({"out": str(args.out), "steps": report.steps, **report.held_out}))
    else:
        print(f"wrote {args.out}/{FILE} and its card")
    return 0


def _describe(args: argparse.Namespace) -> str:
    parts = [f"trace {Path(path).name}" for path in args.trace]
    if args.prompts:
        parts.append(
            f"{Path(args.prompts).name}, continued by {args.model} for {args.max_new_tokens} tokens"
        )
    return "; ".join(parts)


def _load(args: argparse.Namespace) -> tuple[Any, Any]:
    import moe_offload
    from moe_offload.cli_generate import resolve_model
    from moe_offload.predictors.base import facts_of

    model = moe_offload.from_pretrained(resolve_model(args.model), device_budget=args.device_budget)
    layers = moe_offload.get_offloader(model).layers
    facts = facts_of(
        model, [layer.num_experts for layer in layers], [layer.name for layer in layers]
    )
    return model, facts


def _gather(
    args: argparse.Namespace, model: Any, facts: Any
) -> tuple[list[Sample], Sequence[int], int, int]:
    """Samples and the shape they have: experts per layer, A, vocabulary."""
    samples: list[Sample] = []
    num_experts: Sequence[int] | None = None if facts is None else facts.num_experts
    for path in args.trace:
        trace = _read_trace(path)
        num_experts = list(trace.num_experts) if num_experts is None else num_experts
        trace.check_model(num_experts)
        samples += samples_from_trace(trace, Path(path).stem)
    if args.prompts is not None and model is not None:
        samples += record_prompts(args, model)
    assert num_experts is not None, "a trace or a model was given"
    if len(set(num_experts)) != 1:
        raise PredictorError(
            "train-predictor: expected the same number of experts in every layer, got "
            f"{sorted(set(num_experts))}"
        )
    if not samples:
        raise PredictorError(
            "train-predictor: the trace has no sequence with token ids and at least "
            f"{_MIN_DECODED} decoded tokens, so there is nothing to learn from"
        )
    seen = 1 + max(int(max(s.prompt.max(), s.decoded.max())) for s in samples)
    vocab = seen if facts is None or facts.vocab_size is None else facts.vocab_size
    return samples, num_experts, int(samples[0].experts.shape[2]), vocab


def _read_trace(path: str) -> Any:
    """A trace file of this package, or of a known foreign format."""
    return importlib.import_module("moe_offload.trace_files").read_trace(path)


def record_prompts(args: argparse.Namespace, model: Any) -> list[Sample]:
    """Let the model continue each line of the prompts file, and keep its routing."""
    from moe_offload.cli_generate import load_tokenizer, resolve_model
    from moe_offload.huggingface.observe import observe
    from moe_offload.predictors.oracle import CallRecorder

    prompts = [line for line in Path(args.prompts).read_text().splitlines() if line.strip()]
    if not prompts:
        raise PredictorError(f"train-predictor: {args.prompts} has no prompts; one per line")
    tokenizer = load_tokenizer(resolve_model(args.model))
    samples = []
    for prompt in prompts:
        ids = tokenizer(prompt, return_tensors="pt", return_token_type_ids=False)
        recorder = CallRecorder()
        with observe(model, recorder):
            model.generate(**ids, max_new_tokens=args.max_new_tokens)
        first, *decoded = recorder.calls
        if first.input_ids is not None and len(decoded) >= _MIN_DECODED:
            tokens = np.array([int(call.input_ids[0, 0]) for call in decoded])  # type: ignore[index]
            layers = range(len(first.experts))
            experts = np.stack([[call.experts[i][0] for i in layers] for call in decoded])
            samples.append(Sample(first.input_ids[0], tokens, experts, "recorded"))
    return samples
