"""Prompts from held-out text, and what the model writes after them.

Selection is by rule, not by taste: the first held-out documents of a domain whose prompt has a
fitting length, so the card cannot show only lucky ones. Dialogue domains are cut after
<|assistant|>, translation after "German:", running text after about PREFIX_TOKENS tokens at a word
border.
"""

from collections.abc import Iterator
from typing import Any

import torch
from data import ASSISTANT, Domain
from transformers import PreTrainedModel, PreTrainedTokenizerFast

PREFIX_TOKENS = 32
MIN_TOKENS, MAX_TOKENS = 15, 60


def prompts(domain: Domain, tokenizer: PreTrainedTokenizerFast) -> Iterator[tuple[str, str]]:
    """Pairs of (prompt, what the corpus says next)."""
    documents = domain.held_out_documents
    if domain.name in ("books", "plays"):  # paragraphs: a prompt may run over their borders
        documents = ["\n\n".join(documents[i : i + 6]) for i in range(0, len(documents) - 6, 6)]
    for document in documents:
        if domain.name in ("math", "chat_dolly"):
            cut = document.index(ASSISTANT) + len(ASSISTANT)
        elif domain.name == "translation":
            cut = document.index("\nGerman:") + len("\nGerman:")
        else:
            words = document.split(" ")
            cut, used = 0, 0
            while used < len(words) and len(tokenizer.encode(document[:cut])) < PREFIX_TOKENS:
                used += 1
                cut = len(" ".join(words[:used]))
        prompt = document[:cut]
        if MIN_TOKENS <= len(tokenizer.encode(prompt)) <= MAX_TOKENS and cut < len(document):
            yield prompt, document[cut:]


@torch.no_grad()
def complete(
    model: PreTrainedModel, tokenizer: PreTrainedTokenizerFast, prompt: str, **generate: Any
) -> str:
    """The continuation only, special tokens removed."""
    inputs = tokenizer(prompt, return_tensors="pt", return_token_type_ids=False)
    out = model.generate(**inputs, **generate)
    return tokenizer.decode(out[0, inputs.input_ids.shape[1] :], skip_special_tokens=True)


def write_samples(
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerFast,
    domains: list[Domain],
    new_tokens: int = 72,
    seed: int = 0,
) -> list[dict[str, str]]:
    """One prompt per domain: the true continuation, the greedy one, a sample at temperature 0.8."""
    rows = []
    for domain in domains:
        prompt, truth = next(prompts(domain, tokenizer))
        torch.manual_seed(seed)
        rows.append(
            {
                "domain": domain.name,
                "prompt": prompt,
                "corpus": truth[:200],
                "greedy": complete(
                    model, tokenizer, prompt, max_new_tokens=new_tokens, do_sample=False
                ),
                "sampled": complete(
                    model,
                    tokenizer,
                    prompt,
                    max_new_tokens=new_tokens,
                    do_sample=True,
                    temperature=0.8,
                    top_p=0.95,
                    top_k=0,
                ),
            }
        )
    return rows
