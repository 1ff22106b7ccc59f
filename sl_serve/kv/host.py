"""KV bytes on the host, and what of them a sub-batch needs at one layer."""

from __future__ import annotations

from collections.abc import Mapping
from typing import NamedTuple

import torch

from sl_serve.core import SubBatchPlan
from sl_serve.host_memory import Allocate, host_empty
from sl_serve.kv.layout import KVSpec
from sl_serve.kv.pool import Slab
from sl_serve.kv.rows import Int64Array, RowTable, row_table
from sl_serve.ops import KVRegion


class PrefixPart(NamedTuple):
    """A piece of a sub-batch's cached prefix at layer 0: one bulk copy."""

    host_offset_bytes: int
    window_offset_bytes: int
    size_bytes: int


class HostKV:
    """The bytes of all chunks, allocated before the first step."""

    def __init__(self, spec: KVSpec, n_chunks: int, allocate: Allocate = host_empty) -> None:
        self.spec = spec
        self.memory = allocate(n_chunks * spec.chunk_bytes)

    def table(self, plan: SubBatchPlan, slabs: Mapping[int, Slab]) -> RowTable:
        """The sub-batch's rows, relative to a layer's first region."""
        offsets = {
            w.slab: [c * self.spec.chunk_bytes for c in slabs[w.slab].chunks] for w in plan.rows
        }
        return row_table(self.spec, plan.rows, slabs, offsets)

    def window_table(
        self, plan: SubBatchPlan, slabs: Mapping[int, Slab], spec: KVSpec | None = None
    ) -> RowTable:
        """The sub-batch's rows, relative to the start of a window filled as `prefix` says; in a
        window of another `spec`, after its chunks are expanded."""
        spec = spec or self.spec
        offsets: dict[int, list[int]] = {}
        n_regions = 0
        for slab_id, _, n_after in slab_lengths(plan):
            n_chunks = -(-n_after // slabs[slab_id].positions_per_chunk)
            regions = range(n_regions, n_regions + n_chunks)
            offsets[slab_id] = [r * spec.chunk_layer_bytes for r in regions]
            n_regions += n_chunks
        return row_table(spec, plan.rows, slabs, offsets)

    def region(self, layer: int) -> KVRegion:
        return KVRegion(self.memory, layer * self.spec.chunk_layer_bytes)

    def scatter(self, layer: int, offsets: Int64Array, tokens: torch.Tensor) -> None:
        """Put K and V of new tokens, lines (T, kinds, Hk), where `offsets` (T, 2) says, in
        "position" order.

        A line is all heads of K or of V of one token. As opaque items, each is one memmove: 14
        GB/s on one core for 2 KiB lines, where torch's indexed writes of 16-bit numbers reach 0.7.
        """
        assert self.spec.order == "position"
        line_bytes = self.spec.heads_bytes
        line = f"V{line_bytes}"
        offsets = offsets[:, : self.spec.n_kinds]
        lines = self.memory.numpy().view(line)
        base = layer * self.spec.chunk_layer_bytes
        lines[(offsets.reshape(-1) + base) // line_bytes] = tokens.numpy().view(line)

    def prefix(self, plan: SubBatchPlan, slabs: Mapping[int, Slab]) -> list[PrefixPart]:
        """What the sub-batch has cached, chunk by chunk, and where a window holds it.

        A window gives every chunk that the step reads or writes a whole layer region, in order
        of slabs and chunks, so that a chunk looks the same there as here.
        """
        parts = []
        window_offset = 0
        for slab_id, n_cached, n_after in slab_lengths(plan):
            slab = slabs[slab_id]
            positions = slab.positions_per_chunk
            for i in range(-(-n_after // positions)):
                live = min(max(n_cached - i * positions, 0), positions)
                size = self.spec.live_bytes(slab.width, live)
                offset = slab.chunks[i] * self.spec.chunk_bytes
                parts.append(PrefixPart(offset, window_offset, size))
                window_offset += self.spec.chunk_layer_bytes
        return parts


def slab_lengths(plan: SubBatchPlan) -> list[tuple[int, int, int]]:
    """(slab id, longest cached length, longest length after the step), in order of appearance."""
    lengths: dict[int, tuple[int, int]] = {}
    for work in plan.rows:
        cached, after = lengths.get(work.slab, (0, 0))
        lengths[work.slab] = max(cached, work.start), max(after, work.stop)
    return [(slab, cached, after) for slab, (cached, after) in lengths.items()]
