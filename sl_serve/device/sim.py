"""A device that is not there: real copies, poisoned memory, a virtual clock.

What a real device does at some time, this one does at the latest moment it may (reads of copied
data) and at the earliest (destruction of what a copy overwrites), so a missing wait becomes a
wrong token on any machine:

- a queued copy fills its destination with NaN at once, and writes the data only when someone
  waits for an event behind it: reading too early reads NaN, reusing a slot too early hurts the
  reader that is still to come;
- the source is read at that late moment too: overwriting it too early shows as well;
- a copy that starts, on the virtual clock, before the last computation that read its destination
  has ended raises SlotReuseError: the program order was right by luck, the streams' was not.

The clock: each stream has its own time, and so has the processor; a copy takes bytes / bandwidth,
a computation FLOPs / rate or, where it only moves bytes (layers that are expanded), those / the
memory's bandwidth, the processor's attention bytes of KV / the rate of its own memory; an event is
a time, a wait moves a stream's time to it.
"""

from __future__ import annotations

import math
from collections import deque
from collections.abc import Sequence
from dataclasses import dataclass
from threading import Lock

import torch

from sl_serve.device.base import Event, HostWork, Stream
from sl_serve.device.timeline import Span
from sl_serve.errors import SlServeError
from sl_serve.host_memory import host_empty
from sl_serve.plan.hardware import Hardware


class SlotReuseError(SlServeError):
    """A buffer was overwritten before its last reader was done."""


@dataclass(frozen=True, slots=True)
class HardwareProfile:
    """Rates of a machine: link bandwidth each way, arithmetic, memory on either side."""

    name: str
    down_bytes_per_s: float
    up_bytes_per_s: float
    flops_per_s: float
    memory_bytes_per_s: float = math.inf  # of the device's memory, reads and writes together
    host_bytes_per_s: float = math.inf  # of KV that the processor attends to

    @classmethod
    def of(cls, hardware: Hardware) -> HardwareProfile:
        """A machine that the planner knows."""
        return cls(
            hardware.name,
            hardware.link_down_bytes_per_s,
            hardware.link_up_bytes_per_s,
            hardware.matmul.peak_flops_per_s,
            hardware.device_read_bytes_per_s,
            hardware.host_attention.prefix_bytes_per_s,
        )


PCIE4_A100 = HardwareProfile("pcie4-a100", 24e9, 22e9, 200e12, 1.3e12)


@dataclass(frozen=True, slots=True)
class SimEvent:
    stream: Stream
    n_copies: int  # copies queued on the stream before this point
    time_s: float


@dataclass(slots=True)
class _Queue:
    pending: deque[tuple[torch.Tensor, torch.Tensor]]
    n_queued: int = 0
    n_done: int = 0
    time_s: float = 0.0


class SimDevice:
    name = "sim"
    in_place = False
    torch_device = torch.device("cpu")

    def __init__(self, profile: HardwareProfile = PCIE4_A100) -> None:
        self.profile = profile
        self._spans: list[Span] = []
        self._zero_s: float | None = None  # where a timeline starts
        self._queues = {s: _Queue(deque()) for s in Stream}
        self._read_until_s: dict[int, float] = {}  # buffer address -> end of its last reading
        self._host_s = 0.0  # the processor's own time
        self._copying = Lock()  # a worker waits for copies too
        self._stall_s = 0.0
        self.n_bytes_down = 0
        self.n_bytes_up = 0

    def check_dtype(self, dtype: torch.dtype) -> None:
        pass

    def empty(self, n_bytes: int) -> torch.Tensor:
        return torch.full((n_bytes,), 0xFF, dtype=torch.uint8)

    def host_empty(self, n_bytes: int) -> torch.Tensor:
        return host_empty(n_bytes)

    def upload(self, tensor: torch.Tensor) -> torch.Tensor:
        return tensor.clone()

    def copy(self, stream: Stream, dst: torch.Tensor, src: torch.Tensor, name: str = "") -> None:
        assert dst.shape == src.shape, f"{dst.shape} <- {src.shape}"
        queue = self._queues[stream]
        read_until_s = self._read_until_s.get(dst.untyped_storage().data_ptr(), 0.0)
        if stream is Stream.LOAD and queue.time_s < read_until_s:
            raise SlotReuseError(
                f"a copy starts at {queue.time_s:.6f} s into memory read until {read_until_s:.6f} s"
            )
        dst.fill_(0xFF)  # all bits set: NaN in every float format
        queue.pending.append((dst, src))
        queue.n_queued += 1
        if stream is Stream.LOAD:
            rate = self.profile.down_bytes_per_s
            self.n_bytes_down += dst.numel()
        else:
            rate = self.profile.up_bytes_per_s
            self.n_bytes_up += dst.numel()
        self._spend(stream, name, dst.numel() / rate)

    def record(self, stream: Stream) -> SimEvent:
        queue = self._queues[stream]
        return SimEvent(stream, queue.n_queued, queue.time_s)

    def wait(self, stream: Stream, event: Event) -> None:
        assert isinstance(event, SimEvent)
        self.synchronize(event)
        queue = self._queues[stream]
        if stream is Stream.COMPUTE:
            self._stall_s += max(0.0, event.time_s - queue.time_s)
        queue.time_s = max(queue.time_s, event.time_s)

    def synchronize(self, event: Event) -> None:
        assert isinstance(event, SimEvent)
        queue = self._queues[event.stream]
        with self._copying:
            while queue.n_done < event.n_copies:
                dst, src = queue.pending.popleft()
                dst.copy_(src)
                queue.n_done += 1

    def computed(
        self, n_flops: float, reads: Sequence[torch.Tensor], name: str = "", n_bytes: float = 0.0
    ) -> None:
        seconds = n_flops / self.profile.flops_per_s + n_bytes / self.profile.memory_bytes_per_s
        self._spend(Stream.COMPUTE, name, seconds)
        for buffer in reads:
            address = buffer.untyped_storage().data_ptr()
            self._read_until_s[address] = self._queues[Stream.COMPUTE].time_s

    def host_read(self, after: Event, n_bytes: int, work: HostWork, name: str = "") -> Event:
        assert isinstance(after, SimEvent)
        start_s = max(self._host_s, after.time_s)
        self._host_s = start_s + n_bytes / self.profile.host_bytes_per_s
        self._note("host", name, start_s, self._host_s)
        return SimEvent(after.stream, after.n_copies, self._host_s)

    def stall_s(self) -> float:
        stall_s, self._stall_s = self._stall_s, 0.0
        return stall_s

    def start_timeline(self) -> None:
        self._spans, self._zero_s = [], self.time_s

    def take_timeline(self) -> list[Span]:
        self._zero_s = None
        return self._spans

    def close(self) -> None:
        pass

    @property
    def time_s(self) -> float:
        """Virtual time at which everything queued so far is done."""
        return max(q.time_s for q in self._queues.values())

    def _spend(self, stream: Stream, name: str, seconds: float) -> None:
        """The stream is busy for that long."""
        queue = self._queues[stream]
        start_s = queue.time_s
        queue.time_s += seconds
        self._note(stream.name.lower(), name, start_s, queue.time_s)

    def _note(self, stream: str, name: str, start_s: float, stop_s: float) -> None:
        if self._zero_s is not None:
            self._spans.append(Span(stream, name, start_s - self._zero_s, stop_s - self._zero_s))
