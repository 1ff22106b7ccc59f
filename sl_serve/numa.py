"""Large buffers on machines whose memory belongs to several processors.

Memory lies with the processor that first writes it: a model that one thread loads would lie with
one of them, and everybody would read at that one's rate. Interleaved page by page, all memory
controllers serve every read.
"""

from __future__ import annotations

import ctypes
import platform
from collections.abc import Sequence
from pathlib import Path

NODES_FILE = Path("/sys/devices/system/node/has_memory")
MPOL_INTERLEAVE = 3  # linux/mempolicy.h
MBIND = {"x86_64": 237, "aarch64": 235}  # numbers of the system call
MASK_BITS = 1024


def memory_nodes(listing: Path = NODES_FILE) -> list[int]:
    """The nodes that have memory; empty where the system does not say."""
    try:
        text = listing.read_text().strip()
    except OSError:
        return []
    nodes: list[int] = []
    for part in filter(None, text.split(",")):
        first, _, last = part.partition("-")
        nodes += range(int(first), int(last or first) + 1)
    return nodes


def interleave(address: int, n_bytes: int, nodes: Sequence[int]) -> bool:
    """Spread pages that are yet to be written over `nodes`. `address`: of a page. False where the
    system cannot, which leaves things as they were."""
    number = MBIND.get(platform.machine())
    if number is None:
        return False
    words = [0] * (MASK_BITS // 64)
    for node in nodes:
        words[node // 64] |= 1 << (node % 64)
    mask = (ctypes.c_uint64 * len(words))(*words)
    call = ctypes.CDLL(None, use_errno=True).syscall
    where = (ctypes.c_void_p(address), ctypes.c_ulong(n_bytes))
    how = (ctypes.c_int(MPOL_INTERLEAVE), mask, ctypes.c_ulong(MASK_BITS), ctypes.c_uint(0))
    return bool(call(ctypes.c_long(number), *where, *how) == 0)
