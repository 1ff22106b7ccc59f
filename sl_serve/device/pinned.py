"""Host memory that the GPU copies from by itself, and the way around where that is refused.

Only page-locked ("pinned") memory is copied at the link's full rate and beside the arithmetic.
torch's own pinned allocator rounds sizes up to powers of two, up to twice the memory asked for;
here buffers of the exact size are registered with the driver instead.
"""

from __future__ import annotations

import logging
from collections.abc import Callable, Sequence
from typing import Protocol

import torch

from sl_serve.host_memory import host_empty
from sl_serve.plan.budget import gib

logger = logging.getLogger(__name__)


class CudaRuntime(Protocol):
    """The part of torch.cuda.cudart() that is needed; results are cudaError, 0 is success."""

    def cudaHostRegister(self, address: int, n_bytes: int, flags: int) -> int: ...

    def cudaHostUnregister(self, address: int) -> int: ...


class PinnedBuffers:
    """Host buffers registered with the driver, kept until `close`: memory must not go back to the
    system while the driver has it."""

    def __init__(self, runtime: CudaRuntime, clear_error: Callable[[], None]) -> None:
        """`clear_error`: consumes the error that a refused registration leaves behind, which
        otherwise the next kernel launch would report as its own."""
        self._runtime, self._clear_error = runtime, clear_error
        self._buffers: dict[int, torch.Tensor] = {}  # by address
        self._has_warned = False

    def __contains__(self, tensor: torch.Tensor) -> bool:
        return tensor.untyped_storage().data_ptr() in self._buffers

    def empty(self, n_bytes: int) -> torch.Tensor:
        """uint8, registered if the system allows it."""
        buffer = host_empty(n_bytes)
        # An enum of torch's, which has not a name for every number.
        error = int(self._runtime.cudaHostRegister(buffer.data_ptr(), n_bytes, 0))
        if error == 0:
            self._buffers[buffer.data_ptr()] = buffer
        else:
            self._clear_error()
            self._warn(n_bytes, error)
        return buffer

    def close(self) -> None:
        while self._buffers:
            address, _ = self._buffers.popitem()
            self._runtime.cudaHostUnregister(address)

    def _warn(self, n_bytes: int, error: int) -> None:
        if not self._has_warned:
            logger.warning(
                "%s of host memory could not be page-locked (CUDA error %d): copies to the GPU go "
                "through a small buffer and the processor, at perhaps half the link's rate; raise "
                "the limit (ulimit -l unlimited, docker run --ulimit memlock=-1, or memory= in "
                ".wslconfig), or lower --kv-memory",
                gib(n_bytes),
                error,
            )
        self._has_warned = True


class StagedEvent(Protocol):
    def synchronize(self) -> None: ...


class StagingRing:
    """Copies from ordinary memory through a few pinned slots.

    Order: the host writes a slot only after the event behind the last copy that read it. The
    source may be changed as soon as `copy` returns.
    """

    def __init__(self, slots: Sequence[torch.Tensor]) -> None:
        """`slots`: pinned, of equal size, uint8."""
        self._slots = slots
        self._copied: list[StagedEvent | None] = [None] * len(slots)
        self._next = 0

    def copy(
        self,
        dst: torch.Tensor,
        src: torch.Tensor,
        queue: Callable[[torch.Tensor, torch.Tensor], StagedEvent],
    ) -> None:
        """dst <- src (uint8), piece by piece. `queue(dst, src)` queues one and gives the event
        behind it."""
        slot_bytes = self._slots[0].numel()
        for start in range(0, src.numel(), slot_bytes):
            piece = src[start : start + slot_bytes]
            copied = self._copied[self._next]
            if copied is not None:
                copied.synchronize()
            staged = self._slots[self._next][: piece.numel()].copy_(piece)
            self._copied[self._next] = queue(dst[start : start + piece.numel()], staged)
            self._next = (self._next + 1) % len(self._slots)
