"""Corpus to token streams: one stream per domain, batches that mix all domains in fixed shares.

Every batch holds every domain in (almost) its exact share, because the load-balancing loss is
computed over the batch: balance over the mixture is what lets each single domain stay skewed.
Books and plays are continuous text without document marks; maths, chat, science, translation and
stories are short documents, each closed by <|endoftext|>, packed back to back. The last two per
cent of each domain's documents are held out.
"""

import gzip
import re
from dataclasses import dataclass
from pathlib import Path

import torch
from tokenizers import Tokenizer
from torch import Tensor

END, PAD, USER, ASSISTANT = "<|endoftext|>", "<|pad|>", "<|user|>", "<|assistant|>"
END_ID = 0

# Share of each batch. Close to size ** 0.6, so that in a 15-million-token run the small domains
# (plays, stories) are seen about four times and the large one (books) less than twice.
SHARES = {
    "books": 0.25,
    "plays": 0.10,
    "stories": 0.09,
    "math": 0.17,
    "translation": 0.13,
    "science": 0.12,
    "chat_dolly": 0.14,
}
HELD_OUT = 0.02


@dataclass(frozen=True)
class Source:
    """Where a domain's text comes from; goes into the model card and the demo prompts."""

    origin: str
    licence: str


SOURCES = {
    "books": Source(
        "Project Gutenberg: War and Peace, Moby Dick, Pride and Prejudice, The Adventures of "
        "Sherlock Holmes, A Tale of Two Cities, Great Expectations (GITenberg)",
        "public domain",
    ),
    "plays": Source(
        "Shakespeare, as in karpathy/char-rnn data/tinyshakespeare", "public domain text, MIT repo"
    ),
    "stories": Source(
        "TinyStories validation sample in yuninxia/moe-routing-bench",
        "CDLA-Sharing-1.0 (repo: MIT)",
    ),
    "math": Source("GSM8K train split, openai/grade-school-math", "MIT"),
    "translation": Source(
        "10 000 English-German pairs, OpenNMT/OpenNMT-py data/", "MIT repo; Europarl/WMT text"
    ),
    "science": Source("SciTLDR-A train split, allenai/scitldr", "Apache-2.0"),
    "chat_dolly": Source(
        "Databricks Dolly rows selected by gpt4life/alpagasus", "CC BY-SA 3.0 (repo states none)"
    ),
}
_STORY_START = re.compile(r"^(Once|One day|There once|There was|In a |A long time|Long ago)")


@dataclass(frozen=True)
class Domain:
    """One domain's text, split into documents and tokens."""

    name: str
    train: Tensor  # [N] int64 token ids, documents back to back
    held_out: Tensor  # [M]
    held_out_documents: list[str]
    held_out_bytes: int


def read_documents(corpus: Path, name: str) -> list[str]:
    """Documents of one corpus file, formatted as the model sees them, without the end mark."""
    text = gzip.decompress((corpus / f"{name}.txt.gz").read_bytes()).decode().strip()
    if name in ("books", "plays"):
        return text.split("\n\n")
    if name == "math":
        pairs = re.split(r"(?:^|\n\n)Question: ", text)[1:]
        return [_dialogue(*pair.split("\nAnswer: ", 1)) for pair in pairs]
    if name == "chat_dolly":
        pairs = re.split(r"(?:^|\n\n)Instruction: ", text)[1:]
        return [
            _dialogue(question.replace("\nInput: ", "\n"), answer)
            for question, answer in (pair.split("\nResponse: ", 1) for pair in pairs)
        ]
    if name == "stories":
        return _join_paragraphs(text.split("\n\n"))
    return text.split("\n\n")


def _dialogue(question: str, answer: str) -> str:
    return f"{USER}{question.strip()}{ASSISTANT}{answer.strip()}"


def _join_paragraphs(paragraphs: list[str]) -> list[str]:
    """The file does not mark where a story ends, so one starts where it sounds like a beginning."""
    stories: list[str] = []
    for paragraph in paragraphs:
        if not stories or _STORY_START.match(paragraph):
            stories.append(paragraph)
        else:
            stories[-1] += "\n\n" + paragraph
    return stories


def load_domain(corpus: Path, tokenizer: Tokenizer, name: str) -> Domain:
    """Tokenises one domain and splits off the last HELD_OUT of its documents."""
    documents = read_documents(corpus, name)
    cut = len(documents) - max(1, round(HELD_OUT * len(documents)))
    separator = "\n\n" if name in ("books", "plays") else END

    def tokens(part: list[str]) -> Tensor:
        encoded = tokenizer.encode_batch([document + separator for document in part])
        return torch.tensor([i for e in encoded for i in e.ids], dtype=torch.int64)

    held_out = documents[cut:]
    num_bytes = sum(len((d if separator == END else d + separator).encode()) for d in held_out)
    return Domain(name, tokens(documents[:cut]), tokens(held_out), held_out, num_bytes)


def load_corpus(corpus: Path, tokenizer: Tokenizer) -> list[Domain]:
    return [load_domain(corpus, tokenizer, name) for name in SHARES]


class MixedBatches:
    """Endless batches [B, S + 1] in SHARES; a domain is a list of windows, reshuffled each pass."""

    def __init__(self, domains: list[Domain], batch: int, seq_len: int, seed: int):
        self.domains, self.batch, self.seq_len = domains, batch, seq_len
        self.rng = torch.Generator().manual_seed(seed)
        self.windows: list[list[int]] = [[] for _ in domains]
        self.owed = torch.rand(
            len(domains), generator=self.rng
        )  # fractional rows owed to each domain
        self.shares = torch.tensor([SHARES[d.name] for d in domains])

    def next(self) -> Tensor:
        rows = []
        self.owed += self.shares * self.batch
        for _ in range(self.batch):
            d = int(self.owed.argmax())
            self.owed[d] -= 1
            rows.append(self._window(d))
        return torch.stack(rows)

    def _window(self, d: int) -> Tensor:
        tokens = self.domains[d].train
        if not self.windows[d]:  # a new pass: other window borders, other order
            shift = int(torch.randint(self.seq_len, (1,), generator=self.rng))
            starts = torch.arange(shift, len(tokens) - self.seq_len - 1, self.seq_len)
            self.windows[d] = starts[torch.randperm(len(starts), generator=self.rng)].tolist()
        start = self.windows[d].pop()
        return tokens[start : start + self.seq_len + 1]
