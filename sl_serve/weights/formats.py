"""How numbers lie in memory: one after another, or in blocks of a few bits each with scales.

The blocks are those of GGUF files; `widen` gives the very float32 numbers that dequantising the
file gives. A scale is a half-precision number or a power of two, and the integers have 8 bits
at most: their products are exact in float32, and a single rounding is left, that of adding the
minimum.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from functools import partial

import torch

Widen = Callable[[torch.Tensor], torch.Tensor]
WIDENING_BYTES = 16  # per element, the most that any `widen` has alive at once, its result included


@dataclass(frozen=True, slots=True)
class Format:
    """Rows are runs of whole blocks."""

    name: str  # as the native core calls it
    block_elements: int
    block_bytes: int
    widen_blocks: Widen  # (n, block_bytes) uint8 -> (n, block_elements) float32
    dtype: torch.dtype | None = None  # of plain numbers: blocks of one element
    is_narrow: bool = False  # integers of 6 bits at most, kSpan in csrc/rounding.inc

    def row_bytes(self, n_in: int) -> int:
        assert n_in % self.block_elements == 0
        return n_in // self.block_elements * self.block_bytes

    def elements(self, row_bytes: int) -> int:
        return row_bytes // self.block_bytes * self.block_elements

    def widen(self, rows: torch.Tensor) -> torch.Tensor:
        """(n_rows, row_bytes) uint8 -> (n_rows, n_in) float32."""
        blocks = rows.reshape(-1, self.block_bytes)
        return self.widen_blocks(blocks).reshape(len(rows), -1)


def _halves(blocks: torch.Tensor, start: int, n: int = 1) -> torch.Tensor:
    """n half-precision numbers from byte `start` of each block, (n_blocks, n) float32."""
    return blocks[:, start : start + 2 * n].contiguous().view(torch.float16).float()


def _nibbles(packed: torch.Tensor) -> torch.Tensor:
    """The lower halves of n bytes (..., n) and then their upper ones, (..., 2 n) uint8."""
    return torch.cat([packed & 15, packed >> 4], dim=-1)


def _bits(packed: torch.Tensor, n_bits: int) -> torch.Tensor:
    """(..., n) bytes -> (..., 8 / n_bits, n) uint8: all lowest bits, then the next ones, ..."""
    shifts = torch.arange(0, 8, n_bits, dtype=torch.uint8, device=packed.device)
    return (packed[..., None, :] >> shifts[:, None]) & ((1 << n_bits) - 1)


def _fifth_bits(packed: torch.Tensor) -> torch.Tensor:
    """(n, 4) bytes, a bit per element in order -> (n, 32) uint8, 16 or 0."""
    return _bits(packed, 1).transpose(1, 2).reshape(len(packed), 32) << 4


def _signed(numbers: torch.Tensor, offset: int) -> torch.Tensor:
    return (numbers.to(torch.int8) - offset).float()


def _q4_0(blocks: torch.Tensor) -> torch.Tensor:
    return _halves(blocks, 0) * _signed(_nibbles(blocks[:, 2:]), 8)


def _q4_1(blocks: torch.Tensor) -> torch.Tensor:
    return _halves(blocks, 0) * _nibbles(blocks[:, 4:]).float() + _halves(blocks, 2)


def _q5_0(blocks: torch.Tensor) -> torch.Tensor:
    numbers = _nibbles(blocks[:, 6:]) | _fifth_bits(blocks[:, 2:6])
    return _halves(blocks, 0) * _signed(numbers, 16)


def _q5_1(blocks: torch.Tensor) -> torch.Tensor:
    numbers = _nibbles(blocks[:, 8:]) | _fifth_bits(blocks[:, 4:8])
    return _halves(blocks, 0) * numbers.float() + _halves(blocks, 2)


def _q8_0(blocks: torch.Tensor) -> torch.Tensor:
    return _halves(blocks, 0) * _signed(blocks[:, 2:], 0)


def _scales_and_minima(blocks: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """Of the eight parts of a block of Q4_K or Q5_K, each (n, 8, 1) float32: two halves, each to be
    multiplied by six bits, which are packed into 12 bytes."""
    scales, minima, upper = blocks[:, 4:8], blocks[:, 8:12], blocks[:, 12:16]
    scales = torch.cat([scales & 63, (upper & 15) | (scales >> 2 & 48)], dim=1)
    minima = torch.cat([minima & 63, (upper >> 4) | (minima >> 2 & 48)], dim=1)
    scale, minimum = _halves(blocks, 0) * scales.float(), _halves(blocks, 2) * minima.float()
    return scale[..., None], minimum[..., None]


def _q4_k(blocks: torch.Tensor) -> torch.Tensor:
    scale, minimum = _scales_and_minima(blocks)
    numbers = _bits(blocks[:, 16:].reshape(-1, 4, 32), 4).reshape(-1, 8, 32)
    return (scale * numbers.float() - minimum).flatten(1)


def _q5_k(blocks: torch.Tensor) -> torch.Tensor:
    scale, minimum = _scales_and_minima(blocks)
    lower = _bits(blocks[:, 48:].reshape(-1, 4, 32), 4).reshape(-1, 8, 32)
    numbers = lower | _bits(blocks[:, 16:48], 1) << 4
    return (scale * numbers.float() - minimum).flatten(1)


def _q6_k(blocks: torch.Tensor) -> torch.Tensor:
    lower = _bits(blocks[:, :128].reshape(-1, 2, 64), 4).reshape(-1, 8, 32)
    upper = _bits(blocks[:, 128:192].reshape(-1, 2, 32), 2).reshape(-1, 8, 32)
    scales = _halves(blocks, 208) * _signed(blocks[:, 192:208], 0)
    numbers = _signed(lower | upper << 4, 32).view(-1, 16, 16)
    return (scales[..., None] * numbers).flatten(1)


def _mxfp4(blocks: torch.Tensor) -> torch.Tensor:
    """Numbers of E2M1, a sign, two bits of exponent and one of mantissa, doubled to be integers;
    their power of two is halved ("OCP Microscaling Formats (MX) Specification" 1.0, 5.3.3)."""
    codes = _nibbles(blocks[:, 1:])
    size = codes & 7
    doubled = torch.where(size < 2, size, ((size & 1 | 2) << (size >> 1)) >> 1).to(torch.int8)
    return _half_powers(blocks[:, :1]) * torch.where(codes < 8, doubled, -doubled).float()


def _half_powers(exponents: torch.Tensor) -> torch.Tensor:
    """2 ** (e - 128), float32, of E8M0's e (uint8); the least two are no normal floats."""
    e = exponents.int()
    least = torch.full_like(e, 1 << 21) << e.clamp(max=1)
    return torch.where(e > 1, (e - 1) << 23, least).view(torch.float32)


def _plain(dtype: torch.dtype, blocks: torch.Tensor) -> torch.Tensor:
    return blocks.contiguous().view(dtype).float()


def _plain_format(dtype: torch.dtype) -> Format:
    name = str(dtype).removeprefix("torch.")
    return Format(name, 1, dtype.itemsize, partial(_plain, dtype), dtype)


_PLAIN = {d: _plain_format(d) for d in (torch.float32, torch.bfloat16, torch.float16)}
_IN_BLOCKS = (
    Format("q4_0", 32, 18, _q4_0, is_narrow=True),
    Format("q4_1", 32, 20, _q4_1, is_narrow=True),
    Format("q5_0", 32, 22, _q5_0, is_narrow=True),
    Format("q5_1", 32, 24, _q5_1, is_narrow=True),
    Format("q8_0", 32, 34, _q8_0),
    Format("q4_k", 256, 144, _q4_k, is_narrow=True),
    Format("q5_k", 256, 176, _q5_k, is_narrow=True),
    Format("q6_k", 256, 210, _q6_k, is_narrow=True),
    Format("mxfp4", 32, 17, _mxfp4, is_narrow=True),
)
BLOCK_FORMATS = {f.name: f for f in _IN_BLOCKS}


def plain(dtype: torch.dtype) -> Format:
    """Numbers of `dtype`, one after another."""
    return _PLAIN[dtype]
