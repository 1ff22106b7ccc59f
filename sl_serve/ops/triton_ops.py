"""The device's operations with Triton kernels where torch's are many or slow."""

from __future__ import annotations

import torch

from sl_serve.device import Device
from sl_serve.ops.device_ops import DeviceOps, FlashAttention
from sl_serve.ops.triton.expand import expand_rows, expands
from sl_serve.ops.triton.kv import pack, scatter
from sl_serve.weights.formats import BLOCK_FORMATS
from sl_serve.weights.quantised import QuantisedRows


class TritonOps(DeviceOps):
    """Raises ImportError without triton. A format without a kernel is expanded by torch."""

    def __init__(
        self, device: Device, dtype: torch.dtype, flash: FlashAttention | None = None
    ) -> None:
        super().__init__(device, dtype, flash)
        self.name += ", triton"

    def check(self) -> None:
        """Build two kernels and run them: without a C compiler, or with a card too old, triton
        cannot, which only a launch tells. Raises whatever it raises."""
        on = self._device.torch_device
        for name in ("q8_0", "q5_k"):
            format = BLOCK_FORMATS[name]
            # As a scale a small number, as integers ones.
            data = torch.ones(4, format.block_bytes, dtype=torch.uint8, device=on)
            rows = QuantisedRows(data, format)
            out = torch.empty(rows.shape, dtype=self.dtype, device=on)
            self._expand_rows(rows, out)
            if not torch.equal(out, rows.widened().to(self.dtype)):
                raise RuntimeError("a kernel gives other numbers than torch")

    def _expand_rows(self, rows: QuantisedRows, out: torch.Tensor) -> None:
        if expands(rows):
            expand_rows(rows, out)
        else:
            super()._expand_rows(rows, out)

    def pack_kv(self, k: torch.Tensor, v: torch.Tensor, out: torch.Tensor) -> None:
        pack(k, v, out)

    def _scatter(
        self, lines: torch.Tensor, targets: torch.Tensor, k: torch.Tensor, v: torch.Tensor
    ) -> None:
        scatter(k, v, targets, lines)
