"""Rows of a window as strided batches: attention reads them where they lie.

In "position" order the chunks of a slab, side by side in a window, are one tensor (position, kv,
row, head, dim), and neighbouring rows of it a batch whose strides say the rest. A *line* is all
heads of the keys, or of the values, of one token.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from itertools import groupby
from typing import NamedTuple

import numpy as np

from sl_serve.kv.layout import KVSpec
from sl_serve.kv.rows import FIELDS, Int64Array, RowTable


@dataclass(frozen=True, slots=True)
class RowGroup:
    """`n_rows` neighbours of a slab with `n_new` new tokens each.

    Rows that decode may have unlike lengths, and rows between them that do not take part: their
    query is anybody's and their result goes nowhere. Rows that read their prompt are as long as
    each other.
    """

    first_line: int  # of the first row's keys
    row_lines: int  # lines from a position to the next
    value_lines: int  # lines from a key to its value; none: it is its own
    n_rows: int
    n_new: int
    n_context: int  # of the longest row, new tokens included
    lengths: Int64Array  # (n_rows,) tokens that each row's last query sees
    queries: Int64Array  # (n_rows * n_new,) tokens of the sub-batch
    results: Int64Array  # the same, and the number of all tokens for a row that takes no part
    # Whether the last position of some row is neither copied from the host nor written by it: what
    # is masked there must still be a number.
    has_unwritten: bool

    @property
    def is_ragged(self) -> bool:
        return bool((self.lengths != self.n_context).any())


class _Row(NamedTuple):
    """Sorted, rows of a group stand together."""

    slab_line: int  # where the slab starts
    n_new: int
    same_start: int  # what prompt rows of a group have in common
    number: int  # in the slab
    first_token: int
    start: int
    row_lines: int
    value_lines: int

    @property
    def group(self) -> tuple[int, int, int]:
        return self[:3]


def group_rows(table: RowTable, spec: KVSpec) -> list[RowGroup]:
    """The rows of a window, in groups as large as may be. T tokens are numbered 0 to T - 1."""
    rows = sorted(_rows(table, spec))
    n_tokens = sum(r.n_new for r in rows)
    n_copied: dict[int, int] = {}  # positions of each slab that the window got from the host
    for row in rows:
        n_copied[row.slab_line] = max(n_copied.get(row.slab_line, 0), row.start)
    return [
        _group(members, n_tokens, n_copied[members[0].slab_line])
        for _, same in groupby(rows, key=lambda r: r.group)
        for members in _batches(list(same))
    ]


def _rows(table: RowTable, spec: KVSpec) -> Iterator[_Row]:
    assert spec.order == "position"
    line_bytes, region_bytes = spec.heads_bytes, spec.chunk_layer_bytes
    ends = [*table.rows[1:, FIELDS.index("first_chunk")].tolist(), len(table.chunks)]
    for row, end in zip(table.rows.tolist(), ends, strict=True):
        first_token, n_new, start, _, first_chunk, value_bytes, _, position_bytes = row
        chunks = table.chunks[first_chunk:end]
        assert (np.diff(chunks) == region_bytes).all(), "a window holds a slab in one piece"
        number = int(chunks[0]) % region_bytes // line_bytes
        yield _Row(
            slab_line=int(chunks[0]) // line_bytes - number,
            n_new=n_new,
            same_start=start if n_new > 1 else 0,
            number=number,
            first_token=first_token,
            start=start,
            row_lines=position_bytes // line_bytes,
            value_lines=value_bytes // line_bytes,
        )


def _batches(rows: list[_Row]) -> Iterator[list[_Row]]:
    """Runs of neighbours; for rows that decode all of them, whatever lies between: reading that
    costs less than more launches."""
    if rows[0].n_new == 1:
        yield rows
        return
    for _, run in groupby(enumerate(rows), key=lambda pair: pair[1].number - pair[0]):
        yield [row for _, row in run]


def _group(rows: Sequence[_Row], n_tokens: int, n_copied: int) -> RowGroup:
    first, n_new = rows[0], rows[0].n_new
    n_rows = rows[-1].number - first.number + 1
    lengths = np.ones(n_rows, dtype=np.int64)
    queries = np.full((n_rows, n_new), first.first_token, dtype=np.int64)
    results = np.full((n_rows, n_new), n_tokens, dtype=np.int64)
    for row in rows:
        at = row.number - first.number
        lengths[at] = row.start + n_new
        queries[at] = results[at] = row.first_token + np.arange(n_new)
    n_context = int(lengths.max())
    return RowGroup(
        first_line=first.slab_line + first.number,
        row_lines=first.row_lines,
        value_lines=first.value_lines,
        n_rows=n_rows,
        n_new=n_new,
        n_context=n_context,
        lengths=lengths,
        queries=queries.reshape(-1),
        results=results.reshape(-1),
        has_unwritten=n_new == 1 and n_context > n_copied and bool((lengths < n_context).any()),
    )
