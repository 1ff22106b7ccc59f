"""The processor itself: weights and KV are used where they lie."""

from __future__ import annotations

from collections.abc import Sequence

import torch

from sl_serve.device.base import Event, Stream


class CpuDevice:
    name = "cpu"
    in_place = True

    def empty(self, n_bytes: int) -> torch.Tensor:
        return torch.empty(n_bytes, dtype=torch.uint8)

    def copy(self, stream: Stream, dst: torch.Tensor, src: torch.Tensor) -> None:
        raise AssertionError("nothing is copied where host memory is device memory")

    def record(self, stream: Stream) -> Event:
        raise AssertionError("nothing is queued where host memory is device memory")

    def wait(self, stream: Stream, event: Event) -> None:
        raise AssertionError("nothing is queued where host memory is device memory")

    def synchronize(self, event: Event) -> None:
        raise AssertionError("nothing is queued where host memory is device memory")

    def computed(self, n_flops: float, reads: Sequence[torch.Tensor]) -> None:
        pass

    def stall_s(self) -> float:
        return 0.0
