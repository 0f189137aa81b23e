"""Equal memory for every contender, and what the kernel says a process used.

A process that reads files through the page cache borrows whatever memory is free, so two contenders
are only comparable inside equal limits. Best is a memory control group per contender, which counts
anonymous memory and page cache alike (version 1 or 2, needs root). Where that cannot be had, the
page cache of the model's files is dropped before each token (`drop_page_cache`).
"""

from __future__ import annotations

import os
import time
from collections.abc import Iterable
from pathlib import Path

CGROUP_ROOT = Path("/sys/fs/cgroup")


class MemoryGroup:
    """A memory control group for one process and its children; unlimited until `limit` is called.

    Raises OSError from the constructor where this machine or user does not allow it.
    """

    def __init__(self, name: str) -> None:
        if (CGROUP_ROOT / "memory" / "memory.limit_in_bytes").exists():
            parent, self._limit_file = CGROUP_ROOT / "memory", "memory.limit_in_bytes"
        elif (CGROUP_ROOT / "cgroup.subtree_control").exists():
            parent, self._limit_file = CGROUP_ROOT, "memory.max"
            if "memory" not in (parent / "cgroup.subtree_control").read_text().split():
                (parent / "cgroup.subtree_control").write_text("+memory")
        else:
            raise OSError("no memory control group is mounted")
        self.path = parent / f"{name}-{os.getpid()}"
        self.path.mkdir()

    def add(self, pid: int) -> None:
        (self.path / "cgroup.procs").write_text(str(pid))

    def limit(self, num_bytes: int, attempts: int = 20) -> None:
        """Set the limit, reclaiming page cache above it; OSError when that is not enough."""
        for attempt in range(attempts):  # reclaim may need the disk to finish writing
            try:
                (self.path / self._limit_file).write_text(str(num_bytes))
                return
            except OSError:
                if attempt == attempts - 1:
                    raise
                time.sleep(0.25)

    def remove(self) -> None:
        """Delete the group; its processes must have ended."""
        for _ in range(50):
            try:
                self.path.rmdir()
                return
            except FileNotFoundError:
                return
            except OSError:
                time.sleep(0.1)


def drop_page_cache(paths: Iterable[str | Path]) -> None:
    """Write these files out and forget the kernel's cached pages of them."""
    for path in paths:
        descriptor = os.open(path, os.O_RDONLY)
        try:
            os.fdatasync(descriptor)
            os.posix_fadvise(descriptor, 0, 0, os.POSIX_FADV_DONTNEED)
        finally:
            os.close(descriptor)


def files_under(*folders: str | Path) -> list[Path]:
    return [p for folder in folders for p in sorted(Path(folder).rglob("*")) if p.is_file()]


def disk_read_bytes() -> int:
    """Bytes this process has made the storage read so far (page cache hits do not count)."""
    for line in Path("/proc/self/io").read_text().splitlines():
        if line.startswith("read_bytes:"):
            return int(line.split()[1])
    raise RuntimeError("/proc/self/io has no read_bytes")


def memory_bytes() -> dict[str, int]:
    """Resident memory of this process in bytes: now, its peak, and its parts."""
    names = {"VmHWM": "peak", "VmRSS": "now", "RssAnon": "anonymous", "RssFile": "files"}
    found = {}
    for line in Path("/proc/self/status").read_text().splitlines():
        key, _, rest = line.partition(":")
        if key in names:
            found[names[key]] = int(rest.split()[0]) * 1024
    return found
