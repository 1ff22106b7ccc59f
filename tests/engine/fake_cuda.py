"""torch.cuda's streams, events and runtime on the processor, for CudaDevice without a GPU.

Copies on the two copy streams run when someone waits for an event behind them, no sooner: what a
missing wait would leave unread, or read too late, shows.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Iterator
from contextlib import contextmanager

import pytest
import torch

from sl_serve.device import CudaDevice, Stream
from sl_serve.device import cuda as cuda_module

SLOT_BYTES = 64


class FakeStream:
    def __init__(self, is_eager: bool = False) -> None:
        self.is_eager = is_eager
        self.pending: deque[tuple[torch.Tensor, torch.Tensor]] = deque()
        self.n_queued = 0

    def queue(self, dst: torch.Tensor, src: torch.Tensor) -> None:
        self.pending.append((dst, src))
        self.n_queued += 1
        if self.is_eager:
            self.run_to(self.n_queued)

    def run_to(self, position: int) -> None:
        while self.n_queued - len(self.pending) < position:
            dst, src = self.pending.popleft()
            dst.copy_(src)

    def record_event(self) -> FakeEvent:
        event = FakeEvent()
        event.record(self)
        return event

    def wait_event(self, event: FakeEvent) -> None:
        event.synchronize()


class FakeEvent:
    clock = 0  # milliseconds: one per recorded event

    def __init__(self, enable_timing: bool = False) -> None:
        self.enable_timing = enable_timing

    def record(self, stream: FakeStream) -> None:
        self.stream, self.position = stream, stream.n_queued
        FakeEvent.clock += 1
        self.recorded_at = FakeEvent.clock

    def synchronize(self) -> None:
        self.stream.run_to(self.position)

    def elapsed_time(self, later: FakeEvent) -> float:
        assert self.enable_timing and later.enable_timing
        return float(later.recorded_at - self.recorded_at)


class FakeRuntime:
    """cudaHostRegister that allows `limit_bytes` in all."""

    def __init__(self, limit_bytes: int = 1 << 60) -> None:
        self.left_bytes = limit_bytes
        self.registered: dict[int, int] = {}  # address -> bytes
        self.n_refused = 0

    def cudaHostRegister(self, address: int, n_bytes: int, flags: int) -> int:
        assert flags == 0 and address not in self.registered
        if n_bytes > self.left_bytes:
            self.n_refused += 1
            return 2  # cudaErrorMemoryAllocation
        self.left_bytes -= n_bytes
        self.registered[address] = n_bytes
        return 0

    def cudaHostUnregister(self, address: int) -> int:
        self.left_bytes += self.registered.pop(address)
        return 0


class LazyCudaDevice(CudaDevice):
    """Queues copies on fake streams instead of asking torch to."""

    def _queue(self, stream: Stream, dst: torch.Tensor, src: torch.Tensor) -> None:
        self._streams[stream].queue(dst, src)


@contextmanager
def fake_cuda(runtime: FakeRuntime, slot_bytes: int = SLOT_BYTES) -> Iterator[None]:
    """torch.cuda as CudaDevice sees it; `slot_bytes` of each staging slot."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(torch.cuda, "is_available", lambda: True)
        patch.setattr(torch.cuda, "Stream", FakeStream)
        patch.setattr(torch.cuda, "Event", FakeEvent)
        patch.setattr(torch.cuda, "default_stream", lambda: FakeStream(is_eager=True))
        patch.setattr(torch.cuda, "cudart", lambda: runtime)
        patch.setattr(torch.cuda, "is_bf16_supported", lambda including_emulation: True)
        patch.setattr(
            cuda_module, "_staging_slot", lambda: torch.empty(slot_bytes, dtype=torch.uint8)
        )
        yield
