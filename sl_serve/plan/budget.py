"""What memory this process may still take."""

from __future__ import annotations

from pathlib import Path

import psutil

GIB = 1 << 30

# (limit, current use) of the control group, version 2 first; paths as the kernel documents them.
CGROUP_FILES = (
    ("memory.max", "memory.current"),
    ("memory/memory.limit_in_bytes", "memory/memory.usage_in_bytes"),
)


def available_bytes(cgroup_root: Path = Path("/sys/fs/cgroup")) -> int:
    """Host memory that is free for us: what the kernel estimates, or less where a container's
    limit is nearer."""
    free = psutil.virtual_memory().available
    for limit_name, usage_name in CGROUP_FILES:
        limit = _read_int(cgroup_root / limit_name)
        usage = _read_int(cgroup_root / usage_name)
        if limit is not None and usage is not None:
            free = min(free, max(0, limit - usage))
    return int(free)


def _read_int(path: Path) -> int | None:
    try:
        return int(path.read_text())
    except (OSError, ValueError):  # absent, or "max"
        return None


def gib(n_bytes: float) -> str:
    """For people: 41.2 GiB, or MiB below one."""
    if n_bytes < GIB:
        return f"{n_bytes / (1 << 20):.0f} MiB"
    return f"{n_bytes / GIB:.1f} GiB"
