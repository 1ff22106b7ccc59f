"""The pure-torch twins: the reference for every kernel, and what runs where none is built."""

from __future__ import annotations

from collections.abc import Iterator

import numpy as np
import torch
from torch.nn import functional as F

from sl_serve.kv.formats import KVFormat
from sl_serve.kv.layout import KVSpec
from sl_serve.kv.rows import FIELDS, Int64Array, RowTable
from sl_serve.ops.kv_lines import read_lines, write_lines
from sl_serve.ops.protocol import CAUSAL, KVRegion, Scoring
from sl_serve.ops.rounded import rounded
from sl_serve.ops.scored_attention import scored_attention
from sl_serve.ops.scratch import Scratch
from sl_serve.weights.quantised import QuantisedRows, QuantisedWeight, Rows, Weight

CONVERTED_COLUMNS = 1024  # of a stored weight at a time: the copy stays small beside the weight
EXPANDED_ELEMENTS = 1 << 20  # at a time, of a layer: what widening takes on its way stays small


class TorchOps:
    name = "torch"

    def __init__(
        self,
        dtype: torch.dtype = torch.float32,
        scratch: Scratch | None = None,
        *,
        rounds: bool = False,  # what is multiplied with quantised weights, ops/rounded.py
    ) -> None:
        self.dtype = dtype
        self.rounds = rounds
        self.same_order = False
        self._scratch = scratch or Scratch(dtype)

    def linear(
        self, name: str, x: torch.Tensor, w: Weight, bias: torch.Tensor | None
    ) -> torch.Tensor:
        out = self._scratch(name, len(x), w.shape[1])
        for columns, left, part in self._factors(x, w):
            if bias is None:
                torch.mm(left, part, out=out[:, columns])
            else:
                torch.addmm(bias[columns].to(x.dtype), left, part, out=out[:, columns])
        return out

    def add_linear_(
        self, x: torch.Tensor, h: torch.Tensor, w: Weight, bias: torch.Tensor | None
    ) -> None:
        for columns, left, part in self._factors(h, w):
            x[:, columns].addmm_(left, part)
        if bias is not None:
            x += bias

    def logits(self, x: torch.Tensor, head: Rows, out: torch.Tensor) -> None:
        for columns, left, part in self._factors(x, head.t()):
            torch.mm(left, part, out=out[:, columns])

    def _factors(
        self, x: torch.Tensor, w: Weight
    ) -> Iterator[tuple[slice, torch.Tensor, torch.Tensor]]:
        """x, and w (in, out) in the dtype of the arithmetic: the whole, or copies of some
        columns."""
        if isinstance(w, QuantisedWeight):
            for columns, rows in w.columns():
                left = rounded(x) if self.rounds and rows.format.is_narrow else x
                for start in range(0, len(rows), CONVERTED_COLUMNS):
                    part = rows[start : start + CONVERTED_COLUMNS].widened().to(self.dtype)
                    first = columns.start + start
                    yield slice(first, first + len(part)), left, part.t()
            return
        if w.dtype == self.dtype:
            yield slice(None), x, w
            return
        for start in range(0, w.shape[1], CONVERTED_COLUMNS):
            columns = slice(start, start + CONVERTED_COLUMNS)
            part = w[:, columns].t()
            yield columns, x, self._scratch("converted", *part.shape).copy_(part).t()

    def expand(self, w: Weight, out: torch.Tensor) -> None:
        if not isinstance(w, QuantisedWeight):
            out.copy_(w)
            return
        for columns, rows in w.columns():
            self._expand_rows(rows, out.t()[columns])

    def _expand_rows(self, rows: QuantisedRows, out: torch.Tensor) -> None:
        n_rows = max(1, EXPANDED_ELEMENTS // rows.shape[1])
        for start in range(0, len(rows), n_rows):
            piece = slice(start, start + n_rows)
            out[piece] = rows[piece].widened()

    def pack_kv(self, k: torch.Tensor, v: torch.Tensor, out: torch.Tensor) -> None:
        torch.stack((k, v), dim=1, out=out)

    def prepare(
        self,
        table: RowTable,
        spec: KVSpec,
        is_window: bool = True,
        stored: KVFormat | None = None,
    ) -> RowTable:
        return table

    def append(self, region: KVRegion, table: RowTable, k: torch.Tensor, v: torch.Tensor) -> None:
        n_kv_heads, head_dim = k.shape[1:]
        lines = _head_lines(region, table, head_dim)
        for row, chunks in _rows(table):
            tokens = slice(row["first_token"], row["first_token"] + row["n_new"])
            positions = np.arange(row["start"], row["start"] + row["n_new"])
            index = _line_index(row, chunks, positions, n_kv_heads, region, lines.shape[1])
            lines[index[0]] = write_lines(k[tokens], table.format)
            lines[index[1]] = write_lines(v[tokens], table.format)

    def attend(
        self,
        region: KVRegion,
        table: RowTable,
        q: torch.Tensor,
        n_kv_heads: int,
        scoring: Scoring = CAUSAL,
    ) -> torch.Tensor:
        n_tokens, n_heads, head_dim = q.shape
        lines = _head_lines(region, table, head_dim)
        out = torch.empty_like(q)
        for row, chunks in _rows(table):
            tokens = slice(row["first_token"], row["first_token"] + row["n_new"])
            n_context = row["start"] + row["n_new"]
            positions = np.arange(n_context)
            index = _line_index(row, chunks, positions, n_kv_heads, region, lines.shape[1])
            kv = read_lines(lines[index], table.format, head_dim).to(q.dtype)
            k, v = kv.transpose(1, 2)  # (Hk, context, D)
            own = torch.arange(row["start"], n_context)
            out[tokens] = scored_attention(
                q[tokens].transpose(0, 1), k, v, own, torch.arange(n_context), scoring
            ).transpose(0, 1)
        return out.view(n_tokens, n_heads * head_dim)

    def rope_(self, x: torch.Tensor, cos: torch.Tensor, sin: torch.Tensor) -> None:
        lo, hi = x[..., : 2 * cos.shape[1]].chunk(2, dim=-1)
        cos, sin = cos[:, None], sin[:, None]
        rotated = lo * cos - hi * sin
        hi.copy_(hi * cos + lo * sin)
        lo.copy_(rotated)

    def rms_norm(self, x: torch.Tensor, weight: torch.Tensor, eps: float) -> torch.Tensor:
        return F.rms_norm(x.float(), weight.shape, None, eps).to(x.dtype) * weight

    def silu_mul(self, gate_up: torch.Tensor) -> torch.Tensor:
        gate, up = gate_up.chunk(2, dim=-1)
        return F.silu(gate) * up

    def layer_norm(
        self, x: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor, eps: float
    ) -> torch.Tensor:
        return F.layer_norm(x, weight.shape, weight.to(x.dtype), bias.to(x.dtype), eps)

    def relu_(self, x: torch.Tensor) -> None:
        torch.relu_(x)


def _rows(table: RowTable) -> list[tuple[dict[str, int], Int64Array]]:
    rows = [dict(zip(FIELDS, r, strict=True)) for r in table.rows.tolist()]
    ends = [*(r["first_chunk"] for r in rows[1:]), len(table.chunks)]
    return [(r, table.chunks[r["first_chunk"] : e]) for r, e in zip(rows, ends, strict=True)]


def _head_lines(region: KVRegion, table: RowTable, head_dim: int) -> torch.Tensor:
    """The region's memory as (n, line_bytes): every head of every position is one line of it."""
    return region.memory.view(-1, table.format.line_bytes(head_dim))


def _line_index(
    row: dict[str, int],
    chunks: Int64Array,
    positions: Int64Array,
    n_kv_heads: int,
    region: KVRegion,
    line_bytes: int,
) -> torch.Tensor:
    """Line numbers (2, positions, heads) of keys and values."""
    chunk, within = np.divmod(positions, row["chunk_positions"])
    key_bytes = region.offset_bytes + chunks[chunk] + within * row["position_stride"]
    heads = np.arange(n_kv_heads) * row["head_stride"]
    both = np.array([0, row["kv_stride"]])
    index = both[:, None, None] + key_bytes[:, None] + heads
    return torch.from_numpy(index // line_bytes)
