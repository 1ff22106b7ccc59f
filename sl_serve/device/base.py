"""The seam between the sweep and a machine: memory, queued copies, and order between them."""

from __future__ import annotations

from collections.abc import Sequence
from enum import IntEnum
from typing import Protocol

import torch


class Stream(IntEnum):
    """Queues of work that run beside each other; each in its own order."""

    LOAD = 0  # host to device
    COMPUTE = 1
    STORE = 2  # device to host


class Event(Protocol):
    """A point in a stream's work."""


class Device(Protocol):
    """Copies are queued, not done: only `wait` (a stream waits) and `synchronize` (the host waits)
    say when they are complete. Never a device-wide synchronise.
    """

    name: str
    in_place: bool  # host memory is device memory: nothing is copied, nothing here is called

    def empty(self, n_bytes: int) -> torch.Tensor:
        """Device memory as uint8, for buffers made before the first step."""

    def copy(self, stream: Stream, dst: torch.Tensor, src: torch.Tensor) -> None:
        """Queue dst <- src (uint8, same length)."""

    def record(self, stream: Stream) -> Event:
        """The point after all work queued on `stream` so far."""

    def wait(self, stream: Stream, event: Event) -> None:
        """Work queued on `stream` from now on starts after `event`."""

    def synchronize(self, event: Event) -> None:
        """Block the host until `event`."""

    def computed(self, n_flops: float, reads: Sequence[torch.Tensor]) -> None:
        """Tell that arithmetic reading these buffers was queued on the compute stream."""

    def stall_s(self) -> float:
        """Seconds the compute stream has waited for copies since the last call."""
