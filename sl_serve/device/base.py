"""The seam between the sweep and a machine: memory, queued copies, and order between them."""

from __future__ import annotations

from collections.abc import Sequence
from enum import IntEnum
from typing import NamedTuple, Protocol

import torch

from sl_serve.device.timeline import Span


class Stream(IntEnum):
    """Queues of work that run beside each other; each in its own order."""

    LOAD = 0  # host to device
    COMPUTE = 1  # whatever torch computes with the device's tensors
    STORE = 2  # device to host


class Event(Protocol):
    """A point in a stream's work."""


class HostWork(NamedTuple):
    """When the processor did something, by time.perf_counter."""

    start_s: float
    stop_s: float


class Device(Protocol):
    """Copies are queued, not done: only `wait` (a stream waits) and `synchronize` (the host waits)
    say when they are complete. Never a device-wide synchronise.
    """

    name: str
    in_place: bool  # host memory is device memory: nothing is copied, nothing here is called
    torch_device: torch.device  # of the memory that `empty` gives

    def check_dtype(self, dtype: torch.dtype) -> None:
        """Raises UserError where the device cannot compute with `dtype`."""

    def empty(self, n_bytes: int) -> torch.Tensor:
        """Device memory as uint8, for buffers made before the first step.

        Raises MemoryBudgetError when there is not so much.
        """

    def host_empty(self, n_bytes: int) -> torch.Tensor:
        """Host memory as uint8 that copies run from and to at the link's full rate; of this size
        exactly, the device's until `close`."""

    def upload(self, tensor: torch.Tensor) -> torch.Tensor:
        """A copy of a host tensor for what is computed from now on; `tensor` may be changed at
        once. Where host memory is device memory it is `tensor` itself."""

    def copy(self, stream: Stream, dst: torch.Tensor, src: torch.Tensor, name: str = "") -> None:
        """Queue dst <- src (uint8, same length). `name` is for the timeline."""

    def record(self, stream: Stream) -> Event:
        """The point after all work queued on `stream` so far."""

    def wait(self, stream: Stream, event: Event) -> None:
        """Work queued on `stream` from now on starts after `event`."""

    def synchronize(self, event: Event) -> None:
        """Block the host until `event`."""

    def computed(
        self, n_flops: float, reads: Sequence[torch.Tensor], name: str = "", n_bytes: float = 0.0
    ) -> None:
        """Tell that work reading these buffers was queued on the compute stream: arithmetic, or
        n_bytes read and written in the device's memory."""

    def host_read(self, after: Event, n_bytes: int, work: HostWork, name: str = "") -> Event:
        """Tell that the processor waited for `after`, and for its own earlier work, and has since
        read n_bytes of host memory. The point when it was done."""

    def stall_s(self) -> float:
        """Seconds the compute stream has waited for copies since the last call; 0 where that is
        not measured."""

    def start_timeline(self) -> None:
        """Note every copy and computation from now on."""

    def take_timeline(self) -> list[Span]:
        """What was noted since, in the order it was queued; blocks until it has run. Stops."""

    def close(self) -> None:
        """After the last step: give back what the system holds for us."""
