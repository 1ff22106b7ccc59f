"""Random rows in GGUF's blocks. The scales are ordinary numbers, all other bytes anything."""

from __future__ import annotations

import gguf
import numpy as np

Kind = gguf.GGMLQuantizationType
KINDS = [
    *(Kind.Q4_0, Kind.Q4_1, Kind.Q5_0, Kind.Q5_1, Kind.Q8_0),
    *(Kind.Q4_K, Kind.Q5_K, Kind.Q6_K, Kind.MXFP4),
]
SPECIAL_HALVES = [0.0, -0.0, 65504.0, -65504.0, 2.0**-24, -(2.0**-15), np.inf, -np.inf, np.nan]
# Where each block has its half-precision numbers, in bytes.
HALVES = {kind: [0] for kind in KINDS} | {
    Kind.MXFP4: [],
    Kind.Q4_1: [0, 2],
    Kind.Q5_1: [0, 2],
    Kind.Q4_K: [0, 2],
    Kind.Q5_K: [0, 2],
    Kind.Q6_K: [208],
}


def random_rows(kind: Kind, n_rows: int, n_in: int, largest: float = 0.25) -> np.ndarray:
    """(n_rows, row_bytes) uint8; numbers around zero, most of them below `largest`."""
    rng = np.random.default_rng([n_rows, n_in, int(kind)])
    n_elements, n_bytes = gguf.GGML_QUANT_SIZES[kind]
    blocks = rng.integers(0, 256, (n_rows * n_in // n_elements, n_bytes), dtype=np.uint8)
    if kind == Kind.MXFP4:  # the largest number is six times the power of two
        least = int(np.floor(np.log2(largest / 6))) + 127 - 2
        blocks[:, 0] = rng.integers(least, least + 3, len(blocks))
        return blocks.reshape(n_rows, -1)
    steps = {Kind.Q8_0: 127, Kind.Q4_K: 63 * 15, Kind.Q5_K: 63 * 31, Kind.Q6_K: 127 * 32}
    steps |= {Kind.Q4_0: 8, Kind.Q4_1: 15, Kind.Q5_0: 16, Kind.Q5_1: 31}
    scale = largest / steps[kind] * rng.uniform(0.5, 1, len(blocks))
    put_halves(blocks, HALVES[kind][0], scale)
    if len(HALVES[kind]) == 2:  # a minimum, such that numbers lie around zero
        in_256 = n_elements == 256
        put_halves(blocks, HALVES[kind][1], scale * steps[kind] / 2 / (63 if in_256 else -1))
    return blocks.reshape(n_rows, -1)


def put_special_scales(rows: np.ndarray, kind: Kind) -> None:
    """Each scale zero, largest, subnormal, infinite or no number, with each minimum; of powers of
    two, which are a byte, every one that there is. `rows`: len(SPECIAL_HALVES) ** 2 of them."""
    blocks = rows.reshape(-1, gguf.GGML_QUANT_SIZES[kind][1])
    if kind == Kind.MXFP4:
        blocks[:, 0] = np.arange(len(blocks))  # the lower eight bits
    for start, halves in zip(
        HALVES[kind], np.meshgrid(SPECIAL_HALVES, SPECIAL_HALVES), strict=False
    ):
        put_halves(blocks, start, np.repeat(halves.reshape(-1), len(blocks) // len(rows)))


def put_halves(blocks: np.ndarray, start: int, values: np.ndarray) -> None:
    halves = np.asarray(values).astype(np.float16)
    each = np.ascontiguousarray(np.broadcast_to(halves, len(blocks)))
    blocks[:, start : start + 2] = each.view(np.uint8).reshape(-1, 2)
