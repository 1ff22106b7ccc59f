"""What memory this process may still take."""

from __future__ import annotations

import re
from pathlib import Path
from typing import NamedTuple

import psutil

from sl_serve.errors import MemoryBudgetError, UserError

KIB, MIB, GIB = 1 << 10, 1 << 20, 1 << 30


class CgroupFiles(NamedTuple):
    """Where a version of control groups says what; paths as the kernel documents them."""

    limit: str
    usage: str
    statistics: str
    reclaimable: str  # the line in `statistics`: cached pages of files not used lately


CGROUP_FILES = (
    CgroupFiles("memory.max", "memory.current", "memory.stat", "inactive_file"),
    CgroupFiles(
        "memory/memory.limit_in_bytes",
        "memory/memory.usage_in_bytes",
        "memory/memory.stat",
        "total_inactive_file",
    ),
)


def available_bytes(cgroup_root: Path = Path("/sys/fs/cgroup")) -> int:
    """Host memory that is free for us: what the kernel estimates, or less where a container's
    limit is nearer."""
    free = psutil.virtual_memory().available
    for files in CGROUP_FILES:
        limit = _read_int(cgroup_root / files.limit)
        usage = _read_int(cgroup_root / files.usage)
        if limit is not None and usage is not None:
            # A page cache, such as that of a model file just read, gives way when memory is asked.
            used = max(0, usage - _read_line(cgroup_root / files.statistics, files.reclaimable))
            free = min(free, max(0, limit - used))
    return int(free)


def host_budget_bytes(ceiling_bytes: int | None) -> int:
    """What may still be taken: all that is free, or what a ceiling on the whole process leaves.

    Raises MemoryBudgetError for a ceiling that is not there.
    """
    free = available_bytes()
    if ceiling_bytes is None:
        return free
    used = int(psutil.Process().memory_info().rss)
    if ceiling_bytes - used > free:
        raise MemoryBudgetError(
            f"--host-memory asks for {gib(ceiling_bytes)}, {gib(free + used)} are there "
            f"(the machine has {gib(psutil.virtual_memory().total)}); lower it, or leave it out"
        )
    return max(0, ceiling_bytes - used)


def _read_int(path: Path) -> int | None:
    try:
        return int(path.read_text())
    except (OSError, ValueError):  # absent, or "max"
        return None


def _read_line(path: Path, name: str) -> int:
    """The number behind `name` in a file of such lines; 0 where there is none."""
    try:
        found = re.search(rf"^{name} (\d+)$", path.read_text(), re.MULTILINE)
    except OSError:
        return 0
    return int(found[1]) if found else 0


def gib(n_bytes: float) -> str:
    """For people: 41.2 GiB, or MiB below one."""
    if round(n_bytes / MIB) < GIB // MIB:
        return f"{n_bytes / MIB:.0f} MiB"
    return f"{n_bytes / GIB:.1f} GiB"


def exact_size(n_bytes: int) -> str:
    """To be given back to us: 80MiB, in the largest unit that leaves nothing over."""
    for size, unit in ((GIB, "GiB"), (MIB, "MiB"), (KIB, "KiB")):
        if n_bytes % size == 0:
            return f"{n_bytes // size}{unit}"
    return str(n_bytes)


_UNITS = {"": 1, "K": 10**3, "M": 10**6, "G": 10**9, "T": 10**12}
_UNITS |= {f"{u}I": 1 << (10 * i) for i, u in enumerate("KMGT", start=1)}


def parse_size(text: str) -> int:
    """Bytes from "24GiB", "700 MB", "8G" (as GB) or a plain number. Raises UserError."""
    found = re.fullmatch(r"\s*(\d+(?:\.\d+)?)\s*((?:[KMGT]I?)?)B?\s*", text.upper())
    if found is None:
        raise UserError(f"'{text}' is no size; write it like 700MB, 8GiB or 8589934592")
    return int(float(found[1]) * _UNITS[found[2]])
