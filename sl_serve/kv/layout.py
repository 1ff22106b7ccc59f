"""How KV bytes lie in host memory: the reshape trick, as arithmetic.

The pool is cut into chunks of equal size before the first step. A chunk holds `chunk_tokens`
token slots for every layer, and is *reshaped* to what its slab needs: a slab of `width` rows
reads it as chunk_tokens / width positions of width rows. So the same pool serves 64 short
requests side by side or one long one, without moving or allocating anything.

Inside a chunk the layer comes first: [layer][slots of that layer], so what one cell of the sweep
needs from a chunk is one contiguous region. Inside the region, one of two orders:

    "position"  (position, kv, row, head, dim)   the live prefix of all rows is one run of bytes:
                                                 one bulk copy over the link (SpeedLoader, NeurIPS
                                                 2024, moves the sequence dimension forward)
    "row"       (row, kv, head, position, dim)   each head's keys are one run: what attention that
                                                 reads in place streams fastest
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal, NamedTuple

from sl_serve.kv.formats import KVFormat

KVOrder = Literal["position", "row"]

# Chunks of a slab whose rows have reached their expected length: enough of them that it grows in
# small parts, few enough that each is a large copy. A pool has at least as many.
FULL_SLAB_CHUNKS = 4
# On a device with memory of its own: arrivals of new tokens that may be under way before the host
# must put one in its place.
HOST_STAGING_BUFFERS = 4
# There, what numbers pass through on their way from a short format to that of the arithmetic.
EXPANSION_BYTES = 32 << 20


def n_windows(look_ahead: int) -> int:
    """Device windows that prefixes pass through: one is filled while another is read."""
    return min(look_ahead, 1) + 1


class KVStrides(NamedTuple):
    """Bytes between neighbours along each axis of one layer's region of a chunk."""

    position: int
    row: int
    kv: int
    head: int


@dataclass(frozen=True, slots=True)
class KVSpec:
    """Shape of the KV store. `chunk_tokens` and every slab width are powers of two."""

    n_layers: int
    n_kv_heads: int
    head_dim: int
    format: KVFormat
    chunk_tokens: int
    order: KVOrder
    n_kinds: int = 2  # lines of a head: K and V, or one that is both

    def __post_init__(self) -> None:
        assert self.chunk_tokens & (self.chunk_tokens - 1) == 0, "chunk_tokens: a power of two"

    @property
    def line_bytes(self) -> int:
        """K or V of one head of one token."""
        return self.format.line_bytes(self.head_dim)

    @property
    def heads_bytes(self) -> int:
        """K or V of all heads of one token."""
        return self.n_kv_heads * self.line_bytes

    @property
    def token_layer_bytes(self) -> int:
        """K and V of one token at one layer."""
        return self.n_kinds * self.heads_bytes

    @property
    def token_bytes(self) -> int:
        return self.n_layers * self.token_layer_bytes

    @property
    def chunk_layer_bytes(self) -> int:
        return self.chunk_tokens * self.token_layer_bytes

    @property
    def chunk_bytes(self) -> int:
        return self.n_layers * self.chunk_layer_bytes

    def positions(self, width: int) -> int:
        """Positions a chunk holds when it is reshaped to `width` rows."""
        return self.chunk_tokens // width

    def strides(self, width: int) -> KVStrides:
        head, row, n_kinds = self.line_bytes, self.heads_bytes, self.n_kinds
        to_values = n_kinds - 1  # keys that are the values are no way from them
        if self.order == "position":
            kind = width * row
            return KVStrides(position=n_kinds * kind, row=row, kv=to_values * kind, head=head)
        positions = self.positions(width)
        kind = positions * row
        return KVStrides(
            position=head, row=n_kinds * kind, kv=to_values * kind, head=positions * head
        )

    def live_bytes(self, width: int, n_tokens: int) -> int:
        """Bytes of one layer's region of a chunk that hold its first `n_tokens` positions."""
        if self.order == "position":
            return n_tokens * self.strides(width).position
        return self.chunk_layer_bytes if n_tokens else 0

    def width_for(self, expected_tokens: int, max_width: int) -> int:
        """Rows per slab for requests of about this length."""
        width = max(1, FULL_SLAB_CHUNKS * self.chunk_tokens // max(1, expected_tokens))
        return min(1 << (width.bit_length() - 1), max_width)
