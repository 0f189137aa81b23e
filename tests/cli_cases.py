"""The command line run inside this process (`cli.main`), because starting one costs seconds, on a
random checkpoint whose tokenizer knows printable ASCII.
"""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import torch
import transformers
from tiny_models import tiny_model
from tokenizers import Regex, Tokenizer, decoders, models, pre_tokenizers
from transformers import PreTrainedTokenizerFast

from moe_offload import cli

PROMPT = "abc"


def ascii_tokenizer() -> PreTrainedTokenizerFast:
    """One token per printable character, ids as in tiny_models: 0 pad, 1 bos, 2 eos."""
    characters = [chr(code) for code in range(32, 127)]
    vocabulary = {text: i for i, text in enumerate(["<pad>", "<s>", "</s>", *characters])}
    for number in range(len(vocabulary), 128):
        vocabulary[f"<{number}>"] = number
    tokenizer = Tokenizer(models.WordLevel(vocabulary, unk_token="<pad>"))
    tokenizer.pre_tokenizer = pre_tokenizers.Split(Regex("."), "isolated")
    tokenizer.decoder = decoders.Fuse()
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer, pad_token="<pad>", bos_token="<s>", eos_token="</s>"
    )


def write_checkpoint(folder: Path) -> Path:
    tiny_model("qwen3_moe", dtype=torch.bfloat16).save_pretrained(folder)
    ascii_tokenizer().save_pretrained(folder)
    return folder


def run(*args: object) -> int:
    return cli.main([str(arg) for arg in args])


def keep_verbosity() -> Iterator[None]:
    """The commands quieten transformers for their process, which here is everybody's."""
    before = transformers.logging.get_verbosity()
    yield
    transformers.logging.set_verbosity(before)
    transformers.logging.enable_progress_bar()
