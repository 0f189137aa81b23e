"""Writes the model card from the run's log and evaluation; no measured number in it is typed.

The card is generated so that it cannot disagree with the checkpoint it lies next to: evaluate.py
publishes both.
"""

import platform
import textwrap
from itertools import pairwise
from pathlib import Path

from data import HELD_OUT, SHARES, SOURCES
from routing import TARGETS

_TARGET_NAMES = {
    "top_quarter": "top quarter of experts carries",
    "max_over_mean": "busiest expert over the mean",
    "reuse_ratio": "next-token reuse over independent",
    "domain_cosine": "popularity cosine between domains",
}


def _processor() -> str:
    lines = Path("/proc/cpuinfo").read_text().splitlines()
    names = [line.split(":")[1].strip() for line in lines if line.startswith("model name")]
    return f"{len(names)} cores {names[0]}, shared with other work" if names else platform.machine()


def _table(header: str, rows: list[list[str]]) -> str:
    columns = header.count("|") + 1
    lines = [f"| {header} |", "|" + " --- |" * columns]
    return "\n".join(lines + ["| " + " | ".join(row) + " |" for row in rows])


def _data_table(start: dict) -> str:
    rows = []
    for name, (train_tokens, held_out) in start["tokens"].items():
        source = SOURCES[name]
        rows.append(
            [
                f"{name}.txt.gz",
                source.origin,
                source.licence,
                f"{SHARES[name]:.0%}",
                f"{train_tokens:,}",
                f"{held_out:,}",
            ]
        )
    return _table("file | origin | licence | share of batch | tokens | held out", rows)


def _loss_table(losses: dict) -> str:
    rows = [
        [
            name,
            f"{row['tokens']:,}",
            f"{row['loss']:.3f}",
            f"{row['perplexity']:.1f}",
            f"{row['bits_per_byte']:.3f}",
        ]
        for name, row in losses.items()
    ]
    mean = [sum(row[k] for row in losses.values()) / len(losses) for k in ("loss", "bits_per_byte")]
    rows.append(["mean", "", f"{mean[0]:.3f}", "", f"{mean[1]:.3f}"])
    return _table(
        "domain | held-out tokens | loss, nats per token | perplexity | bits per byte", rows
    )


def _target_table(headline: dict[str, float]) -> str:
    rows = []
    for key, (low, high) in TARGETS.items():
        value = headline[key]
        target = f"{low} to {high}" if low else f"below {high}"
        rows.append(
            [_TARGET_NAMES[key], target, f"{value:.3f}", "yes" if low <= value <= high else "NO"]
        )
    return _table("measure | target | measured | met", rows)


def _routing_table(routing: dict) -> str:
    rows = []
    for name, m in [*routing["per_domain"].items(), ("all mixed", routing["mixed"])]:
        rows.append(
            [
                name,
                f"{m['top_quarter']:.0%}",
                f"{m['max_over_mean']:.2f}",
                f"{m['reuse']:.0%}",
                f"{m['independent']:.0%}",
                f"{m['reuse_ratio']:.2f}",
                f"{m['unused_experts']:.1f}",
            ]
        )
    header = "text | top quarter takes | max / mean | next token reuses | if independent | ratio"
    return _table(header + " | experts never used, per layer", rows)


def _cosine_table(cosines: dict[str, float]) -> str:
    names = list(dict.fromkeys(n for pair in cosines for n in pair.split("/")))
    rows = []
    for a in names:
        cells = [cosines.get(f"{a}/{b}", cosines.get(f"{b}/{a}")) for b in names]
        rows.append([a, *("" if c is None else f"{c:.2f}" for c in cells)])
    return _table("| " + " | ".join(names), rows)


def _history(log: list[dict]) -> str:
    """A sentence about restarts with every setting that changed; empty for a run in one piece."""
    starts = [row for row in log if row["kind"] == "start"]
    parts = []
    for before, after in pairwise(starts):
        changed = [
            f"{key} {before['recipe'].get(key, 'absent')} became {value}"
            for key, value in after["recipe"].items()
            if before["recipe"].get(key) != value
        ]
        reason = "; ".join(filter(None, (", ".join(changed), after.get("note", ""))))
        parts.append(f"at step {after['done']['step']} ({reason or 'same recipe'})")
    return f"The run was stopped and resumed {', and '.join(parts)}." if parts else ""


def _wrap(text: str) -> str:
    """Fills plain paragraphs; tables, quotes, headings and code stay as they are."""
    return "\n\n".join(
        block
        if block.startswith(("|", ">", "#", "    "))
        else textwrap.fill(block, 99, break_long_words=False, break_on_hyphens=False)
        for block in text.split("\n\n")
    )


def _quote(text: str) -> str:
    return "\n".join(f"> {line}".rstrip() for line in text.splitlines() or [""])


def _samples(samples: list[dict[str, str]]) -> str:
    parts = []
    for row in samples:
        parts.append(f"### {row['domain']}")
        for key, title in (
            ("prompt", "Prompt"),
            ("greedy", "Greedy"),
            ("sampled", "Sampled, temperature 0.8, top-p 0.95"),
        ):
            # Escaped, since GitHub would take <|user|> for markup and a line of #### for a heading.
            text = row[key].strip().replace("<", "&lt;").replace("#", "\\#")
            parts.append(f"{title}:\n\n{_quote(text)}")
    return "\n\n".join(parts)


def write_card(folder: Path, result: dict, log: list[dict]) -> None:
    """Writes README.md into the published folder.

    Args: result from evaluate.py, log rows of train.py (the last start and end rows count).
    """
    start = [row for row in log if row["kind"] == "start"][-1]
    end = [row for row in log if row["kind"] == "end"][-1]
    c, recipe = result["config"], start["recipe"]
    size = (folder / "model.safetensors").stat().st_size
    epochs = {
        name: SHARES[name] * end["tokens"] / start["tokens"][name][0] for name in start["tokens"]
    }
    expert = 3 * c["hidden_size"] * c["moe_intermediate_size"]
    idle = c["num_hidden_layers"] * (c["num_experts"] - c["num_experts_per_tok"]) * expert
    twin_error = max(row["twin_error"] for row in result["losses"].values())
    text = f"""# tiny_moe: a small real Qwen3-MoE model

A mixture-of-experts language model small enough to travel with the package and real enough to
page: trained from scratch on {end["tokens"] / 1e6:.1f} million tokens of real text, with routing
that is skewed per domain like that of published models. It is an ordinary `Qwen3MoeForCausalLM`
checkpoint. It is a demonstration: it writes recognisable prose in the styles below, it does not
know facts and it cannot do sums. This file is generated by `bench/tiny_moe/card.py` from the run's
log.

## Architecture

{result["parameters"]:,} parameters ({size:,} bytes in bf16), of which
{result["parameters"] - idle:,} work on a token. {c["num_hidden_layers"]} layers, all
mixture-of-experts: {c["num_experts"]} experts, top-{c["num_experts_per_tok"]}, inner size
{c["moe_intermediate_size"]}, one expert {2 * expert:,} bytes. Hidden size {c["hidden_size"]},
{c["num_attention_heads"]} query and {c["num_key_value_heads"]} key-value heads of {c["head_dim"]},
tied embeddings, vocabulary {c["vocab_size"]:,} (byte-level BPE, own work from the corpus;
`<|endoftext|>`, `<|pad|>`, `<|user|>`, `<|assistant|>` are ids 0 to 3). `max_position_embeddings`
is {c["max_position_embeddings"]:,}; training used sequences of {recipe["seq_len"]}, and of
{recipe["late_seq_len"]} in the last {1 - recipe["late_start"]:.0%} of the time.

Dialogue format: `<|user|>question<|assistant|>answer<|endoftext|>` (it is the tokenizer's chat
template); also used for the maths problems. Translation: `English: ...\\nGerman: ...`. Science:
`Abstract: ...\\nSummary: ...`.

## Data

{_data_table(start)}

The last {HELD_OUT:.0%} of each file's documents are held out; every number and sample below is
from them. Passes over the training part: {
        ", ".join(f"{name} {value:.1f}" for name, value in epochs.items())
    }. The weights are derived from text that includes CC BY-SA and CDLA-Sharing
material; keep the attribution above when you pass them on.

## Training

Seed {recipe["seed"]}, {end["step"]:,} steps of {recipe["tokens_per_step"]:,} tokens,
{end["seconds"] / 60:.1f} minutes wall time ({end["tokens"] / end["seconds"]:,.0f} tokens/s) on
{_processor()}, {end["threads"]} threads, torch {end["torch"]}. Muon (learning rate
{recipe["muon_lr"]}) on the matrices inside the layers, Adam ({recipe["adam_lr"]}) on embedding,
router and norms; warm-up {recipe["warmup"]:.1%}, cosine over the time budget down to
{recipe["final_lr"]:.0%}. Load-balancing loss {recipe["balance"]} per layer over domain-mixed
batches; router smoothness term {recipe["smoothness"]} after the first {recipe["smooth_start"]:.0%}
of the time. {_history(log)}

Held-out text in windows of 256 tokens, bf16 weights. On one window per domain transformers' own
forward gives the same loss within {twin_error:.4f}.

{_loss_table(result["losses"])}

## Routing against published models

{_target_table(result["routing"]["headline"])}

Measured on held-out text in windows of 256 tokens, each domain by itself; per layer, then the mean
over layers, then the mean over domains. Popularity is an expert's share of all assignments of its
layer; "independent" is what two tokens would share if drawn from that popularity; the cosine is
between popularity vectors of two domains, mean over layers and over pairs (largest pair
{result["routing"]["headline"]["domain_cosine_max"]:.2f}). The targets are the range seen in traces
of gpt-oss-20b, DeepSeek-V2-Lite and OLMoE.

{_routing_table(result["routing"])}

Popularity cosine for each pair of domains:

{_cosine_table(result["routing"]["cosines"])}

## Samples

The first fitting held-out prompt of each domain, not selected by quality.

{_samples(result["samples"])}

## Limits

A demonstration model: no knowledge, no arithmetic, German only in form, no safety training, and it
repeats phrases of its few books. Do not use its output for anything but looking at a paging engine
at work. Prompts beyond {recipe["late_seq_len"]} tokens are longer than anything it was trained on.

## Reproduce

    export MALLOC_ARENA_MAX=1
    export MALLOC_MMAP_THRESHOLD_=8000000000 MALLOC_TRIM_THRESHOLD_=8000000000
    python bench/tiny_moe/train.py --run RUN --minutes {start["minutes"]:g} \
        --top-k {c["num_experts_per_tok"]} --inner {c["moe_intermediate_size"]}
    python bench/tiny_moe/evaluate.py --run RUN

The budget is wall time, so another machine takes another number of steps and ends with other
weights."""
    (folder / "README.md").write_text(_wrap(text.strip()) + "\n", encoding="utf-8")
