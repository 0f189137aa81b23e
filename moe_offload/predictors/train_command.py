"""`moe-offload train-predictor`: traces in, a folder with a predictor and its card out."""

from __future__ import annotations

import argparse
import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np

from moe_offload.errors import PredictorError
from moe_offload.predictors.artefact import FILE
from moe_offload.predictors.rpp_model import RppConfig
from moe_offload.predictors.rpp_training import Sample
from moe_offload.predictors.training import (
    train_preattention_to,
    train_pregate_to,
    train_rpp_to,
)
from moe_offload.trace_files import read_trace
from moe_offload.traces import DECODE, Trace

_MIN_DECODED = 4


def samples_from_trace(trace: Trace, domain: str = "") -> list[Sample]:
    """The sequences of a trace, each split into its prompt and what was decoded.

    A sequence that was only ever read as a prompt (teacher-forced text) is split after its first
    quarter, at most 64 tokens. Sequences without token ids, with a row that no expert was chosen
    for, or with under 4 decoded tokens are left out.
    """
    samples = []
    order = np.argsort(trace.sequence, kind="stable")
    keys, starts = np.unique(trace.sequence[order], return_index=True)
    for key, rows in zip(keys, np.split(order, starts[1:]), strict=True):
        tokens = trace.token_id[rows]
        if key < 0 or (tokens < 0).any() or (trace.ids[rows] < 0).any():
            continue
        decoded = np.flatnonzero(trace.phase[rows] == DECODE)
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
    if args.kind != "rpp" and args.model is None:
        raise PredictorError(
            f"{args.kind} reads the layers of a model: give --model (and --trace or --prompts)"
        )
    if not args.trace and (args.model is None or args.prompts is None):
        raise PredictorError(
            "nothing to learn from: give --trace F, or --model MODEL and --prompts F to record one"
        )
    if args.prompts is not None and args.model is None:
        raise PredictorError("--prompts are continued by a model: give --model MODEL too")
    if args.prompts is not None and not Path(args.prompts).is_file():
        raise PredictorError(f"train-predictor: there is no file {args.prompts}")
    if Path(args.out).exists() and not Path(args.out).is_dir():
        raise PredictorError(f"train-predictor: --out {args.out} is a file; name a folder")
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
        "log": say,
    }
    if args.kind == "rpp":
        if args.model is None:
            say(f"{vocab} token ids, counted in the trace: give --model to match a model's number")
        config = RppConfig(vocab, len(num_experts), num_experts[0], top_k)
        report = train_rpp_to(args.out, samples, config, **options)
    else:
        train_to = train_preattention_to if args.kind == "preattention" else train_pregate_to
        report = train_to(
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
        trace = read_trace(path)
        num_experts = trace.num_experts if num_experts is None else num_experts
        trace.check_model(num_experts, "the first trace" if facts is None else args.model)
        samples += samples_from_trace(trace, Path(path).stem)
    if args.prompts is not None:
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
    choices = {sample.experts.shape[2] for sample in samples}
    if facts is not None and facts.top_k is not None:
        choices.add(facts.top_k)
    if len(choices) != 1:
        raise PredictorError(
            "train-predictor: the traces (and the model) must use the same number of experts per "
            f"token, got {sorted(choices)}"
        )
    seen = 1 + max(int(max(s.prompt.max(), s.decoded.max())) for s in samples)
    vocab = seen if facts is None or facts.vocab_size is None else facts.vocab_size
    if seen > vocab:
        raise PredictorError(
            f"train-predictor: a trace has token id {seen - 1}, but {args.model} has {vocab} "
            "tokens; it is of another model"
        )
    return samples, num_experts, choices.pop(), vocab


def record_prompts(args: argparse.Namespace, model: Any) -> list[Sample]:
    """Let the model continue each line of the prompts file, and keep its routing."""
    import moe_offload
    from moe_offload.cli_generate import encode, load_tokenizer, resolve_model

    prompts = [line for line in Path(args.prompts).read_text().splitlines() if line.strip()]
    if not prompts:
        raise PredictorError(f"train-predictor: {args.prompts} has no prompts; one per line")
    tokenizer = load_tokenizer(resolve_model(args.model))
    inputs = [encode(tokenizer, line, model.config, args.max_new_tokens) for line in prompts]
    with moe_offload.record(model) as trace:
        for ids in inputs:
            model.generate(**ids, max_new_tokens=args.max_new_tokens, do_sample=False)
    return samples_from_trace(trace, "recorded")
