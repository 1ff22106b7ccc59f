"""KV pools of a model: what a number of bytes holds, and what a number of tokens needs."""

from __future__ import annotations

from dataclasses import dataclass, replace

from sl_serve.config import ModelConfig
from sl_serve.kv.formats import KVFormat
from sl_serve.kv.layout import FULL_SLAB_CHUNKS, KVOrder, KVSpec

# One chunk's layer region: large enough for a link's full rate, small enough to waste little.
CHUNK_LAYER_BYTES = 4 << 20
MIN_CHUNK_TOKENS = 16
MIN_CHUNKS = 8  # as long as chunks are longer than MIN_CHUNK_TOKENS


@dataclass(frozen=True, slots=True)
class KVPools:
    """A larger pool has larger chunks, and never holds less: its chunks are powers of two, and
    there are at least MIN_CHUNKS of a new size when it is first used."""

    model: ModelConfig
    format: KVFormat  # in host memory
    order: KVOrder
    device_format: KVFormat  # what is computed with

    @property
    def token_layer_bytes(self) -> int:
        return self.model.n_kv_lines * self.format.line_bytes(self.model.head_dim)

    @property
    def device_token_layer_bytes(self) -> int:
        return self.model.n_kv_lines * self.device_format.line_bytes(self.model.head_dim)

    @property
    def token_bytes(self) -> int:
        return self.model.n_layers * self.token_layer_bytes

    @property
    def smallest_bytes(self) -> int:
        """Of a pool that can run anything at all."""
        return self.bytes_for(1)

    @property
    def is_expanded(self) -> bool:
        """Whether a device with memory of its own computes with another format."""
        return self.device_format != self.format

    def spec(self, pool_bytes: int) -> KVSpec:
        by_copy = CHUNK_LAYER_BYTES // self.token_layer_bytes
        by_pool = pool_bytes // (MIN_CHUNKS * self.token_bytes)
        chunk_tokens = max(MIN_CHUNK_TOKENS, floor_power_of_two(min(by_copy, by_pool)))
        model = self.model
        return KVSpec(
            model.n_layers,
            model.n_kv_heads,
            model.head_dim,
            self.format,
            chunk_tokens,
            self.order,
            model.n_kv_kinds,
        )

    def device_spec(self, pool_bytes: int) -> KVSpec:
        """Of the same chunks, as a device with memory of its own computes with them."""
        return replace(self.spec(pool_bytes), order="position", format=self.device_format)

    def tokens_in(self, pool_bytes: int) -> int:
        """The longest request that a pool holds; 0 if it holds none."""
        spec = self.spec(pool_bytes)
        n_chunks = pool_bytes // spec.chunk_bytes
        return n_chunks * spec.chunk_tokens if n_chunks >= FULL_SLAB_CHUNKS else 0

    def bytes_for(self, n_tokens: int) -> int:
        """The smallest pool that holds so many tokens: whole chunks, and those of a full slab."""
        spec = self.spec(n_tokens * self.token_bytes)
        return max(FULL_SLAB_CHUNKS, -(-n_tokens // spec.chunk_tokens)) * spec.chunk_bytes

    def bytes_for_rows(self, n_rows: int, row_tokens: int, max_slab_width: int) -> int:
        """A pool that holds so many rows of that length side by side, whole slabs of them. Larger
        pools have larger chunks, so the size is approached from below."""
        n_bytes, needed = 0, self.bytes_for(n_rows * row_tokens)
        while n_bytes < needed:
            n_bytes, spec = needed, self.spec(needed)
            width = spec.width_for(row_tokens, min(max_slab_width, spec.chunk_tokens))
            chunks_per_slab = -(-row_tokens // spec.positions(width))
            needed = -(-n_rows // width) * chunks_per_slab * spec.chunk_bytes
        return n_bytes


def floor_power_of_two(n: int) -> int:
    return 1 << (max(n, 1).bit_length() - 1)
