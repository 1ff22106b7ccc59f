"""One number of a block, for each of GGUF's formats: what `Format.widen` says, element by element.

A decoder gets the address of a block (bytes) and the place of an element in it, and gives float32.
The memory traffic is what counts: bytes that neighbours share come from the cache. Blocks with
half-precision numbers start at even addresses, as those do. A format whose blocks are a header
and packed integers needs a function of a few lines, and its name in BLOCK_DECODERS.
"""

from __future__ import annotations

import triton
import triton.language as tl


@triton.jit
def _byte(block, at):
    return tl.load(block + at).to(tl.int32)


@triton.jit
def _signed_byte(block, at):
    return tl.load(block + at).to(tl.int8, bitcast=True).to(tl.int32)


@triton.jit
def _half(block, at):
    return tl.load((block + at).to(tl.pointer_type(tl.float16))).to(tl.float32)


@triton.jit
def _nibble(block, at, i):
    """Of 32 numbers in 16 bytes: the lower halves first."""
    return (_byte(block, at + i % 16) >> (i // 16 * 4)) & 15


@triton.jit
def _fifth_bit(block, at, i):
    return ((_byte(block, at + i // 8) >> (i % 8)) & 1) << 4


@triton.jit
def _q4_0(block, i):
    return _half(block, 0) * (_nibble(block, 2, i) - 8).to(tl.float32)


@triton.jit
def _q4_1(block, i):
    return _half(block, 0) * _nibble(block, 4, i).to(tl.float32) + _half(block, 2)


@triton.jit
def _q5_0(block, i):
    number = _nibble(block, 6, i) | _fifth_bit(block, 2, i)
    return _half(block, 0) * (number - 16).to(tl.float32)


@triton.jit
def _q5_1(block, i):
    number = _nibble(block, 8, i) | _fifth_bit(block, 4, i)
    return _half(block, 0) * number.to(tl.float32) + _half(block, 2)


@triton.jit
def _q8_0(block, i):
    return _half(block, 0) * _signed_byte(block, 2 + i).to(tl.float32)


@triton.jit
def _six_bits(block, at, part):
    """The part-th of eight numbers in 12 bytes from 4 on: four times lower six bits at `at`; the
    lower four bits of the others stand at 12, their upper two in the upper ones at `at`."""
    upper = _byte(block, 12 + part % 4) >> ((at - 4) & 4)
    later = (upper & 15) | ((_byte(block, at + part % 4) >> 2) & 48)
    return tl.where(part < 4, _byte(block, at + part % 4) & 63, later)


@triton.jit
def _scaled(block, part, number):
    scale = _half(block, 0) * _six_bits(block, 4, part).to(tl.float32)
    minimum = _half(block, 2) * _six_bits(block, 8, part).to(tl.float32)
    return scale * number.to(tl.float32) - minimum


@triton.jit
def _paired_nibble(block, at, i):
    """Of 256 numbers: 64 in 32 bytes each, lower halves first."""
    return (_byte(block, at + i // 64 * 32 + i % 32) >> (i // 32 % 2 * 4)) & 15


@triton.jit
def _q4_k(block, i):
    return _scaled(block, i // 32, _paired_nibble(block, 16, i))


@triton.jit
def _q5_k(block, i):
    upper = (_byte(block, 16 + i % 32) >> (i // 32)) & 1
    return _scaled(block, i // 32, _paired_nibble(block, 48, i) | (upper << 4))


@triton.jit
def _q6_k(block, i):
    lower = (_byte(block, i // 128 * 64 + i % 64) >> (i // 64 % 2 * 4)) & 15
    upper = (_byte(block, 128 + i // 128 * 32 + i % 32) >> (i // 32 % 4 * 2)) & 3
    scale = _half(block, 208) * _signed_byte(block, 192 + i // 16).to(tl.float32)
    return scale * ((lower | (upper << 4)) - 32).to(tl.float32)


@triton.jit
def _mxfp4(block, i):
    """Twice an E2M1 number times half of the power of two, which for the least two is subnormal."""
    code, exponent = _nibble(block, 1, i), _byte(block, 0)
    size = code & 7
    doubled = tl.where(size < 2, size, (((size & 1) | 2) << (size >> 1)) >> 1)
    least = 0x200000 << tl.minimum(exponent, 1)
    bits = tl.where(exponent < 2, least, (exponent - 1) << 23)
    number = tl.where(code < 8, doubled, -doubled)
    return bits.to(tl.float32, bitcast=True) * number.to(tl.float32)


BLOCK_DECODERS = {
    "q4_0": _q4_0,
    "q4_1": _q4_1,
    "q5_0": _q5_0,
    "q5_1": _q5_1,
    "q8_0": _q8_0,
    "q4_k": _q4_k,
    "q5_k": _q5_k,
    "q6_k": _q6_k,
    "mxfp4": _mxfp4,
}
