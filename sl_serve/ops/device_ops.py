"""The operations on a device with memory of its own: torch's kernels, and flash-attention's where
it is installed. Runs on any torch device, so that it is tested without a GPU."""

from __future__ import annotations

import importlib
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace

import numpy as np
import torch
from torch.nn import functional as F
from torch.nn.attention.bias import causal_lower_right

from sl_serve.device import Device
from sl_serve.kv.formats import KVFormat
from sl_serve.kv.layout import KVSpec
from sl_serve.kv.rows import Int64Array, RowTable
from sl_serve.ops.kv_lines import stored as as_stored
from sl_serve.ops.protocol import CAUSAL, KVRegion, Scoring
from sl_serve.ops.row_groups import RowGroup, group_rows
from sl_serve.ops.scored_attention import scored_attention
from sl_serve.ops.scratch import Scratch
from sl_serve.ops.torch_ops import TorchOps

Index = slice | torch.Tensor
# flash_attn_with_kvcache: q (B, M, Hq, D), k and v (B, N, Hk, D) with any strides but the last;
# cache_seqlens (B,) int32; causal: the last query of a row sees all its keys.
FlashAttention = Callable[..., torch.Tensor]


@dataclass(frozen=True, slots=True)
class _Batch:
    """A group of rows and its indices on the device."""

    group: RowGroup
    queries: Index
    results: Index
    lengths: torch.Tensor  # (n_rows,) int32
    bias: torch.Tensor | None  # (n_rows, 1, 1, n_context), where rows are of unlike lengths


@dataclass(frozen=True, slots=True)
class DeviceTable(RowTable):
    """What `DeviceOps` looks up once per sub-batch and step."""

    lines: torch.Tensor  # (2, T) where the keys and the values of new tokens go
    batches: Sequence[_Batch]
    stored: KVFormat | None  # of the host, where it has another


class DeviceOps(TorchOps):
    """KV lies in "position" order, a slab in one piece; tables come from `prepare`."""

    def __init__(
        self, device: Device, dtype: torch.dtype, flash: FlashAttention | None = None
    ) -> None:
        super().__init__(dtype)
        self.name = f"torch on {device.name}" + (", flash-attention" if flash else "")
        self._device, self._flash = device, flash
        self._scratch = Scratch(dtype, device.torch_device)

    def prepare(
        self,
        table: RowTable,
        spec: KVSpec,
        is_window: bool = True,
        stored: KVFormat | None = None,
    ) -> DeviceTable:
        groups = group_rows(table, spec)
        if not is_window:  # a row that takes no part may have its own tokens there
            groups = [replace(g, has_unwritten=False) for g in groups]
        # In order of T: what an indexed write wants.
        lines = (table.new_token_offsets() // spec.heads_bytes).T
        arrays = [lines]
        for group in groups:
            arrays += [group.lengths, group.queries, group.results]
        on_device = self._upload(arrays)
        batches = [self._batch(g, *on_device[1 + 3 * i : 4 + 3 * i]) for i, g in enumerate(groups)]
        lines_there = on_device[0].view(lines.shape)
        if stored == spec.format:
            stored = None
        return DeviceTable(table.rows, table.chunks, table.format, lines_there, batches, stored)

    def _upload(self, arrays: Sequence[Int64Array]) -> list[torch.Tensor]:
        """All in one copy, each flat."""
        together = torch.from_numpy(np.concatenate([a.reshape(-1) for a in arrays]))
        return list(torch.split(self._device.upload(together), [a.size for a in arrays]))

    def _batch(
        self,
        group: RowGroup,
        lengths: torch.Tensor,
        queries: torch.Tensor,
        results: torch.Tensor,
    ) -> _Batch:
        bias = None
        if group.is_ragged and self._flash is None:
            positions = torch.arange(group.n_context, device=lengths.device)
            hidden = positions >= lengths[:, None]
            bias = torch.zeros(hidden.shape, dtype=self.dtype, device=lengths.device)
            bias = bias.masked_fill_(hidden, -torch.inf)[:, None, None]
        return _Batch(
            group,
            _run_of(group.queries, queries),
            _run_of(group.results, results),
            lengths.to(torch.int32),
            bias,
        )

    def append(self, region: KVRegion, table: RowTable, k: torch.Tensor, v: torch.Tensor) -> None:
        assert isinstance(table, DeviceTable)
        lines = _lines(region, k.dtype, *k.shape[1:])
        for batch in table.batches:
            if batch.group.has_unwritten:
                for memory in _keys_values(lines, batch.group):
                    memory[:, -1].zero_()
        if table.stored is not None:
            k, v = (as_stored(x, table.stored) for x in (k, v))
        self._scatter(lines, table.lines, k, v)

    def _scatter(
        self, lines: torch.Tensor, targets: torch.Tensor, k: torch.Tensor, v: torch.Tensor
    ) -> None:
        """lines (n, Hk, D) get k and v (T, Hk, D) at the numbers in targets (2, T)."""
        lines.index_copy_(0, targets[0], k)
        lines.index_copy_(0, targets[1], v)

    def attend(
        self,
        region: KVRegion,
        table: RowTable,
        q: torch.Tensor,
        n_kv_heads: int,
        scoring: Scoring = CAUSAL,
    ) -> torch.Tensor:
        assert isinstance(table, DeviceTable)
        n_tokens, n_heads, head_dim = q.shape
        lines = _lines(region, q.dtype, n_kv_heads, head_dim)
        # The line after the last takes the results of rows that take no part.
        out = self._scratch("attention", n_tokens + 1, n_heads * head_dim)
        for batch in table.batches:
            k, v = _keys_values(lines, batch.group)
            out[batch.results] = self._attend(q[batch.queries], k, v, batch, scoring)
        return out[:n_tokens]

    def _attend(
        self, q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, batch: _Batch, scoring: Scoring
    ) -> torch.Tensor:
        """q (B * M, Hq, D), k and v (B, N, Hk, D) -> (B * M, Hq * D)."""
        n_rows, n_new, n_context = batch.group.n_rows, batch.group.n_new, batch.group.n_context
        n_heads, n_kv_heads, head_dim = q.shape[1], k.shape[2], q.shape[2]
        q = q.view(n_rows, n_new, n_heads, head_dim)
        if self._flash is not None and scoring.sinks is None:
            settings = {} if scoring is CAUSAL else _flash_settings(scoring)
            out = self._flash(q, k, v, cache_seqlens=batch.lengths, causal=True, **settings)
            return out.reshape(-1, n_heads * head_dim)
        k, v = k.transpose(1, 2), v.transpose(1, 2)
        if scoring is not CAUSAL:
            out = _scored(q.transpose(1, 2), k, v, batch, scoring).transpose(1, 2)
        elif n_new == 1:
            # Query heads that share keys are as good as queries of one head: nothing to repeat.
            q = q.view(n_rows, n_kv_heads, n_heads // n_kv_heads, head_dim)
            out = F.scaled_dot_product_attention(q, k, v, attn_mask=batch.bias)
        else:
            causal = causal_lower_right(n_new, n_context)
            out = F.scaled_dot_product_attention(
                q.transpose(1, 2), k, v, attn_mask=causal, enable_gqa=n_heads != n_kv_heads
            ).transpose(1, 2)
        return out.reshape(-1, n_heads * head_dim)

    def rms_norm(self, x: torch.Tensor, weight: torch.Tensor, eps: float) -> torch.Tensor:
        return F.rms_norm(x, weight.shape, weight, eps)


def _scored(
    q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, batch: _Batch, scoring: Scoring
) -> torch.Tensor:
    """q (B, Hq, M, D), k and v (B, Hk, N, D); what no row's window reaches is left out."""
    group, first = batch.group, 0
    if scoring.window is not None:
        takes_part = (group.queries == group.results)[:: group.n_new]
        shortest = int(group.lengths[takes_part].min())
        first = max(0, shortest - group.n_new + 1 - scoring.window)
    own = batch.lengths[:, None] - group.n_new + torch.arange(group.n_new, device=q.device)
    positions = torch.arange(first, group.n_context, device=q.device)
    return scored_attention(q, k[:, :, first:], v[:, :, first:], own, positions, scoring)


def _flash_settings(scoring: Scoring) -> dict[str, object]:
    """flash_attn counts a window's tokens to the left of the query's own."""
    window = (-1, -1) if scoring.window is None else (scoring.window - 1, 0)
    return {
        "softmax_scale": scoring.scale,
        "window_size": window,
        "softcap": scoring.softcap or 0.0,
        "alibi_slopes": scoring.slopes,
    }


def find_flash_attention(device: torch.device, dtype: torch.dtype) -> FlashAttention | None:
    """flash_attn's kernel that reads a cache in place, where it is installed and has this dtype."""
    if device.type != "cuda" or dtype is torch.float32:
        return None
    try:
        module = importlib.import_module("flash_attn")
    except ImportError:  # also: built for another torch
        return None
    found: FlashAttention = module.flash_attn_with_kvcache
    return found


def _run_of(numbers: Int64Array, on_device: torch.Tensor) -> Index:
    """A slice, which is a view, where the numbers follow each other."""
    first = int(numbers[0])
    if (numbers == first + np.arange(len(numbers))).all():
        return slice(first, first + len(numbers))
    return on_device


def _lines(region: KVRegion, dtype: torch.dtype, n_kv_heads: int, head_dim: int) -> torch.Tensor:
    """The region's memory as (n, Hk, D), a line each."""
    return region.memory[region.offset_bytes :].view(dtype).view(-1, n_kv_heads, head_dim)


def _keys_values(lines: torch.Tensor, group: RowGroup) -> tuple[torch.Tensor, torch.Tensor]:
    """A group's keys and values (n_rows, n_context, Hk, D), where they lie."""
    _, n_heads, head_dim = lines.shape
    line = n_heads * head_dim
    shape = (group.n_rows, group.n_context, n_heads, head_dim)
    strides = (line, group.row_lines * line, head_dim, 1)
    start = lines.storage_offset() + group.first_line * line
    return (
        lines.as_strided(shape, strides, start),
        lines.as_strided(shape, strides, start + group.value_lines * line),
    )
