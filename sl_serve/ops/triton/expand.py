"""Rows in blocks to plain numbers."""

from __future__ import annotations

import torch
import triton
import triton.language as tl

from sl_serve.ops.triton.blocks import BLOCK_DECODERS
from sl_serve.ops.triton.groups import GROUP_DECODERS
from sl_serve.weights.quantised import QuantisedRows

DECODERS = BLOCK_DECODERS | GROUP_DECODERS
TILE = 1024  # numbers of a program


@triton.jit
def _to_bfloat16_bits(number):
    """Rounded to nearest, ties to even, on any card: to float32's upper half."""
    bits = number.to(tl.uint32, bitcast=True)
    rounded = (bits + 0x7FFF + ((bits >> 16) & 1)) >> 16
    is_nan = (bits & 0x7FFFFFFF) > 0x7F800000
    return tl.where(is_nan, 0x7FC0, rounded).to(tl.uint16)


@triton.jit
def _expand(
    data,
    out,
    n_elements,
    decode: tl.constexpr,
    block_elements: tl.constexpr,
    block_bytes: tl.constexpr,
    to_bfloat16: tl.constexpr,
    tile: tl.constexpr,
):
    at = tl.program_id(0).to(tl.int64) * tile + tl.arange(0, tile)
    known = tl.minimum(at, n_elements - 1)  # what is read twice is not written
    block = data + known // block_elements * block_bytes
    number = decode(block, (known % block_elements).to(tl.int32))
    if to_bfloat16:
        number = _to_bfloat16_bits(number)
    tl.store(out + at, number.to(out.dtype.element_ty), mask=at < n_elements)


def expands(rows: QuantisedRows) -> bool:
    return rows.format.name in DECODERS


def expand_rows(rows: QuantisedRows, out: torch.Tensor) -> None:
    """out (n_rows, n_in) = rows, bit for bit what `widened` gives, rounded to nearest even."""
    format, n = rows.format, out.numel()
    assert rows.data.is_contiguous() and out.is_contiguous() and out.shape == rows.shape
    to_bfloat16 = out.dtype is torch.bfloat16
    _expand[(triton.cdiv(n, TILE),)](
        rows.data,
        out.view(torch.uint16) if to_bfloat16 else out,
        n,
        DECODERS[format.name],
        format.block_elements,
        format.block_bytes,
        to_bfloat16,
        TILE,
        enable_fp_fusion=False,  # a product that is rounded before the sum, as everywhere
    )
