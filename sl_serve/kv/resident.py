"""KV of rows that stay on the device, beside that of rows that passes through its windows."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import torch

from sl_serve.core import SubBatchPlan
from sl_serve.device import Device
from sl_serve.kv.access import CellKV
from sl_serve.kv.formats import KVFormat
from sl_serve.kv.layout import KVSpec
from sl_serve.kv.pool import Slab
from sl_serve.kv.rows import RowTable, row_table
from sl_serve.kv.windows import WindowedKV
from sl_serve.ops import KVRegion, Ops


class ResidentKV:
    """Chunks on the device, layer by layer: [layer][chunk]. A slab's chunks are side by side, so
    one layer of it looks as it would in a window."""

    def __init__(
        self, device: Device, ops: Ops, spec: KVSpec, n_chunks: int, stored: KVFormat | None = None
    ) -> None:
        """`spec`: of what is computed with. `stored`: of the host's KV, None: the same."""
        self._ops, self._spec, self._stored = ops, spec, stored
        self._layer_bytes = n_chunks * spec.chunk_layer_bytes
        # What nobody has written is masked, but must be a number.
        self.memory = device.empty(spec.n_layers * self._layer_bytes).zero_()

    def table(self, plan: SubBatchPlan, slabs: Mapping[int, Slab]) -> RowTable:
        """Relative to a layer's first byte."""
        region_bytes = self._spec.chunk_layer_bytes
        offsets = {w.slab: [c * region_bytes for c in slabs[w.slab].chunks] for w in plan.rows}
        table = row_table(self._spec, plan.rows, slabs, offsets)
        return self._ops.prepare(table, self._spec, is_window=False, stored=self._stored)

    def region(self, layer: int) -> KVRegion:
        return KVRegion(self.memory, layer * self._layer_bytes)


class ResidentAccess:
    """Sub-batches on the device alone: nothing crosses."""

    n_bytes_down = n_bytes_up = 0

    def __init__(self, device: Device, resident: ResidentKV) -> None:
        self._device, self._resident = device, resident
        self._tables: list[RowTable] = []

    def begin(self, sub_batches: Sequence[SubBatchPlan], slabs: Mapping[int, Slab]) -> None:
        self._tables = [self._resident.table(s, slabs) for s in sub_batches]

    def open(self, cell: int) -> CellKV:
        layer, sub_batch = divmod(cell, len(self._tables))
        return CellKV(self._resident.region(layer), self._tables[sub_batch])

    def close(self, cell: int, k: torch.Tensor, v: torch.Tensor) -> None:
        self._device.computed(0.0, (self._resident.memory,), "attention")


class TieredKV:
    """Sub-batches on the device and sub-batches through windows, in one step.

    The windows count their own cells only. While a cell on the device computes, the prefix after
    the next one comes down too: the window that it needs was left before.
    """

    def __init__(self, device: Device, resident: ResidentKV, windows: WindowedKV) -> None:
        self._device, self._resident, self._windows = device, resident, windows
        self._tables: list[RowTable | None] = []  # of each sub-batch; None: through windows
        self._n_before: list[int] = []  # of each sub-batch: how many before it use windows
        self._n_windowed = 0

    @property
    def n_bytes_down(self) -> int:
        return self._windows.n_bytes_down

    @property
    def n_bytes_up(self) -> int:
        return self._windows.n_bytes_up

    def begin(self, sub_batches: Sequence[SubBatchPlan], slabs: Mapping[int, Slab]) -> None:
        stays = [slabs[s.rows[0].slab].on_device for s in sub_batches]
        through = [s for s, is_resident in zip(sub_batches, stays, strict=True) if not is_resident]
        self._windows.begin(through, slabs)
        self._tables = [
            self._resident.table(s, slabs) if is_resident else None
            for s, is_resident in zip(sub_batches, stays, strict=True)
        ]
        self._n_before = [stays[:i].count(False) for i in range(len(stays))]
        self._n_windowed = len(through)

    def open(self, cell: int) -> CellKV:
        layer, sub_batch = divmod(cell, len(self._tables))
        table = self._tables[sub_batch]
        if table is None:
            return self._windows.open(self._window_cell(cell))
        self._windows.fetch_ahead(self._window_cell(cell))
        return CellKV(self._resident.region(layer), table)

    def close(self, cell: int, k: torch.Tensor, v: torch.Tensor) -> None:
        if self._tables[cell % len(self._tables)] is None:
            self._windows.close(self._window_cell(cell), k, v)
        else:
            self._device.computed(0.0, (self._resident.memory,), "attention")

    def _window_cell(self, cell: int) -> int:
        """The cell as the windows count them; of one on the device, the next that uses them."""
        layer, sub_batch = divmod(cell, len(self._tables))
        return layer * self._n_windowed + self._n_before[sub_batch]
