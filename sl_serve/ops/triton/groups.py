"""One number of a group, for each kind: what `weights/groups.py` says, element by element.

Behind four bytes of header, integers of 4 bits are 32 in 16 bytes, the lower halves first. A kind
needs a function of a few lines, and its name in KINDS.
"""

from __future__ import annotations

import triton
import triton.language as tl

from sl_serve.ops.triton.blocks import _byte, _half, _signed_byte
from sl_serve.weights.groups import GROUP_FORMATS


@triton.jit
def _header(block):
    """Blocks start at multiples of four bytes."""
    return tl.load(block.to(tl.pointer_type(tl.int32)))


@triton.jit
def _four_bits(block, i):
    return (_byte(block, 4 + i // 32 * 16 + i % 16) >> (i % 32 // 16 * 4)) & 15


@triton.jit
def _scaled(block, number):
    return number.to(tl.float32) * _header(block).to(tl.float32, bitcast=True)


@triton.jit
def _scaled_from_zero(block, number):
    """The zero is the header's first byte, the scale the other three."""
    scale = (_header(block) & -256).to(tl.float32, bitcast=True)
    return number.to(tl.float32) * scale - scale * _signed_byte(block, 0).to(tl.float32)


@triton.jit
def _int4(block, i):
    return _scaled_from_zero(block, _four_bits(block, i))


@triton.jit
def _int4_sym(block, i):
    return _scaled(block, _four_bits(block, i) - 8)


@triton.jit
def _int4_min(block, i):
    return _half(block, 0) * _four_bits(block, i).to(tl.float32) + _half(block, 2)


@triton.jit
def _int8(block, i):
    return _scaled_from_zero(block, _signed_byte(block, 4 + i))


@triton.jit
def _int8_sym(block, i):
    return _scaled(block, _signed_byte(block, 4 + i))


@triton.jit
def _fp8(block, i):
    """float8_e4m3fn, by its bits: cards before Ada have no instruction for it."""
    stored = _byte(block, 4 + i)
    exponent, mantissa = (stored >> 3) & 15, stored & 7
    normal = ((exponent + 120) << 23) | (mantissa << 20)
    subnormal = (mantissa.to(tl.float32) * 0.001953125).to(tl.int32, bitcast=True)
    bits = tl.where(exponent == 0, subnormal, normal)
    bits = tl.where((stored & 127) == 127, 0x7FC00000, bits) | ((stored & 128) << 24)
    return _scaled(block, bits.to(tl.float32, bitcast=True))


KINDS = {
    "int4": _int4,
    "int4_sym": _int4_sym,
    "int4_min": _int4_min,
    "int8": _int8,
    "int8_sym": _int8_sym,
    "fp8": _fp8,
}
GROUP_DECODERS = {g.format.name: KINDS[g.kind] for g in GROUP_FORMATS.values()}
