"""What memory this process may still take."""

from __future__ import annotations

import re
from pathlib import Path

import psutil

from sl_serve.errors import UserError

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


_UNITS = {"": 1, "K": 10**3, "M": 10**6, "G": 10**9, "T": 10**12}
_UNITS |= {f"{u}I": 1 << (10 * i) for i, u in enumerate("KMGT", start=1)}


def parse_size(text: str) -> int:
    """Bytes from "24GiB", "700 MB", "8G" (as GB) or a plain number. Raises UserError."""
    found = re.fullmatch(r"\s*(\d+(?:\.\d+)?)\s*([KMGT]?I?)B?\s*", text.upper())
    if found is None:
        raise UserError(f"'{text}' is no size; write it like 700MB, 8GiB or 8589934592")
    return int(float(found[1]) * _UNITS[found[2]])
