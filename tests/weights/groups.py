"""Rows in groups, and what they stand for, computed in float64 apart from the code under test."""

from __future__ import annotations

import numpy as np
import torch

from sl_serve.weights.groups import GROUP_FORMATS, Grouped
from sl_serve.weights.quantised import QuantisedRows

NAMES = list(GROUP_FORMATS)


def random_grouped(name: str, n_rows: int, n_in: int, largest: float = 0.25) -> Grouped:
    """Any numbers but fp8's NaN; scales of 11 bits, as float16 has, of ordinary size."""
    groups = GROUP_FORMATS[name]
    rng = np.random.default_rng([n_rows, n_in, NAMES.index(name)])
    numbers = rng.integers(0, 1 << groups.n_bits, (n_rows, n_in), dtype=np.uint8)
    if groups.kind == "fp8":
        numbers[numbers & 0x7F == 0x7F] = 0
    steps = {"int4": 8, "int8": 128, "fp8": 448}[groups.kind.partition("_")[0]]
    shape = n_rows, n_in // groups.group
    scales = (largest / steps * rng.uniform(0.5, 1, shape)).astype(np.float16)
    low, high = (0, 16) if groups.n_bits == 4 else (-128, 128)
    zeros = torch.from_numpy(rng.integers(low, high, shape).astype(np.int8))
    return Grouped(
        torch.from_numpy(numbers),
        torch.from_numpy(scales).float(),
        zeros if groups.has_zeros else None,
        minima(rng, shape, largest) if groups.kind == "int4_min" else None,
    )


def minima(rng: np.random.Generator, shape: tuple[int, int], largest: float) -> torch.Tensor:
    return torch.from_numpy(rng.uniform(-largest, 0, shape).astype(np.float16)).float()


def in_float64(name: str, rows: Grouped) -> np.ndarray:
    """Scale times (number minus zero), or times number plus minimum, by the definition of each
    kind: exact, before it is rounded to float32."""
    groups = GROUP_FORMATS[name]
    stored = rows.numbers.numpy()
    if groups.kind == "fp8":
        numbers = e4m3fn(stored)
    elif groups.n_bits == 8:
        numbers = stored.view(np.int8).astype(np.float64)
    else:
        numbers = stored - (8.0 if groups.kind == "int4_sym" else 0.0)
    if rows.zeros is not None:
        numbers = numbers - np.repeat(rows.zeros.numpy().astype(np.float64), groups.group, axis=1)
    products = numbers * np.repeat(rows.scales.numpy().astype(np.float64), groups.group, axis=1)
    if rows.minima is None:
        return products
    return products + np.repeat(rows.minima.numpy().astype(np.float64), groups.group, axis=1)


def e4m3fn(stored: np.ndarray) -> np.ndarray:
    """A sign, four bits of exponent with a bias of 7, three of mantissa; no infinity."""
    exponent, mantissa = (stored >> 3 & 15).astype(int), stored & 7
    size = np.where(exponent == 0, mantissa * 2.0**-9, (1 + mantissa / 8) * 2.0 ** (exponent - 7.0))
    size = np.where(stored & 0x7F == 0x7F, np.nan, size)
    return np.where(stored & 0x80, -size, size)


def rows_of(name: str, n_out: int, n_in: int) -> QuantisedRows:
    """As they lie in a layer's image: in the middle of other bytes."""
    packed = GROUP_FORMATS[name].pack(random_grouped(name, n_out, n_in))
    image = torch.full((packed.numel() + 512,), 0xFF, dtype=torch.uint8)
    place = image[256 : 256 + packed.numel()].view(packed.shape)
    return QuantisedRows(place.copy_(packed), GROUP_FORMATS[name].format)
