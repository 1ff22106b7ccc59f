"""What KV is stored as: numbers one after another, or blocks of 32 with a scale of their own.

A *line* is what one head keeps of one token: whole blocks, the last filled up. "int8" is the
nearest of 255 multiples of a scale, "int4" the nearest of 16 steps from the block's least number
to its greatest; scale and least number are half-precision. Blocks are 32 long because outliers sit
in few dimensions and spoil the scale of a whole block (docs/memory.md has figures).
"""

from __future__ import annotations

from dataclasses import dataclass

from sl_serve.config import DTypeName, EngineConfig, KVDTypeName


@dataclass(frozen=True, slots=True)
class KVFormat:
    name: str
    blocks: str  # what sl_serve.weights.formats and the native core call these
    block_elements: int
    block_bytes: int

    def line_bytes(self, head_dim: int) -> int:
        return -(-head_dim // self.block_elements) * self.block_bytes


KV_FORMATS = {
    f.name: f
    for f in (
        KVFormat("float32", "float32", 1, 4),
        KVFormat("bfloat16", "bfloat16", 1, 2),
        KVFormat("float16", "float16", 1, 2),
        KVFormat("int8", "q8_0", 32, 34),
        KVFormat("int4", "q4_1", 32, 20),
    )
}


def kv_format(kv_dtype: KVDTypeName, dtype: DTypeName) -> KVFormat:
    """`dtype`: of the arithmetic."""
    return KV_FORMATS[dtype if kv_dtype == "auto" else kv_dtype]


def stored_format(config: EngineConfig) -> KVFormat:
    """Of KV in host memory."""
    return kv_format(config.kv_dtype, config.dtype)
