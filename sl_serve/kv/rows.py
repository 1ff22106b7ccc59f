"""The table that tells attention where each row's KV lies: one per sub-batch and step.

Offsets are relative to a base address, so one table serves every layer: in place the base moves
by one layer's region, in a device window it is the window's start.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from sl_serve.core import RowWork
from sl_serve.kv.formats import KVFormat
from sl_serve.kv.layout import KVSpec
from sl_serve.kv.pool import Slab

Int64Array = NDArray[np.int64]

# Columns of RowTable.rows, in the order of `struct Row` in csrc/kernels.hpp.
FIELDS = (
    "first_token",
    "n_new",
    "start",
    "chunk_positions",
    "first_chunk",
    "kv_stride",
    "head_stride",
    "position_stride",
)


@dataclass(frozen=True, slots=True)
class RowTable:
    """`rows`: (n_rows, 8), columns as FIELDS, strides in bytes. `chunks`: byte offset of each
    row's part of each of its chunks, rows one after another."""

    rows: Int64Array
    chunks: Int64Array
    format: KVFormat

    def new_token_offsets(self) -> Int64Array:
        """(T, 2) bytes from the base to the keys and to the values of each new token."""
        n_new = self.rows[:, 1]
        each = np.repeat(self.rows, n_new, axis=0)
        first_token, _, start, positions, first_chunk, kv_stride, _, position_stride = each.T
        position = start + np.arange(len(each)) - first_token
        chunk, within = np.divmod(position, positions)
        keys = self.chunks[first_chunk + chunk] + within * position_stride
        return np.stack((keys, keys + kv_stride), axis=1)


def row_table(
    spec: KVSpec, works: Sequence[RowWork], slabs: Mapping[int, Slab], chunk_offsets: ChunkOffsets
) -> RowTable:
    """Describe `works`, whose tokens stand one after another in the sub-batch.

    `chunk_offsets[slab_id][i]`: byte offset of the slab's i-th chunk from the base.
    """
    rows = np.empty((len(works), len(FIELDS)), dtype=np.int64)
    chunks: list[int] = []
    first_token = 0
    for i, work in enumerate(works):
        slab = slabs[work.slab]
        strides = spec.strides(slab.width)
        rows[i] = (
            first_token,
            work.n_new,
            work.start,
            slab.positions_per_chunk,
            len(chunks),
            strides.kv,
            strides.head,
            strides.position,
        )
        first_token += work.n_new
        n_chunks = -(-work.stop // slab.positions_per_chunk)
        row_offset = work.row * strides.row
        chunks.extend(offset + row_offset for offset in chunk_offsets[work.slab][:n_chunks])
    return RowTable(rows, np.array(chunks, dtype=np.int64), spec.format)


ChunkOffsets = Mapping[int, Sequence[int]]
