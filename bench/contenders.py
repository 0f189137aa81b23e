"""One contender per process: loads its model, then generates greedily when it is told to.

The parent (end_to_end.py) starts `python bench/contenders.py NAME ...`, writes one JSON call per
line to its standard input and reads one JSON answer per line; so models wait in memory while
others run, and each process's peak memory and disk reads are its own. All contenders run the very
same loop over `model(...)`; they differ only in how the model was loaded.
"""

from __future__ import annotations

import argparse
import importlib
import json
import os
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import checkpoints
from harness import Row
from limits import disk_read_bytes, drop_page_cache, files_under, memory_bytes

Interval = tuple[float, float]


class Contender:
    """A loaded model and the calls the parent may make on it.

    Args:
        checkpoint: folder of the model.
        budget: "25%" for moe_offload; None for a plain transformers model.
        predictor: of moe_offload.
        offload_folder: where accelerate keeps the experts; None for a resident model.
    """

    def __init__(
        self, checkpoint: Path, budget: str | None, predictor: str, offload_folder: Path | None
    ) -> None:
        import torch
        import transformers
        from transformers import OlmoeForCausalLM

        self.torch = torch
        transformers.logging.set_verbosity_error()
        transformers.logging.disable_progress_bar()
        if budget is not None:
            importlib.import_module("moe_offload.huggingface")  # not part of loading
        elif offload_folder is not None:
            importlib.import_module("accelerate")
        self.checkpoint, self.budget, self.offload_folder = checkpoint, budget, offload_folder
        self.predictor = predictor
        self.model: Any = None
        self.offloader: Any = None
        self._model_class = OlmoeForCausalLM
        self._files: list[Path] = []
        self._warm_up()

    def _warm_up(self) -> None:
        """Load and run a toy model, so that the libraries' code is read before the model's bytes.

        The kernel counts both alike, and code pages of torch are tens of megabytes.
        """
        with tempfile.TemporaryDirectory() as folder:
            toy = checkpoints.write(checkpoints.QUICK, Path(folder, "toy"))
            offload_folder = self.offload_folder and Path(folder, "offload")
            model = self._load(toy, offload_folder)
            with self.torch.no_grad():
                model(input_ids=self.torch.tensor([[1, 2, 3]]))
            if self.budget is not None:
                importlib.import_module("moe_offload").get_offloader(model).close()

    def load(self) -> Row:
        """Load the model; answers with seconds, disk bytes and memory before and after."""
        before, read_before = memory_bytes(), disk_read_bytes()
        start = time.perf_counter()
        self.model = self._load(self.checkpoint, self.offload_folder)
        if self.budget is not None:
            self.offloader = importlib.import_module("moe_offload").get_offloader(self.model)
        seconds = time.perf_counter() - start
        folders = [self.checkpoint, self.offload_folder]
        self._files = files_under(*[folder for folder in folders if folder is not None])
        return {
            "seconds": seconds,
            "disk_read_bytes": disk_read_bytes() - read_before,
            "imports_memory_bytes": before,
            "memory_bytes": memory_bytes(),
            "experts_implementation": self.model.config._experts_implementation,
            "stats": self._stats(),
        }

    def _load(self, checkpoint: Path, offload_folder: Path | None) -> Any:
        """The model in this contender's way, in eval mode."""
        if self.budget is not None:
            moe_offload = importlib.import_module("moe_offload")
            return moe_offload.from_pretrained(
                checkpoint, device_budget=self.budget, predictor=self.predictor
            )
        if self.offload_folder is not None:
            return self._model_class.from_pretrained(
                checkpoint,
                dtype="auto",
                device_map=_experts_on_disk(checkpoint),
                offload_folder=offload_folder,
            ).eval()
        return self._model_class.from_pretrained(checkpoint, dtype="auto").eval()

    def generate(self, prompt: list[int], new_tokens: int, drop_cache: bool) -> Row:
        """Greedy tokens after `prompt`, with the time of each forward and what it moved.

        With `drop_cache` the page cache of the model's files is dropped before each forward.

        The resident model, which is timed as transformers ships it, afterwards also answers with
        `same_kernel_tokens`: computed by the kernels that offloaded models use, untimed. Two
        correct kernels round differently, and random weights turn that into other tokens.
        """
        answer = self._generate(prompt, new_tokens, drop_cache)
        if self.budget is None and self.offload_folder is None:
            importlib.import_module("moe_offload.huggingface")  # registers the implementation
            before = self.model.config._experts_implementation
            self.model.set_experts_implementation("moe_offload")
            undo = importlib.import_module("moe_offload").use_dense_kernels(self.model)
            answer["same_kernel_tokens"] = self._generate(prompt, new_tokens, False)["tokens"]
            self.model.set_experts_implementation(before)
            undo()
        return answer

    def _generate(self, prompt: list[int], new_tokens: int, drop_cache: bool) -> Row:
        torch = self.torch
        tokens: list[int] = []
        seconds: list[float] = []
        cache = None
        feed = torch.tensor([prompt])
        phases: Row = {}
        self._reset()
        read_before = disk_read_bytes()
        for step in range(new_tokens + 1):  # the first is the prompt
            if step == 1:
                phases["prefill"] = self._phase(read_before)
                self._reset()
                read_before = disk_read_bytes()
            if step == 1 + new_tokens // 2:
                phases["decode_begin"] = self._stats()
            if drop_cache:
                drop_page_cache(self._files)
            start = time.perf_counter()
            with torch.no_grad():
                out = self.model(
                    input_ids=feed, past_key_values=cache, use_cache=True, logits_to_keep=1
                )
            cache = out.past_key_values
            feed = out.logits[:, -1].argmax(dim=-1, keepdim=True)
            tokens.append(int(feed))
            seconds.append(time.perf_counter() - start)
        phases["decode"] = self._phase(read_before)
        phases["decode_end"] = _difference(phases["decode"]["stats"], phases["decode_begin"])
        return {
            "prompt_tokens": len(prompt),
            "tokens": tokens,
            "prefill_s": seconds[0],
            "decode_s": seconds[1:],
            **phases,
        }

    def memory(self) -> Row:
        return dict(memory_bytes())

    def _reset(self) -> None:
        if self.offloader is not None:
            self.offloader.reset_stats()

    def _phase(self, read_before: int) -> Row:
        return {
            "disk_read_bytes": disk_read_bytes() - read_before,
            "stats": self._stats(),
            "copies": self._copies(),
        }

    def _stats(self) -> Row | None:
        if self.offloader is None:
            return None
        stats = self.offloader.stats()
        del stats["per_layer"]
        return dict(stats)

    def _copies(self) -> Row | None:
        """Seconds in which copies were under way or the model waited for one."""
        if self.offloader is None:
            return None
        with tempfile.TemporaryDirectory() as folder:
            path = Path(folder, "timeline.json")
            self.offloader.timeline(path)
            events = json.loads(path.read_text())["traceEvents"]
        spans: dict[str, list[Interval]] = {"demand_copy": [], "prefetch_copy": [], "stall": []}
        for event in events:
            if event.get("cat") in spans:
                begin = event["ts"] / 1e6
                spans[event["cat"]].append((begin, begin + event["dur"] / 1e6))
        copies = spans["demand_copy"] + spans["prefetch_copy"]
        stalls = spans["stall"]
        return {
            "busy_s": _union(copies + stalls),
            "copying_s": _union(copies),
            "stalled_s": _union(stalls),
            "num_copies": len(copies),
        }


def _difference(whole: Row | None, begin: Row | None) -> Row | None:
    """Hits and look-ups of the second half of decode."""
    if whole is None or begin is None:
        return None
    return {name: whole[name] - begin[name] for name in ("hits", "lookups")}


def _union(spans: list[Interval]) -> float:
    """Length of the union of intervals."""
    total, reached = 0.0, float("-inf")
    for begin, end in sorted(spans):
        total += max(0.0, end - max(begin, reached))
        reached = max(reached, end)
    return total


def _experts_on_disk(checkpoint: Path) -> dict[str, str]:
    """accelerate's device map: every experts module on disk, everything else in memory."""
    layers = json.loads((checkpoint / "config.json").read_text())["num_hidden_layers"]
    places = {"model.embed_tokens": "cpu", "model.norm": "cpu", "lm_head": "cpu"}
    places["model.rotary_emb"] = "cpu"
    for layer in range(layers):
        for name in ("self_attn", "input_layernorm", "post_attention_layernorm", "mlp.gate"):
            places[f"model.layers.{layer}.{name}"] = "cpu"
        places[f"model.layers.{layer}.mlp.experts"] = "disk"
    return places


def serve(target: Any) -> None:
    """Answer calls until standard input ends. Prints of libraries go to standard error."""
    answers = os.fdopen(os.dup(1), "w")
    os.dup2(2, 1)
    for line in sys.stdin:
        call = json.loads(line)
        method: Callable[..., Row] = getattr(target, call.pop("call"))
        answers.write(json.dumps(method(**call)) + "\n")
        answers.flush()


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("checkpoint", type=Path)
    kind = parser.add_mutually_exclusive_group()
    kind.add_argument("--budget", help="run with moe_offload; default: resident transformers")
    parser.add_argument("--predictor", default="auto", help="of moe_offload")
    kind.add_argument("--offload-folder", type=Path, help="run with accelerate disk offload")
    kind.add_argument("--llama-cpp", type=Path, help="run this GGUF file with llama.cpp")
    arguments = parser.parse_args()
    if arguments.llama_cpp is not None:
        from llama_contender import LlamaContender

        config = json.loads((arguments.checkpoint / "config.json").read_text())
        serve(LlamaContender(arguments.llama_cpp, config["vocab_size"]))
        return
    serve(
        Contender(
            arguments.checkpoint, arguments.budget, arguments.predictor, arguments.offload_folder
        )
    )


if __name__ == "__main__":
    main()
