"""What a machine can do, as numbers: sizes, bandwidths, arithmetic. Measured or looked up."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import NamedTuple

import numpy as np
import numpy.typing as npt

Floats = npt.NDArray[np.float64]


@dataclass(frozen=True, slots=True)
class MatmulRates:
    """Achieved FLOP/s of a matrix product by its number of rows: points (rows, FLOP/s), fewest
    rows first.

    Between points the *time* is interpolated. Below the first it is constant, because few rows
    take as long as it takes to read the matrix; above the last it grows with the rows.
    """

    points: tuple[tuple[float, float], ...]

    def __post_init__(self) -> None:
        rows = [r for r, _ in self.points]
        assert rows == sorted(set(rows)) and rows[0] > 0, "rows: positive and increasing"
        assert all(rate > 0 for _, rate in self.points)

    @property
    def peak_flops_per_s(self) -> float:
        return max(rate for _, rate in self.points)

    def seconds(self, rows: Floats, flops_per_row: float) -> Floats:
        """Time of products of `rows` rows (any shape) that need flops_per_row FLOPs each."""
        known_rows = np.array([r for r, _ in self.points])
        # Noise of a measurement must not make more rows faster.
        known_s = np.maximum.accumulate([r / rate for r, rate in self.points])
        beyond = np.maximum(rows / known_rows[-1], 1.0)
        inside: Floats = np.interp(np.minimum(rows, known_rows[-1]), known_rows, known_s)
        return np.where(rows > 0, inside * beyond * flops_per_row, 0.0)

    def faster(self, factor: float) -> MatmulRates:
        return MatmulRates(tuple((rows, rate * factor) for rows, rate in self.points))


class AttentionRates(NamedTuple):
    """Attention's time is the sum of both: what was cached before the step has to be read, and
    every new token meets its whole context."""

    prefix_bytes_per_s: float
    flops_per_s: float


NO_ATTENTION = AttentionRates(math.inf, math.inf)  # takes no time: nothing is attended to


@dataclass(frozen=True, slots=True)
class Hardware:
    """Sizes in bytes, rates in bytes/s, all achieved rather than nominal.

    Without device memory (device_bytes == 0) the processor computes in host memory: there is no
    link, and `matmul`, `head`, `attention` and `elementwise_bytes_per_s` are the processor's.
    """

    name: str
    device_bytes: int
    host_bytes: int
    disk_bytes: int
    link_down_bytes_per_s: float  # host to device, alone
    link_up_bytes_per_s: float  # device to host, alone
    link_down_both_bytes_per_s: float  # while the other direction is busy
    link_up_both_bytes_per_s: float
    host_read_bytes_per_s: float  # all threads
    disk_read_bytes_per_s: float  # large direct reads, several in flight; 0: no disk
    device_read_bytes_per_s: float  # 0 without a device
    matmul: MatmulRates  # of a layer
    head: MatmulRates  # the vocabulary matrix, and choosing a token from what it gives
    attention: AttentionRates
    # Norms, activation functions, rotations, new K and V: activation and KV bytes they get done.
    elementwise_bytes_per_s: float
    cell_overhead_s: float = 0.0  # fixed cost of a layer for a sub-batch: calls, launches
    # By the processor, of KV in host memory beside a device.
    host_attention: AttentionRates = NO_ATTENTION

    def __post_init__(self) -> None:
        assert self.link_down_both_bytes_per_s <= self.link_down_bytes_per_s
        assert self.link_up_both_bytes_per_s <= self.link_up_bytes_per_s
        slowest = min(self.link_down_both_bytes_per_s, self.link_up_both_bytes_per_s)
        assert slowest > 0 or not self.has_device

    @property
    def has_device(self) -> bool:
        return self.device_bytes > 0

    @property
    def compute_read_bytes_per_s(self) -> float:
        """Of the memory that the arithmetic reads."""
        return self.device_read_bytes_per_s if self.has_device else self.host_read_bytes_per_s


def roofline(peak_flops_per_s: float, efficiency: float, knee_rows: float) -> MatmulRates:
    """A matrix product that reaches efficiency x peak from knee_rows on, and below it takes as
    long as at the knee."""
    return MatmulRates(((knee_rows, peak_flops_per_s * efficiency),))
