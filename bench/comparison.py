"""Contenders that take turns on the same prompts, each in its own process and memory limit.

All load first, one after the other. Then, per round, one prompt: every contender generates from
it, in an order that is swapped each round, and between the first and the second turn the machine's
own speed is measured (bench/roofs.py). So drift of the machine meets everyone alike. A contender
that is not having its turn only waits for a line on its standard input.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any, Literal

from harness import REPOSITORY, Row
from limits import MemoryGroup, drop_page_cache, files_under
from roofs import MEMORY_BYTES, disk_sweep, memory_read

Isolation = Literal["auto", "group", "drop"]
Command = list[str | Path]  # arguments of contenders.py


class Worker:
    """A contender's process: its methods are called by name, one call at a time."""

    def __init__(self, name: str, command: Command, group: MemoryGroup | None = None) -> None:
        self.name = name
        path = os.pathsep.join(filter(None, [str(REPOSITORY), os.environ.get("PYTHONPATH")]))
        start: Command = [sys.executable, Path(__file__).with_name("contenders.py"), *command]
        if group is not None:  # join before Python starts, so that its imports are counted too
            start = ["sh", "-c", 'echo $$ > "$0" && exec "$@"', group.path / "cgroup.procs", *start]
        self.process = subprocess.Popen(
            [str(part) for part in start],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            text=True,
            env={**os.environ, "PYTHONPATH": path, "TOKENIZERS_PARALLELISM": "false"},
        )

    def call(self, method: str, **arguments: Any) -> Row:
        """Have the process run a method; wait for its answer."""
        stdin, stdout = self.process.stdin, self.process.stdout
        assert stdin is not None
        assert stdout is not None
        try:
            stdin.write(json.dumps({"call": method, **arguments}) + "\n")
            stdin.flush()
            line = stdout.readline()
        except BrokenPipeError:
            line = ""
        if line:
            return dict(json.loads(line))
        code = self.process.wait()
        why = "killed, most likely by its memory limit" if code == -9 else f"exit status {code}"
        raise SystemExit(f"{self.name}: no answer to {method!r} ({why})")

    def stop(self) -> None:
        if self.process.stdin is not None:
            self.process.stdin.close()
        self.process.wait()


@dataclass
class Comparison:
    """What to compare, and after `run` everything that was observed.

    Attributes:
        budget: of the experts, as moe_offload takes it.
        limit_bytes: memory each contender may use.
        commands: `{contender: arguments of contenders.py}`.
        isolation: how equal memory was enforced, in words.
        loads, turns: answers of each contender; turns in order of rounds.
        memory_at_first, memory: what each held after the first round and at the end.
        roofs: per round, what the disk and the memory did.
    """

    budget: str
    limit_bytes: int
    commands: Mapping[str, Command]
    isolation: str = ""
    loads: dict[str, Row] = field(default_factory=dict)
    turns: dict[str, list[Row]] = field(default_factory=dict)
    memory_at_first: dict[str, Row] = field(default_factory=dict)
    memory: dict[str, Row] = field(default_factory=dict)
    roofs: list[Row] = field(default_factory=list)

    def run(
        self,
        checkpoint: Path,
        prompts: Sequence[Sequence[int]],
        new_tokens: int,
        page_bytes: int,
        disk_seconds: float,
        memory_bytes: int,
        isolation: Isolation = "auto",
    ) -> None:
        """Load everyone, then one round per prompt.

        Args:
            checkpoint: folder whose files every contender (re-)reads.
            prompts: token ids, one prompt per round.
            new_tokens: forwards after the prompt's.
            page_bytes: bytes of one expert.
            disk_seconds: per row of `roofs.disk_sweep`, each round.
            memory_bytes: size of the buffer `roofs.memory_read` reads, each round.
            isolation: "group" (a memory control group each), "drop" (page cache dropped before
                each forward), or "auto" = the former where it can be had.
        """
        groups = self._make_groups(isolation)
        workers: dict[str, Worker] = {}
        files = sorted(checkpoint.glob("*.safetensors"))
        try:
            for name, command in self.commands.items():
                workers[name] = Worker(name, command, groups.get(name))
            self._load(workers, groups, checkpoint)
            for number, prompt in enumerate(prompts):
                _progress(f"budget {self.budget}: round {number + 1} of {len(prompts)}")
                order = list(workers) if number % 2 == 0 else list(reversed(workers))
                for name in order:
                    turn = workers[name].call(
                        "generate", prompt=prompt, new_tokens=new_tokens, drop_cache=not groups
                    )
                    self.turns.setdefault(name, []).append(turn)
                    if name == order[0]:
                        sweep = (files, page_bytes, disk_seconds, 1000 * number)
                        self.roofs.append(
                            {
                                "disk": disk_sweep(*sweep),
                                "disk_to_memory": disk_sweep(*sweep, MEMORY_BYTES),
                                "memory_gb_per_s": memory_read(memory_bytes),
                            }
                        )
                if number == 0:
                    self.memory_at_first = _memory(workers)
            self.memory = _memory(workers)
        finally:
            _progress("")
            for worker in workers.values():
                worker.stop()
            for group in groups.values():
                group.remove()

    def observed(self) -> Row:
        """The raw observations, without the paths of this machine."""
        record = asdict(self)
        del record["commands"]
        return record

    def _make_groups(self, isolation: Isolation) -> dict[str, MemoryGroup]:
        groups: dict[str, MemoryGroup] = {}
        reason = "as asked"
        if isolation != "drop":
            try:
                for name in self.commands:
                    groups[name] = MemoryGroup(f"moe-offload-bench-{len(groups)}")
                self.isolation = f"a memory control group of {self.limit_bytes} bytes each"
                return groups
            except OSError as error:
                for group in groups.values():
                    group.remove()
                if isolation == "group":
                    raise SystemExit(f"memory control groups: {error}. Run as root.") from None
                reason = f"no control groups here: {error.strerror or error}"
        self.isolation = f"page cache of the model's files dropped before each forward ({reason})"
        return {}

    def _load(
        self, workers: Mapping[str, Worker], groups: Mapping[str, MemoryGroup], checkpoint: Path
    ) -> None:
        """One at a time, from a cold page cache.

        moe_offload loads inside its limit. The others hold pieces of the checkpoint twice while
        they load, so they are limited afterwards: what counts for them is how they run.
        """
        for name, worker in workers.items():
            _progress(f"budget {self.budget}: {name} is loading")
            drop_page_cache(files_under(checkpoint))
            if name in groups and "--budget" in self.commands[name]:
                groups[name].limit(self.limit_bytes)
            self.loads[name] = worker.call("load")
        os.sync()  # accelerate has just written its own copy of the experts
        drop_page_cache(files_under(checkpoint))
        for group in groups.values():
            group.limit(self.limit_bytes)


def _memory(workers: Mapping[str, Worker]) -> dict[str, Row]:
    return {name: worker.call("memory") for name, worker in workers.items()}


def _progress(text: str) -> None:
    if sys.stderr.isatty():
        print(f"\r\033[K{text}", end="", file=sys.stderr, flush=True)
    elif text:
        print(text, file=sys.stderr, flush=True)
