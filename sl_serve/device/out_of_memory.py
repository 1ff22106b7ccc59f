"""Telling a shortage of memory, after which a smaller step may succeed, from other failures."""

from __future__ import annotations

import torch

# Where neither torch nor Python has a class for it. None of these spoils the device's context.
SIGNS = (
    "DefaultCPUAllocator: can't allocate memory",
    "CUDA error: out of memory",
    "CUBLAS_STATUS_ALLOC_FAILED",
)


def is_out_of_memory(error: BaseException) -> bool:
    """Of the host or of a device, whoever asked for it."""
    if isinstance(error, MemoryError | torch.OutOfMemoryError):
        return True
    return isinstance(error, RuntimeError) and any(sign in str(error) for sign in SIGNS)
