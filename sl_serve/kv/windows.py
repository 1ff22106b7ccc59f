"""KV of the cells of a step on a device with memory of its own."""

from __future__ import annotations

from collections import deque
from collections.abc import Mapping, Sequence
from dataclasses import replace
from typing import NamedTuple

import torch

from sl_serve.core import SubBatchPlan
from sl_serve.device import Device, Event, Stream
from sl_serve.kv.access import CellKV
from sl_serve.kv.formats import KV_FORMATS
from sl_serve.kv.host import HostKV, PrefixPart
from sl_serve.kv.layout import HOST_STAGING_BUFFERS, n_windows
from sl_serve.kv.pool import Slab
from sl_serve.kv.rows import Int64Array, RowTable
from sl_serve.ops import KVRegion, Ops
from sl_serve.ops.kv_lines import expand, write_lines
from sl_serve.weights.formats import plain


class _Window(NamedTuple):
    memory: torch.Tensor  # uint8: the prefix and room for the new tokens
    staging: torch.Tensor  # uint8: the new tokens as lines (T, kinds, Hk), on their way up


class _Arrival(NamedTuple):
    """New tokens that are on their way to `staging` on the host, and where they go then."""

    event: Event
    staging: torch.Tensor  # uint8
    n_bytes: int
    layer: int
    offsets: Int64Array


class WindowedKV:
    """Device windows that the prefixes pass through, and staging that the new tokens leave by.

    Order. Cell c uses window c mod n_windows (2 with look-ahead, else 1). Its prefix copies wait
    on the load stream for `computed` of cell c - n_windows, which read that window last; the cell
    waits for `loaded`. New tokens are appended to the window for the cell's own attention, and
    packed into the window's staging, which the compute stream reuses only after the store
    stream's event. On the host they arrive in a ring of buffers and are scattered into the slabs
    when their buffer is needed again or a step begins: so a prefix, which is fetched within a
    step, always contains every append of the steps before.

    Where the host stores another format than is computed with, a window holds what was sent, and
    one more, which only the compute stream touches, holds the cell's prefix expanded. What was sent
    may be overwritten from then on.
    """

    def __init__(
        self,
        device: Device,
        ops: Ops,
        host: HostKV,
        dtype: torch.dtype,
        look_ahead: int,
        max_tokens: int,
        n_chunks: int,
    ) -> None:
        """`max_tokens`: of a sub-batch. `n_chunks`: the most that a sub-batch may touch."""
        spec = host.spec
        self._device, self._ops, self._host, self._spec = device, ops, host, spec
        computed = replace(spec, format=KV_FORMATS[plain(dtype).name])
        self._attended_spec = computed
        self._dtype = dtype
        self._look_ahead = min(look_ahead, 1)
        staging_bytes = max_tokens * spec.token_layer_bytes
        self._windows = [
            _Window(device.empty(n_chunks * spec.chunk_layer_bytes), device.empty(staging_bytes))
            for _ in range(n_windows(look_ahead))
        ]
        self._expanded = None
        if computed != spec:
            self._expanded = device.empty(n_chunks * computed.chunk_layer_bytes)
        self._free_staging = deque(
            device.host_empty(staging_bytes) for _ in range(HOST_STAGING_BUFFERS)
        )
        self._arrivals: deque[_Arrival] = deque()
        self._computed: list[Event | None] = [None] * len(self._windows)
        self._stored: list[Event | None] = [None] * len(self._windows)
        self._loaded: list[Event | None] = [None] * len(self._windows)
        self._host_offsets: list[Int64Array] = []  # where the step's new tokens belong
        self._window_tables: list[RowTable] = []
        self._prefixes: list[list[PrefixPart]] = []
        self._n_cells = 0
        self._next_fetch = 0
        self.n_bytes_down = 0
        self.n_bytes_up = 0

    def begin(self, sub_batches: Sequence[SubBatchPlan], slabs: Mapping[int, Slab]) -> None:
        while self._arrivals:
            self._scatter_oldest()
        self._host_offsets = [self._host.table(s, slabs).new_token_offsets() for s in sub_batches]
        self._prefixes = [self._host.prefix(s, slabs) for s in sub_batches]
        self._window_tables = [
            self._ops.prepare(
                self._host.window_table(s, slabs, self._attended_spec),
                self._attended_spec,
                stored=self._spec.format,
            )
            for s in sub_batches
        ]
        self._n_cells = len(sub_batches) * self._spec.n_layers
        self._next_fetch = 0

    def fetch_ahead(self, cell: int) -> None:
        """Queue the prefixes that may come down before cell `cell` is opened; those before it are
        closed."""
        if self._look_ahead:
            self._fetch_until(cell)

    def open(self, cell: int) -> CellKV:
        self._fetch_until(cell)
        index = cell % len(self._windows)
        loaded = self._loaded[index]
        assert loaded is not None
        self._device.wait(Stream.COMPUTE, loaded)
        table = self._window_tables[cell % len(self._window_tables)]
        if self._expanded is not None:
            self._expand(cell)
        return CellKV(KVRegion(self._attended(index), 0), table)

    def close(self, cell: int, k: torch.Tensor, v: torch.Tensor) -> None:
        index = cell % len(self._windows)
        stored = self._stored[index]
        if stored is not None:
            self._device.wait(Stream.COMPUTE, stored)
        n_bytes = len(k) * self._spec.token_layer_bytes
        staged = self._windows[index].staging[:n_bytes]
        self._stage(k, v, staged)
        self._device.computed(0.0, (self._attended(index),), "attention")
        computed = self._device.record(Stream.COMPUTE)
        if self._expanded is None:
            self._computed[index] = computed
        self._device.wait(Stream.STORE, computed)
        if not self._free_staging:
            self._scatter_oldest()
        arriving = self._free_staging.popleft()
        self._device.copy(Stream.STORE, arriving[:n_bytes], staged, "new KV")
        self._stored[index] = event = self._device.record(Stream.STORE)
        layer, sub_batch = divmod(cell, len(self._host_offsets))
        offsets = self._host_offsets[sub_batch]
        self._arrivals.append(_Arrival(event, arriving, n_bytes, layer, offsets))
        self.n_bytes_up += n_bytes

    def _fetch_until(self, cell: int) -> None:
        """And as far ahead of that cell as windows allow."""
        while self._next_fetch < min(cell + self._look_ahead + 1, self._n_cells):
            self._fetch(self._next_fetch)
            self._next_fetch += 1

    def _fetch(self, cell: int) -> None:
        index = cell % len(self._windows)
        computed = self._computed[index]
        if computed is not None:
            self._device.wait(Stream.LOAD, computed)
        layer, sub_batch = divmod(cell, len(self._host_offsets))
        host, window = self._host.region(layer), self._windows[index].memory
        for part in self._prefixes[sub_batch]:
            if part.size_bytes == 0:
                continue
            start = host.offset_bytes + part.host_offset_bytes
            self._device.copy(
                Stream.LOAD,
                window[part.window_offset_bytes : part.window_offset_bytes + part.size_bytes],
                host.memory[start : start + part.size_bytes],
                "KV prefix",
            )
            self.n_bytes_down += part.size_bytes
        self._loaded[index] = self._device.record(Stream.LOAD)

    def _scatter_oldest(self) -> None:
        arrival = self._arrivals[0]
        self._device.synchronize(arrival.event)
        self._host.scatter(arrival.layer, arrival.offsets, arrival.staging[: arrival.n_bytes])
        self._arrivals.popleft()  # not before: where memory runs short it is done again
        self._free_staging.append(arrival.staging)

    def _attended(self, index: int) -> torch.Tensor:
        return self._windows[index].memory if self._expanded is None else self._expanded

    def _expand(self, cell: int) -> None:
        assert self._expanded is not None
        index = cell % len(self._windows)
        sent, spec = self._windows[index].memory, self._spec
        sent_lines = sent.view(-1, spec.line_bytes)
        lines = self._expanded.view(self._dtype).view(-1, spec.head_dim)
        for part in self._prefixes[cell % len(self._prefixes)]:
            if part.size_bytes == 0:
                continue
            start = part.window_offset_bytes // spec.line_bytes
            stop = start + part.size_bytes // spec.line_bytes
            expand(sent_lines[start:stop], spec.format, lines[start:stop])
        self._device.computed(0.0, (sent,), "KV expansion")
        self._computed[index] = self._device.record(Stream.COMPUTE)

    def _stage(self, k: torch.Tensor, v: torch.Tensor, staged: torch.Tensor) -> None:
        spec = self._spec
        kinds = (k, v)[: spec.n_kinds]
        shape = (len(k), len(kinds), spec.n_kv_heads)
        if self._expanded is not None:
            lines = staged.view(*shape, spec.line_bytes)
            for i, x in enumerate(kinds):
                lines[:, i] = write_lines(x, spec.format)
            return
        numbers = staged.view(self._dtype).view(*shape, spec.head_dim)
        if spec.n_kinds == 1:
            numbers[:, 0] = k
        else:
            self._ops.pack_kv(k, v, numbers)
