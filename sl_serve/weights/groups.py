"""Rows in groups of numbers that share a scale: integers of 4 or 8 bits, and 8-bit floats.

A block is one group: four bytes of header, then the numbers. The header is the scale, a float32;
where integers have a zero of their own, its last 8 bits are that zero, signed, and the scale has
the other 24. So scales that files have as float16 or bfloat16 are kept to the last bit, and
`scale * (number - zero)` is exact in float32 for every scale of 16 significant bits or fewer.

Where they have a minimum instead, scale and minimum are float16 numbers, and `scale * number +
minimum` is rounded once. No published layout has that: it is for what we quantise ourselves.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import partial
from typing import Literal, NamedTuple

import torch

from sl_serve.weights.formats import Format

HEADER_BYTES = 4
GROUPS = (128, 64, 32)  # numbers in a group; a kernel takes 32 at a time
Kind = Literal["int4", "int4_sym", "int4_min", "int8", "int8_sym", "fp8"]
WITH_ZEROS = ("int4", "int8")


class Grouped(NamedTuple):
    """A matrix (out, in) in groups along its inputs, before it is packed."""

    # uint8 (out, in): of 4 bits 0 to 15, of 8 bits int8's bytes, of fp8 float8_e4m3fn's.
    numbers: torch.Tensor
    scales: torch.Tensor  # float32 (out, n_groups)
    # int8 (out, n_groups). Without: 8 for those of 4 bits, 0 for those of 8
    zeros: torch.Tensor | None = None
    minima: torch.Tensor | None = None  # float32 (out, n_groups), of int4_min


@dataclass(frozen=True, slots=True)
class GroupFormat:
    kind: Kind
    group: int
    format: Format

    @property
    def n_bits(self) -> int:
        return 4 if self.kind.startswith("int4") else 8

    @property
    def has_zeros(self) -> bool:
        return self.kind in WITH_ZEROS

    def pack(self, rows: Grouped) -> torch.Tensor:
        """uint8 (out, row_bytes)."""
        n_out, n_in = rows.numbers.shape
        blocks = torch.empty(n_out, n_in // self.group, self.format.block_bytes, dtype=torch.uint8)
        blocks[..., :HEADER_BYTES] = self._headers(rows)[..., None].view(torch.uint8)
        numbers = rows.numbers.view(n_out, n_in // self.group, self.group)
        if self.n_bits == 4:
            parts = numbers.view(n_out, -1, self.group // 32, 2, 16)
            numbers = (parts[..., 0, :] | parts[..., 1, :] << 4).flatten(2)
        blocks[..., HEADER_BYTES:] = numbers
        return blocks.view(n_out, -1)

    def _headers(self, rows: Grouped) -> torch.Tensor:
        """int32 (out, n_groups)."""
        if self.kind == "int4_min":
            assert rows.minima is not None
            return torch.stack([rows.scales, rows.minima], -1).half().view(torch.int32)[..., 0]
        heads = rows.scales.contiguous().view(torch.int32)
        if self.has_zeros:
            assert rows.zeros is not None
            heads = (heads & ~0xFF) | (rows.zeros.to(torch.int32) & 0xFF)
        return heads


def keeps_scales(scales: torch.Tensor) -> bool:
    """Whether a header with a zero holds them exactly."""
    return not bool((scales.float().contiguous().view(torch.int32) & 0xFF).any())


def as_floats(kind: Kind, numbers: torch.Tensor) -> torch.Tensor:
    """What a matrix's stored numbers stand for, scales and zeros apart."""
    if kind == "fp8":
        return numbers.view(torch.float8_e4m3fn).float()
    if kind in ("int4", "int4_min"):
        return numbers.float()
    return numbers.float() - 8 if kind == "int4_sym" else numbers.view(torch.int8).float()


def _widen(kind: Kind, blocks: torch.Tensor) -> torch.Tensor:
    heads, packed = blocks[:, :HEADER_BYTES].contiguous(), blocks[:, HEADER_BYTES:]
    if kind.startswith("int4"):
        parts = packed.reshape(len(blocks), -1, 1, 16)
        packed = torch.cat([parts & 15, parts >> 4], dim=2).flatten(1)
    numbers = as_floats(kind, packed)
    if kind == "int4_min":
        scale, minimum = heads.view(torch.float16).float().unbind(1)
        return numbers * scale[:, None] + minimum[:, None]
    if kind not in WITH_ZEROS:
        return numbers * heads.view(torch.float32)
    scales = (heads.view(torch.int32) & ~0xFF).view(torch.float32)
    return numbers * scales - scales * heads[:, :1].view(torch.int8).float()


def _group_format(kind: Kind, group: int) -> GroupFormat:
    bits, _, rest = kind.partition("_")
    name = f"{bits}_g{group}" + (f"_{rest}" if rest else "")
    n_bits = 4 if bits == "int4" else 8
    block_bytes = HEADER_BYTES + group * n_bits // 8
    widen = partial(_widen, kind)
    return GroupFormat(kind, group, Format(name, group, block_bytes, widen, is_narrow=n_bits == 4))


_KINDS: tuple[Kind, ...] = ("int4", "int4_sym", "int4_min", "int8", "int8_sym", "fp8")
GROUP_FORMATS = {g.format.name: g for g in (_group_format(k, n) for k in _KINDS for n in GROUPS)}


def group_format(kind: Kind, n_in: int, largest: int) -> GroupFormat | None:
    """That of the largest group, up to `largest`, that divides rows of `n_in`, or None."""
    fitting = [
        g
        for g in GROUP_FORMATS.values()
        if g.kind == kind and g.group <= largest and n_in % g.group == 0
    ]
    return max(fitting, key=lambda g: g.group, default=None)
