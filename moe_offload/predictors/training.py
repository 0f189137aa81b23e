"""Train a predictor, judge it on sequences held out, and write it with a card that says so."""

from __future__ import annotations

import json
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import torch

from moe_offload.predictors.artefact import FILE, save_predictor
from moe_offload.predictors.preattention import SHAPE
from moe_offload.predictors.rpp_model import RppConfig
from moe_offload.predictors.rpp_training import (
    Sample,
    TrainingReport,
    judge_rpp,
    split_samples,
    train_rpp,
)


def train_rpp_to(
    folder: str | Path,
    samples: Sequence[Sample],
    config: RppConfig,
    *,
    data: str,
    steps: int,
    minutes: float | None = None,
    batch: int = 12,
    seed: int = 0,
    held_out: float = 0.1,
    log: Callable[[str], None] = lambda line: None,
) -> TrainingReport:
    """Train an RPP on a share of the samples, judge it on the rest, and save both facts.

    Args:
        data: what the samples are, for the card.
        held_out: share of the sequences that is only used for judging.
    """
    train, judged = split_samples(samples, held_out, seed)
    model, report = train_rpp(
        train, config, steps=steps, minutes=minutes, batch=batch, seed=seed, log=log
    )
    save_rpp(folder, model, train, judged, report, data=data, seed=seed)
    return report


def save_rpp(
    folder: str | Path,
    model: Any,
    train: Sequence[Sample],
    judged: Sequence[Sample],
    report: TrainingReport,
    *,
    data: str,
    seed: int,
) -> None:
    """Judge an RPP in the precision it is stored in, and write it with its card."""
    round_to_bf16(model)
    domains = sorted({sample.domain for sample in judged})
    report.held_out = {"all": judge_rpp(model, judged)}
    if len(domains) > 1:
        for domain in domains:
            part = [sample for sample in judged if sample.domain == domain]
            report.held_out[domain] = judge_rpp(model, part)
    training = _facts(report, data, seed, train, judged)
    card = _card("Routing Path Predictor", training, report, dict(vars(model.config)))
    save_predictor(folder, "rpp", model.state_dict(), dict(vars(model.config)), training, card)


def train_preattention_to(
    folder: str | Path,
    model: Any,
    samples: Sequence[Sample],
    *,
    num_experts: int,
    top_k: int,
    data: str,
    steps: int,
    minutes: float | None = None,
    batch: int = 8,
    seed: int = 0,
    held_out: float = 0.1,
    log: Callable[[str], None] = lambda line: None,
) -> TrainingReport:
    """Train pre-attention heads on what `model` computes for the samples' tokens, and save them."""
    from moe_offload.predictors.preattention_training import (
        judge_preattention,
        train_preattention,
    )

    train, judged = split_samples(samples, held_out, seed)
    weight, bias, report = train_preattention(
        model, train, num_experts, steps=steps, minutes=minutes, batch=batch, seed=seed, log=log
    )
    weight, bias = (tensor.to(torch.bfloat16).float() for tensor in (weight, bias))
    report.held_out = judge_preattention(model, weight, bias, judged, top_k)
    layers, reach, experts, hidden = weight.shape
    shape = dict(zip(SHAPE, (layers, experts, top_k, hidden, reach), strict=True))
    training = _facts(report, data, seed, train, judged)
    card = _card("Pre-attention heads", training, report, shape)
    tensors = {"weight": weight, "bias": bias}
    save_predictor(folder, "preattention", tensors, shape, training, card)
    return report


def train_pregate_to(
    folder: str | Path,
    model: Any,
    samples: Sequence[Sample],
    *,
    num_experts: int,
    top_k: int,
    data: str,
    steps: int,
    minutes: float | None = None,
    batch: int = 8,
    seed: int = 0,
    held_out: float = 0.1,
    log: Callable[[str], None] = lambda line: None,
) -> TrainingReport:
    """Train pre-gates on what `model` computes for the samples' tokens, and save them."""
    from moe_offload.predictors.pregate_training import train_pregates

    train, judged = split_samples(samples, held_out, seed)
    gates, report = train_pregates(
        model,
        train,
        num_experts,
        top_k,
        steps=steps,
        minutes=minutes,
        batch=batch,
        seed=seed,
        log=log,
    )
    save_pregates(folder, model, gates, train, judged, report, data=data, seed=seed)
    return report


def save_pregates(
    folder: str | Path,
    model: Any,
    gates: Any,
    train: Sequence[Sample],
    judged: Sequence[Sample],
    report: TrainingReport,
    *,
    data: str,
    seed: int,
) -> None:
    """Judge pre-gates in the precision they are stored in, and write them with their card."""
    from moe_offload.predictors.pregate_training import judge_pregates

    round_to_bf16(gates)
    report.held_out = judge_pregates(model, gates, judged)
    training = _facts(report, data, seed, train, judged)
    shape = dict(vars(gates.shape))
    card = _card("Pre-gates", training, report, shape)
    save_predictor(folder, "pregate", gates.state_dict(), shape, training, card)


def round_to_bf16(module: Any) -> None:
    """Parameters as they are stored."""
    with torch.no_grad():
        for tensor in module.parameters():
            tensor.copy_(tensor.to(torch.bfloat16))


def _facts(
    report: TrainingReport, data: str, seed: int, train: Sequence[Sample], judged: Sequence[Sample]
) -> dict[str, Any]:
    return {
        "data": data,
        "seed": seed,
        "steps": report.steps,
        "minutes": round(report.seconds / 60, 1),
        "tokens_seen": report.tokens_seen,
        "train_sequences": len(train),
        "train_tokens": report.train_tokens,
        "held_out_sequences": len(judged),
        "loss": round(report.loss, 4),
        "held_out": report.held_out,
    }


def _card(
    title: str, training: dict[str, Any], report: TrainingReport, shape: dict[str, int]
) -> str:
    lines = [
        f"# {title}",
        "",
        "Predicts which experts a Mixture-of-Experts model will use next, for prefetching only: it",
        "cannot change what the model computes. Written by its training run; the weights (bf16)",
        f"are in `{FILE}`, whose header holds the same facts.",
        "",
        f"- data: {training['data']}",
        f"- sequences: {training['train_sequences']} to learn from "
        f"({training['train_tokens']} tokens), {training['held_out_sequences']} held out",
        f"- {training['steps']} steps, {training['tokens_seen']} tokens seen, "
        f"{training['minutes']} minutes, seed {training['seed']}, "
        f"last training loss {training['loss']}",
        f"- shape: {json.dumps(shape)}",
        "",
        "## Recall on the sequences held out",
        "",
        "Recall@k per token: of the A experts a token used in a layer, the share among the k",
        "named for that token. Batch recall (the measure of arXiv 2410.17954): both sides are",
        "united over the tokens of a step first, so its candidate set grows with the batch; it is",
        "given beside it.",
    ]
    for name, found in report.held_out.items():
        lines += ["", f"### {name}", "", *_recall_lines(found)]
    return "\n".join(lines) + "\n"


def _recall_lines(found: Any) -> list[str]:
    per_token = [key for key in found if key.startswith("recall@") and not key.endswith("layer")]
    lines = [f"{found['tokens']} tokens, A = {found['top_k']} of {found['num_experts']}."]
    lines += ["", "| measure | mean | per layer |", "| --- | --- | --- |"]
    for key in per_token:
        layers = " ".join(f"{100 * value:.0f}" for value in found[f"{key}_per_layer"])
        lines.append(f"| {key} per token | {100 * found[key]:.1f} % | {layers} |")
    if found["batch"]:
        lines += [
            "",
            "| batch | named per token | candidate set | experts used | recall | precision |",
            "| --- | --- | --- | --- | --- | --- |",
        ]
        lines += [
            f"| {row['batch']} | {row['candidates_per_token']} | {row['candidate_set']:.1f} | "
            f"{row['experts_used']:.1f} | {100 * row['recall']:.1f} % | "
            f"{100 * row['precision']:.1f} % |"
            for row in found["batch"]
        ]
    return lines
