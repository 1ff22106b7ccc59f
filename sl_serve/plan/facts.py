"""Facts about this machine, read from the system and measured."""

from __future__ import annotations

import os
import re
import resource
import shutil
import subprocess
from pathlib import Path

import psutil
import torch

from sl_serve.plan.budget import CGROUP_FILES, available_bytes
from sl_serve.plan.doctor import Facts
from sl_serve.plan.probe import Say, disk_read_bytes_per_s, host_read_bytes_per_s

HUGE_PAGES = Path("/sys/kernel/mm/transparent_hugepage/enabled")
CGROUP_ROOT = Path("/sys/fs/cgroup")
_PCIE_FIELDS = "name,pcie.link.gen.max,pcie.link.width.current,pcie.link.width.max"


def gather(disk_dir: Path | None, say: Say) -> Facts:
    """Takes some seconds. Raises UserError when `disk_dir` cannot be used."""
    say("host memory")
    host_read = host_read_bytes_per_s()
    disk_read, disk_free = None, None
    if disk_dir is not None:
        say(f"disk at {disk_dir}")
        disk_read = disk_read_bytes_per_s(disk_dir)
        disk_free = shutil.disk_usage(disk_dir).free
    link = None
    if torch.cuda.is_available():
        from sl_serve.plan.probe_device import link_down_bytes_per_s

        say("link")
        link = link_down_bytes_per_s()
    name, generation, width, max_width = _pcie()
    return Facts(
        total_bytes=psutil.virtual_memory().total,
        available_bytes=available_bytes(),
        swap_used_bytes=psutil.swap_memory().used,
        cgroup_limit_bytes=cgroup_limit_bytes(CGROUP_ROOT),
        memlock_bytes=_memlock_bytes(),
        huge_pages=huge_pages(HUGE_PAGES),
        native_target=_native_target(),
        n_cores=len(os.sched_getaffinity(0)),
        n_machine_cores=os.cpu_count() or 1,
        n_threads=torch.get_num_threads(),
        host_read_bytes_per_s=host_read,
        has_device=link is not None,
        device_name=name,
        link_bytes_per_s=link,
        pcie_generation=generation,
        pcie_width=width,
        pcie_max_width=max_width,
        disk_dir=None if disk_dir is None else str(disk_dir),
        disk_read_bytes_per_s=disk_read,
        disk_free_bytes=disk_free,
    )


def cgroup_limit_bytes(root: Path) -> int | None:
    """The smallest limit of those that are set."""
    limits = []
    for files in CGROUP_FILES:
        try:
            limits.append(int((root / files.limit).read_text()))
        except (OSError, ValueError):  # absent, or "max"
            continue
    return min(limits, default=None)


def huge_pages(path: Path) -> str | None:
    """The word in brackets: always [madvise] never."""
    try:
        found = re.search(r"\[(\w+)\]", path.read_text())
    except OSError:
        return None
    return found[1] if found else None


def parse_pcie(line: str) -> tuple[str | None, int | None, int | None, int | None]:
    """Name, generation, lanes now and at most, from a line of nvidia-smi's CSV."""
    fields = [field.strip() for field in line.split(",")]
    if len(fields) != 4:
        return None, None, None, None
    numbers = [int(field) if field.isdigit() else None for field in fields[1:]]
    return fields[0], numbers[0], numbers[1], numbers[2]


def _pcie() -> tuple[str | None, int | None, int | None, int | None]:
    """Of the first accelerator. The generation is the greatest that card and slot have in common:
    an idle link sleeps in a lower one."""
    command = ["nvidia-smi", f"--query-gpu={_PCIE_FIELDS}", "--format=csv,noheader,nounits"]
    try:
        done = subprocess.run(command, capture_output=True, text=True, check=True, timeout=20)
    except (OSError, subprocess.SubprocessError):
        return None, None, None, None
    return parse_pcie(done.stdout.partition("\n")[0])


def _memlock_bytes() -> int | None:
    limit = resource.getrlimit(resource.RLIMIT_MEMLOCK)[0]
    return None if limit == resource.RLIM_INFINITY else limit


def _native_target() -> str | None:
    try:
        from sl_serve._native import targets
    except ImportError:
        return None
    return targets()[0]
