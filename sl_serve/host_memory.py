"""Large host buffers: exact in size, on huge pages where the system has them."""

from __future__ import annotations

import mmap
from collections.abc import Callable
from contextlib import suppress

import torch

from sl_serve.numa import interleave, memory_nodes

Allocate = Callable[[int], torch.Tensor]  # bytes -> host memory of that size, uint8


def host_empty(n_bytes: int) -> torch.Tensor:
    """Zeroed memory as uint8, page-aligned, taken from the system when it is first written.

    Huge pages spare attention and matmuls most of their address translation: a pass over
    gigabytes touches each 4 KiB page once and would miss in the TLB every time.
    """
    # Python's default for anonymous memory is a shared mapping, which gets no huge pages.
    area = mmap.mmap(-1, n_bytes, flags=mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS)
    if hasattr(mmap, "MADV_HUGEPAGE"):
        with suppress(OSError):  # a kernel without them
            area.madvise(mmap.MADV_HUGEPAGE)
    buffer = torch.frombuffer(area, dtype=torch.uint8)  # keeps `area` alive
    nodes = memory_nodes()
    if len(nodes) > 1:
        interleave(buffer.data_ptr(), n_bytes, nodes)
    return buffer
