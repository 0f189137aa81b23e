"""Whose threads the CPU expert kernels run on: one process, its tasks counted."""

from __future__ import annotations

import subprocess
import sys

import pytest
import torch

THREADS = """
import os, threading, torch
from moe_offload import functional

torch.set_num_threads(3)
tasks = lambda: set(os.listdir("/proc/self/task"))
torch.ones(1 << 22).sum()  # torch has its threads now
before = tasks()
hidden, ids = torch.randn(4, 256), torch.arange(8).reshape(4, 2)
gate_up, down = torch.randn(8, 1024, 256), torch.randn(8, 256, 512)
run = lambda: functional.expert_ffn(hidden, gate_up, down, ids, torch.ones(4, 2))
want = run()
assert tasks() == before, (len(tasks()), len(before))
got = []
others = [threading.Thread(target=lambda: got.extend(run() for _ in range(20))) for _ in range(3)]
[other.start() for other in others], [other.join() for other in others]
assert len(got) == 60 and all(torch.equal(one, want) for one in got)
if (child := os.fork()) == 0:  # a forked child has none of the threads
    os._exit(0 if torch.equal(run(), want) else 1)
assert os.waitpid(child, 0)[1] == 0
"""


@pytest.mark.skipif(
    "parallel backend: OpenMP" not in torch.__config__.parallel_info(),
    reason="this torch has no OpenMP threads",
)
def test_the_threads_are_torchs() -> None:
    """Threads of our own would find the cores taken: torch's spin after each product."""
    done = subprocess.run(
        [sys.executable, "-c", THREADS], capture_output=True, text=True, timeout=120, check=False
    )
    assert done.returncode == 0, done.stderr
