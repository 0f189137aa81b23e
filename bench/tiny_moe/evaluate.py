"""Judges a finished run on all held-out text and publishes checkpoint, card and demo prompts.

What is judged is the published folder itself, loaded back through AutoModelForCausalLM in bf16,
not the trainer's fp32 weights. Losses come from the training twin (fast_forward.py) on those
weights; one window per domain also goes through transformers' own forward, and the largest
difference is reported so that the twin can be trusted.
"""

import argparse
import json
import math
import shutil
from pathlib import Path

import torch
from card import write_card
from data import ASSISTANT, END, PAD, SOURCES, USER, Domain, load_corpus
from fast_forward import forward, rope_table, token_loss
from routing import TARGETS, routing_report
from samples import prompts, write_samples
from tokenizers import Tokenizer
from torch import Tensor
from transformers import (
    AutoModelForCausalLM,
    AutoTokenizer,
    GenerationConfig,
    PreTrainedModel,
    PreTrainedTokenizerFast,
)

REPO = Path(__file__).resolve().parents[2]
WINDOW = 256
PROMPTS_PER_DOMAIN = {"books": 2, "plays": 2, "stories": 2, "math": 2, "chat_dolly": 2}
CHAT_TEMPLATE = (
    "{% for m in messages %}"
    "{% if m['role'] == 'assistant' %}<|assistant|>{{ m['content'] }}<|endoftext|>"
    "{% else %}<|user|>{{ m['content'] }}{% endif %}"
    "{% endfor %}"
    "{% if add_generation_prompt %}<|assistant|>{% endif %}"
)


def save_tokenizer(source: Path, folder: Path) -> None:
    """<|endoftext|> is bos and eos, as in GPT-2: it stands between documents, nothing adds it."""
    tokenizer = PreTrainedTokenizerFast(
        tokenizer_object=Tokenizer.from_file(str(source)),
        bos_token=END,
        eos_token=END,
        pad_token=PAD,
        additional_special_tokens=[USER, ASSISTANT],
        model_max_length=1024,
        clean_up_tokenization_spaces=False,
    )
    tokenizer.chat_template = CHAT_TEMPLATE
    tokenizer.save_pretrained(folder)


def hub_config(folder: Path) -> None:
    """transformers 5 writes `num_local_experts`; Qwen and other loaders say `num_experts`."""
    path = folder / "config.json"
    config = json.loads(path.read_text())
    config["num_experts"] = config.pop("num_local_experts", None) or config["num_experts"]
    path.write_text(json.dumps(dict(sorted(config.items())), indent=2) + "\n")


def judge(model: PreTrainedModel, domains: list[Domain]) -> tuple[dict[str, dict], dict]:
    """Losses per domain (nats per token, perplexity, bits per byte) and the routing report.

    Both over every whole window of 256 held-out tokens.
    """
    w, rope = dict(model.named_parameters()), rope_table(model.config, WINDOW)
    losses: dict[str, dict] = {}
    ids: dict[str, Tensor] = {}
    for domain in domains:
        count = (len(domain.held_out) - 1) // WINDOW
        text = domain.held_out[: count * WINDOW + 1]
        inputs, targets = text[:-1].view(count, WINDOW), text[1:].view(count, WINDOW)
        total, routed = 0.0, []
        for i, t in zip(inputs.split(16), targets.split(16), strict=True):
            hidden, routing = forward(w, model.config, i, rope)
            total += token_loss(w, hidden, t).item() * t.numel()
            routed.append(torch.stack([layer.ids for layer in routing]))
        ids[domain.name] = torch.cat(routed, dim=1)
        loss = total / targets.numel()
        twin = token_loss(w, forward(w, model.config, inputs[:1], rope)[0], targets[:1])
        logits = model(inputs[:1]).logits[0].float()
        reference = torch.nn.functional.cross_entropy(logits, targets[0])
        bytes_per_token = domain.held_out_bytes / len(domain.held_out)
        losses[domain.name] = {
            "tokens": targets.numel(),
            "loss": loss,
            "perplexity": math.exp(loss),
            "bits_per_byte": loss / math.log(2) / bytes_per_token,
            "twin_error": abs(twin.item() - reference.item()),
        }
    return losses, routing_report(ids, model.config.num_experts)


def demo_prompts(domains: list[Domain], tokenizer: PreTrainedTokenizerFast) -> list[dict[str, str]]:
    """Prompts after the first one of each domain, which the card shows."""
    rows = []
    for domain in domains:
        candidates = prompts(domain, tokenizer)
        next(candidates)
        for _ in range(PROMPTS_PER_DOMAIN.get(domain.name, 1)):
            source = SOURCES[domain.name]
            rows.append(
                {
                    "domain": domain.name.removesuffix("_dolly"),
                    "text": next(candidates)[0],
                    "source": source.origin,
                    "licence": source.licence,
                }
            )
    return rows


def print_results(result: dict) -> None:
    for name, row in result["losses"].items():
        print(f"{name:12s}", {key: round(value, 4) for key, value in row.items()})
    for key, (low, high) in TARGETS.items():
        print(f"{key:14s} {result['routing']['headline'][key]:.3f}  target {low} to {high}")
    for row in result["samples"]:
        print("\n".join(f"--- {key}\n{value}" for key, value in row.items()))


@torch.no_grad()
def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--data", type=Path, default=REPO.parent / "shared" / "data")
    parser.add_argument("--run", type=Path, required=True, help="the --run of train.py")
    parser.add_argument("--models", type=Path, default=REPO / "moe_offload" / "models")
    args = parser.parse_args()

    folder = args.models / "tiny_moe"
    shutil.copytree(args.run / "checkpoint", folder, dirs_exist_ok=True)
    (folder / "model.safetensors").chmod(0o644)  # safetensors writes it for the owner only
    hub_config(folder)
    bpe = args.data / "tokenizer" / "bpe2048.json"
    save_tokenizer(bpe, folder)
    GenerationConfig(bos_token_id=0, eos_token_id=0, pad_token_id=1).save_pretrained(folder)

    model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.bfloat16).eval()
    tokenizer = AutoTokenizer.from_pretrained(folder)
    domains = load_corpus(args.data / "tinylm_corpus", Tokenizer.from_file(str(bpe)))
    losses, routing = judge(model, domains)
    result = {
        "parameters": sum(p.numel() for p in model.parameters()),
        "config": json.loads((folder / "config.json").read_text()),
        "losses": losses,
        "routing": routing,
        "samples": write_samples(model, tokenizer, domains),
    }
    (args.run / "eval.json").write_text(json.dumps(result, indent=1))
    print_results(result)
    log = [json.loads(line) for line in (args.run / "log.jsonl").open()]
    write_card(folder, result, log)
    text = json.dumps(demo_prompts(domains, tokenizer), indent=2, ensure_ascii=False)
    (args.models / "prompts.json").write_text(text + "\n", encoding="utf-8")
    print("folder bytes", sum(f.stat().st_size for f in folder.iterdir()))


if __name__ == "__main__":
    main()
