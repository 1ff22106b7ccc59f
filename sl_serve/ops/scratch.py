"""Buffers for what a layer computes on its way, made once and used again by every cell."""

from __future__ import annotations

import torch

from sl_serve.host_memory import host_empty


class Scratch:
    """Named buffers that grow to the largest step.

    A fresh buffer of some megabytes costs a page fault per 4 KiB each time: measured here, a
    matmul into one runs at 140 GFLOP/s instead of 170. What a name gave is overwritten when the
    same name is asked for again.
    """

    def __init__(self, dtype: torch.dtype, device: torch.device | None = None) -> None:
        self._dtype, self._device = dtype, device
        self._buffers: dict[str, torch.Tensor] = {}

    def __call__(self, name: str, n_lines: int, width: int) -> torch.Tensor:
        """(n_lines, width), uninitialised."""
        n = n_lines * width
        if name not in self._buffers or self._buffers[name].numel() < n:
            self._buffers.pop(name, None)  # never both at once
            self._buffers[name] = self._empty(n)
        return self._buffers[name][:n].view(n_lines, width)

    @property
    def buffers(self) -> tuple[torch.Tensor, ...]:
        return tuple(self._buffers.values())

    def _empty(self, n: int) -> torch.Tensor:
        return torch.empty(n, dtype=self._dtype, device=self._device)


class HostScratch(Scratch):
    """Straight from the system: what a smaller step used goes back to it, where a heap would keep
    the hole."""

    def _empty(self, n: int) -> torch.Tensor:
        return host_empty(n * self._dtype.itemsize).view(self._dtype)
