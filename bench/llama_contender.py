"""llama.cpp as a contender: the whole model mapped into memory, the kernel pages it.

The calls are those of contenders.Contender. llama.cpp's defaults otherwise: mapped file, f16 KV
cache; both cores, the prompt in one batch. The largest logit is the next token.
"""

from __future__ import annotations

import ctypes
import os
import time
from pathlib import Path
from typing import Any

import numpy as np
from harness import Row
from limits import disk_read_bytes, drop_page_cache, memory_bytes

CONTEXT = 1024  # tokens: the prompt's and the new ones


class LlamaContender:
    """A GGUF file in llama-cpp-python.

    Args:
        path: the GGUF file.
        vocab: its number of logits.
    """

    def __init__(self, path: Path, vocab: int) -> None:
        import llama_cpp

        self.lib: Any = llama_cpp
        self.path, self.vocab = path, vocab
        self._quiet = llama_cpp.llama_log_callback(lambda level, text, data: None)
        llama_cpp.llama_log_set(self._quiet, ctypes.c_void_p(0))
        llama_cpp.llama_backend_init()
        self.model: Any = None
        self.context: Any = None

    def load(self) -> Row:
        """As Contender.load. Pages that whoever wrote the file left cached would be free to it."""
        drop_page_cache([self.path])
        before, read_before = memory_bytes(), disk_read_bytes()
        start = time.perf_counter()
        self.model = self.lib.llama_model_load_from_file(
            str(self.path).encode(), self.lib.llama_model_default_params()
        )
        options = self.lib.llama_context_default_params()
        options.n_ctx = options.n_batch = options.n_ubatch = CONTEXT
        options.n_threads = options.n_threads_batch = len(os.sched_getaffinity(0))
        self.context = self.model and self.lib.llama_init_from_model(self.model, options)
        if not self.context:
            raise RuntimeError(f"llama.cpp cannot load {self.path}")
        return {
            "seconds": time.perf_counter() - start,
            "disk_read_bytes": disk_read_bytes() - read_before,
            "imports_memory_bytes": before,
            "memory_bytes": memory_bytes(),
            "experts_implementation": f"llama-cpp-python {self.lib.__version__}",
            "stats": None,
        }

    def generate(self, prompt: list[int], new_tokens: int, drop_cache: bool) -> Row:
        """As Contender.generate."""
        if drop_cache:  # pages that are mapped stay
            raise RuntimeError("llama.cpp is only compared inside memory control groups")
        self.lib.llama_memory_clear(self.lib.llama_get_memory(self.context), True)
        tokens: list[int] = []
        seconds: list[float] = []
        phases: Row = {}
        feed, read_before = prompt, disk_read_bytes()
        for step in range(new_tokens + 1):  # the first is the prompt
            if step == 1:
                phases["prefill"] = self._phase(read_before)
                read_before = disk_read_bytes()
            start = time.perf_counter()
            feed = [self._forward(feed)]
            tokens += feed
            seconds.append(time.perf_counter() - start)
        phases["decode"] = self._phase(read_before)
        return {
            "prompt_tokens": len(prompt),
            "tokens": tokens,
            "prefill_s": seconds[0],
            "decode_s": seconds[1:],
            **phases,
        }

    def memory(self) -> Row:
        return dict(memory_bytes())

    def _forward(self, ids: list[int]) -> int:
        array = (self.lib.llama_token * len(ids))(*ids)
        code = self.lib.llama_decode(self.context, self.lib.llama_batch_get_one(array, len(ids)))
        if code != 0:
            raise RuntimeError(f"llama_decode answered {code}")
        logits = self.lib.llama_get_logits_ith(self.context, -1)
        return int(np.ctypeslib.as_array(logits, (self.vocab,)).argmax())

    def _phase(self, read_before: int) -> Row:
        return {"disk_read_bytes": disk_read_bytes() - read_before, "stats": None, "copies": None}
