"""Load a model with its experts paged and let it write: the commands `generate` and `verify`.

Everything a user can get wrong is checked before the weights are loaded: the budget, the files,
the prompt's length. `demo` uses the same pieces.
"""

from __future__ import annotations

import argparse
import json
import os
import sys
import time
import warnings
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor, wait
from contextlib import closing
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from moe_offload.config import OffloadConfig, format_bytes
from moe_offload.console import progress
from moe_offload.errors import CheckpointError, InputError
from moe_offload.models import tiny_moe_path

_VERIFY_PROMPTS = ["Once upon a time there was", "What is 12 + 30? Explain step by step."]


@dataclass(frozen=True)
class Completion:
    """What a model wrote.

    Attributes:
        tokens: ids of the new tokens, an end-of-text token included.
        seconds: from the prompt to the last token; `first_token_seconds` to the first.
    """

    text: str
    tokens: list[int]
    seconds: float
    first_token_seconds: float

    @property
    def tokens_per_second(self) -> float:
        return len(self.tokens) / self.seconds


def quiet() -> None:
    """Silence what transformers says that a user can do nothing about; bars only on a terminal."""
    import transformers
    from huggingface_hub.utils import disable_progress_bars, logging

    transformers.logging.set_verbosity_error()
    logging.set_verbosity_error()
    warnings.filterwarnings("ignore")
    if not sys.stderr.isatty():
        transformers.logging.disable_progress_bar()
        disable_progress_bars()


def resolve_model(name: str) -> str:
    """Path or hub id of MODEL; `tiny` is the packaged model."""
    if name != "tiny":
        return name
    path = tiny_moe_path()
    if not (path / "config.json").is_file():
        raise CheckpointError(
            f"`tiny` is the model that comes with moe_offload, but {path} has no config.json. "
            "Install the package from a complete checkout or from its wheel."
        )
    return str(path)


def load_config(path: str) -> Any:
    """The transformers config of a checkpoint, its files checked as far as headers go."""
    from moe_offload.huggingface.loading import _check_location, _model_class, _model_config

    _check_location(path, {})
    config = _model_config(path, {})
    _model_class(path, config)
    return config


def load_tokenizer(path: str) -> Any:
    from transformers import AutoTokenizer

    try:
        tokenizer = AutoTokenizer.from_pretrained(path)
        reason = "there are no tokenizer files." if len(tokenizer) < 2 else None
    except (OSError, ValueError, KeyError) as error:
        reason = (str(error).strip().splitlines() or [type(error).__name__])[0]
    if reason is not None:  # transformers makes an empty tokenizer when it finds no files
        raise CheckpointError(
            f"{path}: cannot load a tokenizer: {reason} Put tokenizer.json and "
            "tokenizer_config.json beside the weights."
        )
    return tokenizer


def encode(tokenizer: Any, prompt: str, config: Any, max_new_tokens: int) -> dict[str, Any]:
    """The prompt as tensors [1, T]; refused when it is empty or leaves no room for the answer."""
    inputs = tokenizer(prompt, return_tensors="pt", return_token_type_ids=False)
    length = inputs["input_ids"].shape[1]
    limit = getattr(config.get_text_config(), "max_position_embeddings", None)
    if length == 0:
        raise InputError("the prompt is empty; give some text to continue")
    if isinstance(limit, int) and length + max_new_tokens > limit:
        raise InputError(
            f"the prompt has {length} tokens; with --max-new-tokens {max_new_tokens} that exceeds "
            f"the model's context of {limit} tokens. Shorten the prompt or ask for fewer tokens."
        )
    return dict(inputs)


def load_model(path: str, config: OffloadConfig) -> tuple[Any, Any]:
    """The model and its offloader, slots filled, with progress bars on a terminal."""
    from moe_offload.huggingface import from_pretrained, get_offloader

    model = from_pretrained(
        path,
        device_budget=config.device_budget,
        policy=config.policy,
        predictor=config.predictor,
        fill=False,
    )
    offloader = get_offloader(model)
    try:
        for pool in offloader.pools:
            if pool.num_slots >= pool.num_pages:  # as fill="auto", but visibly
                _fill(pool)
    except BaseException:
        offloader.close()
        raise
    return model, offloader


def _fill(pool: Any) -> None:
    bar = progress(
        total=pool.num_pages * pool.layout.payload_bytes,
        desc="Reading experts",
        unit="B",
        unit_scale=True,
        unit_divisor=1024,
    )
    with bar, ThreadPoolExecutor(1) as executor:
        filling = executor.submit(pool.fill)
        try:
            while not filling.done():
                wait([filling], timeout=0.1)
                bar.update(sum(pool.counters()["fill_bytes"]) - bar.n)
        except BaseException:
            pool.close()  # or leaving the executor would wait for the whole fill
            raise
        filling.result()


def complete(
    model: Any,
    tokenizer: Any,
    inputs: dict[str, Any],
    max_new_tokens: int,
    *,
    temperature: float = 0.0,
    top_p: float = 1.0,
    seed: int = 0,
    write: Callable[[str], object] = lambda text: None,
) -> Completion:
    """Generate from one prompt; `write` gets each piece of text as soon as its words are whole."""
    import torch

    sampling: dict[str, Any] = {"do_sample": False}
    if temperature > 0:
        sampling = {"do_sample": True, "temperature": temperature, "top_p": top_p, "top_k": 0}
        torch.manual_seed(seed)
    streamer = _streamer(tokenizer, write)
    begin = time.perf_counter()
    output = model.generate(**inputs, max_new_tokens=max_new_tokens, streamer=streamer, **sampling)
    seconds = time.perf_counter() - begin
    tokens = output[0, inputs["input_ids"].shape[1] :].tolist()
    text = tokenizer.decode(tokens, skip_special_tokens=True)
    return Completion(text, tokens, seconds, streamer.first_token_at - begin)


def _streamer(tokenizer: Any, write: Callable[[str], object]) -> Any:
    from transformers import TextStreamer

    class Streamer(TextStreamer):
        """Hands on text as transformers would print it, and notes when the first token came."""

        first_token_at = 0.0

        def put(self, value: Any) -> None:
            if not self.next_tokens_are_prompt and not self.first_token_at:
                self.first_token_at = time.perf_counter()
            super().put(value)

        def on_finalized_text(self, text: str, stream_end: bool = False) -> None:
            if text:
                write(text)

    return Streamer(tokenizer, skip_prompt=True, skip_special_tokens=True)


def peak_rss_bytes() -> int:
    """The most memory this process ever had resident.

    From /proc, because getrusage's ru_maxrss also remembers the parent before exec.
    """
    for line in Path("/proc/self/status").read_text().splitlines():
        if line.startswith("VmHWM:"):
            return int(line.split()[1]) * 1024
    return 0


def write_now(text: str) -> None:
    sys.stdout.write(text)
    sys.stdout.flush()


def generate(args: argparse.Namespace) -> int:
    """The command `generate`."""
    names = ("device_budget", "policy", "predictor", "preset")
    given = {name: getattr(args, name) for name in names if getattr(args, name) is not None}
    config = OffloadConfig.from_options(**given)
    prompt = args.prompt if args.prompt is not None else _read_prompt(args.prompt_file)
    _check_writable(args.timeline)
    path = resolve_model(args.model)
    quiet()
    model_config = load_config(path)
    tokenizer = load_tokenizer(path)
    inputs = encode(tokenizer, prompt, model_config, args.max_new_tokens)

    begin = time.perf_counter()
    model, offloader = load_model(path, config)
    load_seconds = time.perf_counter() - begin
    with closing(offloader):
        done = complete(
            model,
            tokenizer,
            inputs,
            args.max_new_tokens,
            temperature=args.temperature,
            top_p=args.top_p,
            seed=args.seed,
            write=write_now,
        )
        print(flush=True)
        stats = offloader.stats()
        if args.timeline:
            offloader.timeline(args.timeline)
    if args.json:
        result = {
            "model": args.model,
            "text": done.text,
            "tokens": done.tokens,
            "prompt_tokens": inputs["input_ids"].shape[1],
            "seconds": done.seconds,
            "first_token_seconds": done.first_token_seconds,
            "load_seconds": load_seconds,
            "tokens_per_second": done.tokens_per_second,
            "peak_rss_bytes": peak_rss_bytes(),
            "device_budget_bytes": stats["device_budget_bytes"],
            "stats": stats,
        }
        print(json.dumps(result))
    else:
        print(_summary(done, stats), file=sys.stderr)
    return 0


def _summary(done: Completion, stats: dict[str, Any]) -> str:
    moved = stats["demand_bytes"] + stats["prefetch_bytes_used"] + stats["prefetch_bytes_wasted"]
    return (
        f"{len(done.tokens)} tokens in {done.seconds:.1f} s ({done.tokens_per_second:.1f}/s); "
        f"experts in {format_bytes(stats['device_budget_bytes'])} of "
        f"{format_bytes(stats['total_expert_bytes'])}, hit rate {stats['hit_rate']:.1%}, "
        f"{format_bytes(moved / len(done.tokens))} moved per token"
        + (f"; LOSSY: {stats['lossy']} changed tokens" if stats["lossy"] else "")
    )


def _read_prompt(file: str) -> str:
    try:
        return sys.stdin.read() if file == "-" else Path(file).read_text(encoding="utf-8")
    except OSError as error:
        raise InputError(f"--prompt-file {file}: {error.strerror}. Check the path.") from error
    except UnicodeDecodeError as error:
        raise InputError(f"--prompt-file {file}: expected UTF-8 text, but {error}") from error


def _check_writable(file: str | None) -> None:
    """Better now than after the generation."""
    if file is None:
        return
    folder = Path(file).absolute().parent
    if Path(file).is_dir() or not os.access(folder, os.W_OK):
        raise InputError(f"--timeline {file}: expected a file in an existing, writable folder")


def verify(args: argparse.Namespace) -> int:
    """The command `verify`; 0 when tokens and logits are identical, else 1."""
    config = OffloadConfig(device_budget=args.device_budget)
    path = resolve_model(args.model)
    quiet()
    model_config, tokenizer = load_config(path), load_tokenizer(path)
    prompts = args.prompt or _VERIFY_PROMPTS
    ids = [
        encode(tokenizer, prompt, model_config, args.max_new_tokens)["input_ids"]
        for prompt in prompts
    ]
    from moe_offload.verification import verify as compare

    model, offloader = load_model(path, config)
    with closing(offloader):
        report = compare(model, ids, args.max_new_tokens)
    print(report)
    return 0 if report.identical_tokens and report.max_abs_logit_diff == 0.0 else 1
