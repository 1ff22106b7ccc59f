"""KV of the cells of a step where host memory is device memory; and the interface of it.

A cell is one (layer, sub-batch) of the sweep; cell c is layer c // n and sub-batch c % n.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import NamedTuple, Protocol

import torch

from sl_serve.core import SubBatchPlan
from sl_serve.kv.host import HostKV
from sl_serve.kv.pool import Slab
from sl_serve.kv.rows import RowTable
from sl_serve.ops import KVRegion


class CellKV(NamedTuple):
    region: KVRegion
    table: RowTable


class KVAccess(Protocol):
    @property
    def n_bytes_down(self) -> int:
        """Prefixes brought to the device (or read in place) so far."""

    @property
    def n_bytes_up(self) -> int:
        """New K and V brought to the host (or written in place) so far."""

    def begin(self, sub_batches: Sequence[SubBatchPlan], slabs: Mapping[int, Slab]) -> None:
        """Take in the step's sub-batches; their slabs have room for the new tokens."""

    def open(self, cell: int) -> CellKV:
        """Where the cell's rows lie, cached prefix included. Cells are opened in order; those of
        the look-ahead are queued with it."""

    def close(self, cell: int, k: torch.Tensor, v: torch.Tensor) -> None:
        """The cell has computed; k, v (T, Hk, D) are its new tokens, already in its region."""


class InPlaceKV:
    """Host memory is device memory: rows are read and written where they lie."""

    def __init__(self, host: HostKV) -> None:
        self._host = host
        self._tables: list[RowTable] = []
        self._prefix_bytes: list[int] = []
        self.n_bytes_down = 0
        self.n_bytes_up = 0

    def begin(self, sub_batches: Sequence[SubBatchPlan], slabs: Mapping[int, Slab]) -> None:
        self._tables = [self._host.table(s, slabs) for s in sub_batches]
        self._prefix_bytes = [
            sum(p.size_bytes for p in self._host.prefix(s, slabs)) for s in sub_batches
        ]

    def open(self, cell: int) -> CellKV:
        layer, sub_batch = divmod(cell, len(self._tables))
        self.n_bytes_down += self._prefix_bytes[sub_batch]
        return CellKV(self._host.region(layer), self._tables[sub_batch])

    def close(self, cell: int, k: torch.Tensor, v: torch.Tensor) -> None:
        self.n_bytes_up += len(k) * self._host.spec.token_layer_bytes
