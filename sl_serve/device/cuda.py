"""An NVIDIA GPU: three streams and events between them.

Stream.COMPUTE is torch's default stream, so whatever torch computes with the device's tensors is on
it without anyone saying so. LOAD and STORE come from torch's pool, whose streams do not wait for
the default one by themselves: all order is made by events.

Lifetimes. torch's allocator gives a freed block to the next taker on the stream it was taken on,
at once, because it takes that stream's order for granted; a block that another stream still copies
to or from must therefore not be freed. Here the two other streams touch only what `empty` gave
(slots, windows, staging), taken before the first step and held by its owner for the engine's life.
What comes and goes within a step (activations, uploads) is taken, used and freed on COMPUTE alone.
"""

from __future__ import annotations

import time
from collections.abc import Sequence
from contextlib import suppress
from typing import Any

import torch

from sl_serve.device.base import Event, HostWork, Stream
from sl_serve.device.pinned import PinnedBuffers, StagingRing
from sl_serve.device.timeline import Span
from sl_serve.errors import MemoryBudgetError, UserError
from sl_serve.plan.budget import gib

STAGING_SLOT_BYTES = 8 << 20  # a power of two: torch's pinned allocator gives it as it is
STAGING_SLOTS = 4
FIRST_GPU = torch.device("cuda", 0)
_cuda: Any = torch.cuda  # few of its functions have types


def cuda_budget_bytes(ceiling_bytes: int | None) -> int:
    """Raises UserError without a GPU, MemoryBudgetError for a ceiling above what is free."""
    if not _cuda.is_available():
        raise UserError(_why_no_gpu())
    free_bytes, total_bytes = _cuda.mem_get_info()
    if ceiling_bytes is None:
        return int(free_bytes)
    if ceiling_bytes > free_bytes:
        raise MemoryBudgetError(
            f"--device-memory asks for {gib(ceiling_bytes)}, {gib(free_bytes)} of "
            f"{gib(total_bytes)} are free on {_cuda.get_device_name()}; lower it, or leave it out"
        )
    return ceiling_bytes


class CudaDevice:
    """The first GPU that CUDA_VISIBLE_DEVICES shows."""

    name = "cuda"
    in_place = False

    def __init__(self, torch_device: torch.device = FIRST_GPU) -> None:
        """Raises UserError where there is no GPU, or torch is built without CUDA."""
        if not _cuda.is_available():
            raise UserError(_why_no_gpu())
        self.torch_device = torch_device
        self._streams: dict[Stream, Any] = {
            Stream.LOAD: _cuda.Stream(),
            Stream.COMPUTE: _cuda.default_stream(),
            Stream.STORE: _cuda.Stream(),
        }
        self._pinned = PinnedBuffers(_cuda.cudart(), self._clear_error)
        self._staging = StagingRing([_staging_slot() for _ in range(STAGING_SLOTS)])
        self._timeline: _Timeline | None = None
        self._waits: list[tuple[Any, Any]] = []  # events around each wait of COMPUTE

    def check_dtype(self, dtype: torch.dtype) -> None:
        if dtype is torch.bfloat16 and not _cuda.is_bf16_supported(including_emulation=False):
            raise UserError(
                f"--dtype bfloat16: {_cuda.get_device_name()} has no bfloat16 arithmetic; "
                "use --dtype float16"
            )

    def empty(self, n_bytes: int) -> torch.Tensor:
        try:
            return torch.empty(n_bytes, dtype=torch.uint8, device=self.torch_device)
        except torch.OutOfMemoryError:
            free_bytes, total_bytes = _cuda.mem_get_info()
            raise MemoryBudgetError(
                f"{gib(n_bytes)} of GPU memory are needed for one buffer, {gib(free_bytes)} of "
                f"{gib(total_bytes)} are free; lower --kv-memory or --look-ahead, or end what else "
                "uses the GPU"
            ) from None

    def host_empty(self, n_bytes: int) -> torch.Tensor:
        return self._pinned.empty(n_bytes)

    def upload(self, tensor: torch.Tensor) -> torch.Tensor:
        source = tensor.contiguous()
        uploaded = torch.empty_like(source, device=self.torch_device)
        self._copy_staged(Stream.COMPUTE, _bytes_of(uploaded), _bytes_of(source))
        return uploaded

    def copy(self, stream: Stream, dst: torch.Tensor, src: torch.Tensor, name: str = "") -> None:
        assert dst.shape == src.shape, f"{dst.shape} <- {src.shape}"
        timeline = self._timeline
        if timeline is not None:
            timeline.start(stream, name)
        if stream is Stream.LOAD and src not in self._pinned:
            self._copy_staged(stream, dst, src)
        else:
            # Up into memory that is not pinned the driver makes the host wait, which is slow but
            # right; staging buffers are small and rarely refused.
            self._queue(stream, dst, src)
        if timeline is not None:
            timeline.stop(stream)

    def record(self, stream: Stream) -> Event:
        event: Event = self._streams[stream].record_event()
        return event

    def wait(self, stream: Stream, event: Event) -> None:
        before = self._timing_mark() if stream is Stream.COMPUTE else None
        self._streams[stream].wait_event(event)
        if before is not None:
            self._waits.append((before, self._timing_mark()))
        if self._timeline is not None and stream is Stream.COMPUTE:
            self._timeline.restart_compute()

    def synchronize(self, event: Event) -> None:
        assert isinstance(event, _cuda.Event)
        event.synchronize()

    def computed(
        self, n_flops: float, reads: Sequence[torch.Tensor], name: str = "", n_bytes: float = 0.0
    ) -> None:
        if self._timeline is not None:
            self._timeline.add_compute(name)

    def host_read(self, after: Event, n_bytes: int, work: HostWork, name: str = "") -> Event:
        if self._timeline is not None:
            self._timeline.add_host(name, work)
        return after  # it has happened: what is queued from now on comes later by itself

    def stall_s(self) -> float:
        """Called when a step's results are there: then its waits are over."""
        waits, self._waits = self._waits, []
        total_ms = 0.0
        for before, after in waits:
            after.synchronize()
            total_ms += before.elapsed_time(after)
        return total_ms / 1e3

    def start_timeline(self) -> None:
        self._timeline = _Timeline(self._streams)

    def take_timeline(self) -> list[Span]:
        timeline, self._timeline = self._timeline, None
        return timeline.spans() if timeline else []

    def close(self) -> None:
        with suppress(RuntimeError):  # a GPU that has failed runs nothing any more
            for stream in Stream:
                self.synchronize(self.record(stream))
        self._pinned.close()

    def _queue(self, stream: Stream, dst: torch.Tensor, src: torch.Tensor) -> None:
        with _cuda.stream(self._streams[stream]):
            dst.copy_(src, non_blocking=True)

    def _copy_staged(self, stream: Stream, dst: torch.Tensor, src: torch.Tensor) -> None:
        def queue(dst: torch.Tensor, src: torch.Tensor) -> Any:
            self._queue(stream, dst, src)
            return self.record(stream)

        self._staging.copy(dst, src, queue)

    def _timing_mark(self) -> Any:
        event = _cuda.Event(enable_timing=True)
        event.record(self._streams[Stream.COMPUTE])
        return event

    def _clear_error(self) -> None:
        """A launch reports, and thereby clears, the error that is pending."""
        with suppress(RuntimeError):
            torch.empty(1, device=self.torch_device).fill_(1)


class _Timeline:
    """Timing events around copies and computations.

    A computation is taken to start where the compute stream's last wait, or the computation
    before it, ended: what Python takes to queue it counts as its own. The processor's clock and the
    GPU's meet where the timeline starts.
    """

    def __init__(self, streams: dict[Stream, Any]) -> None:
        self._streams = streams
        self._zero = self._mark(Stream.COMPUTE)
        self._zero.synchronize()  # between steps: nothing is waited for
        self._host_zero_s = time.perf_counter()
        self._compute_from = self._zero
        self._open: dict[Stream, tuple[str, Any]] = {}
        self._spans: list[tuple[Stream, str, Any, Any]] = []
        self._host_spans: list[Span] = []

    def start(self, stream: Stream, name: str) -> None:
        self._open[stream] = name, self._mark(stream)

    def stop(self, stream: Stream) -> None:
        self._spans.append((stream, *self._open.pop(stream), self._mark(stream)))

    def restart_compute(self) -> None:
        self._compute_from = self._mark(Stream.COMPUTE)

    def add_compute(self, name: str) -> None:
        end = self._mark(Stream.COMPUTE)
        self._spans.append((Stream.COMPUTE, name, self._compute_from, end))
        self._compute_from = end

    def add_host(self, name: str, work: HostWork) -> None:
        zero_s = self._host_zero_s
        self._host_spans.append(Span("host", name, work.start_s - zero_s, work.stop_s - zero_s))

    def spans(self) -> list[Span]:
        for _, _, _, stop in self._spans:
            stop.synchronize()
        on_device = [
            Span(stream.name.lower(), name, self._since(start), self._since(stop))
            for stream, name, start, stop in self._spans
        ]
        return on_device + self._host_spans

    def _mark(self, stream: Stream) -> Any:
        event = _cuda.Event(enable_timing=True)
        event.record(self._streams[stream])
        return event

    def _since(self, event: Any) -> float:
        milliseconds: float = self._zero.elapsed_time(event)
        return milliseconds / 1e3


def _staging_slot() -> torch.Tensor:
    return torch.empty(STAGING_SLOT_BYTES, dtype=torch.uint8, pin_memory=True)


def _bytes_of(tensor: torch.Tensor) -> torch.Tensor:
    return tensor.view(-1).view(torch.uint8)


def _why_no_gpu() -> str:
    if torch.version.cuda is None:
        return (
            f"--device cuda: this torch ({torch.__version__}) is built without CUDA; install one "
            "that has it (https://pytorch.org/get-started/locally), or use --device cpu"
        )
    return (
        "--device cuda: no NVIDIA GPU can be used; look at what nvidia-smi says and at "
        "CUDA_VISIBLE_DEVICES, or use --device cpu"
    )
