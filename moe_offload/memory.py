"""How much host memory this process may still take: the machine's, or its container's if less."""

from __future__ import annotations

from pathlib import Path

_CGROUPS = (
    ("memory.max", "memory.current", "memory.stat", ("inactive_file ", "active_file ")),
    (
        "memory/memory.limit_in_bytes",
        "memory/memory.usage_in_bytes",
        "memory/memory.stat",
        ("total_inactive_file ", "total_active_file "),
    ),
)


def available_memory_bytes(root: str = "/") -> int:
    """Bytes that can be allocated without swapping or being killed.

    The smaller of the kernel's MemAvailable and what the control group (v2 or v1) leaves; file
    pages that can be dropped count as free in both. `root` is for tests.
    """
    available = 1 << 62
    for line in _read(Path(root, "proc/meminfo")).splitlines():
        if line.startswith("MemAvailable:"):
            available = int(line.split()[1]) * 1024
    base = Path(root, "sys/fs/cgroup")
    for limit_name, usage_name, stat_name, droppable in _CGROUPS:
        limit, usage = _read(base / limit_name).strip(), _read(base / usage_name).strip()
        if limit.isdigit() and usage.isdigit():
            reclaimable = sum(
                int(line.split()[1])
                for line in _read(base / stat_name).splitlines()
                if line.startswith(droppable)
            )
            available = min(available, max(0, int(limit) - int(usage) + reclaimable))
    return available


def _read(path: Path) -> str:
    try:
        return path.read_text()
    except OSError:
        return ""
