"""The processor itself: weights and KV are used where they lie."""

from __future__ import annotations

from collections.abc import Sequence

import torch

from sl_serve.device.base import Event, HostWork, Stream
from sl_serve.device.timeline import Span
from sl_serve.host_memory import host_empty


class CpuDevice:
    name = "cpu"
    in_place = True
    torch_device = torch.device("cpu")

    def check_dtype(self, dtype: torch.dtype) -> None:
        pass

    def empty(self, n_bytes: int) -> torch.Tensor:
        return torch.empty(n_bytes, dtype=torch.uint8)

    def host_empty(self, n_bytes: int) -> torch.Tensor:
        return host_empty(n_bytes)

    def upload(self, tensor: torch.Tensor) -> torch.Tensor:
        return tensor

    def copy(self, stream: Stream, dst: torch.Tensor, src: torch.Tensor, name: str = "") -> None:
        raise AssertionError("nothing is copied where host memory is device memory")

    def record(self, stream: Stream) -> Event:
        raise AssertionError("nothing is queued where host memory is device memory")

    def wait(self, stream: Stream, event: Event) -> None:
        raise AssertionError("nothing is queued where host memory is device memory")

    def synchronize(self, event: Event) -> None:
        raise AssertionError("nothing is queued where host memory is device memory")

    def computed(
        self, n_flops: float, reads: Sequence[torch.Tensor], name: str = "", n_bytes: float = 0.0
    ) -> None:
        pass

    def host_read(self, after: Event, n_bytes: int, work: HostWork, name: str = "") -> Event:
        raise AssertionError("nothing runs beside a device that is the processor itself")

    def stall_s(self) -> float:
        return 0.0

    def start_timeline(self) -> None:
        pass

    def take_timeline(self) -> list[Span]:
        return []

    def close(self) -> None:
        pass
