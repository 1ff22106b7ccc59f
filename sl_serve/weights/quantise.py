"""Float rows become groups of integers or 8-bit floats."""

from __future__ import annotations

import torch

from sl_serve.weights.above_minimum import RANGES, fit, steps_above
from sl_serve.weights.groups import Grouped, GroupFormat

LARGEST_FP8 = 448.0  # of e4m3fn
PART_ELEMENTS = 1 << 20  # quantised at a time


def quantise(rows: torch.Tensor, groups: GroupFormat, out: torch.Tensor) -> None:
    """(n_rows, n_in) of any float dtype -> `out`, uint8 (n_rows, row_bytes), packed."""
    n_part = max(1, PART_ELEMENTS // rows.shape[1])
    for start in range(0, len(rows), n_part):
        part = rows[start : start + n_part].float()
        out[start : start + n_part] = groups.pack(_grouped(part, groups))


def _grouped(rows: torch.Tensor, groups: GroupFormat) -> Grouped:
    x = rows.reshape(-1, groups.group).t().contiguous()  # a column each: sums run over long lines
    if groups.kind == "fp8":
        found = _eight_bit_floats(x)
    elif groups.kind == "int4_min":
        found = _above_minimum(x)
    else:
        found = _integers(x, groups)

    def by_row(heads: torch.Tensor | None) -> torch.Tensor | None:
        return None if heads is None else heads.view(len(rows), -1)

    numbers = found.numbers.t().reshape(rows.shape)
    scales = found.scales.view(len(rows), -1)
    return Grouped(numbers, scales, by_row(found.zeros), by_row(found.minima))


# Each gives Grouped of one group a column: numbers as bytes (group, n), the others (n,).


def _eight_bit_floats(x: torch.Tensor) -> Grouped:
    scales = _short(x.abs().amax(0) / LARGEST_FP8)
    numbers = (x * _inverse(scales)).clamp_(-LARGEST_FP8, LARGEST_FP8)
    return Grouped(numbers.to(torch.float8_e4m3fn).view(torch.uint8), scales)


def _above_minimum(x: torch.Tensor) -> Grouped:
    scales, minima = fit(x)
    return Grouped(steps_above(x, scales, minima).to(torch.uint8), scales, None, minima)


def _integers(x: torch.Tensor, groups: GroupFormat) -> Grouped:
    n_steps = (1 << groups.n_bits) - 1
    ranges = RANGES if groups.n_bits == 4 else RANGES[:1]
    if groups.has_zeros:
        scales, zeros = _best(x, x.amin(0).clamp_(max=0), x.amax(0).clamp_(min=0), n_steps, ranges)
    else:
        half = (n_steps + 1) // 2  # there is one more step below zero than above
        largest = x.abs().amax(0)
        scales, zeros = _best(x, largest * (-half / (half - 1)), largest, n_steps, ranges)
        zeros.fill_(half)
    steps = _rounded(x, scales, zeros, n_steps)
    if groups.n_bits == 4:
        scales = _fitted(x, steps, scales)
        steps = _rounded(x, scales, zeros, n_steps)
    numbers = steps + zeros  # 0 to n_steps
    offset = 128 if groups.n_bits == 8 else 0
    stored = (numbers - offset).to(torch.int8).view(torch.uint8)
    return Grouped(stored, scales, (zeros - offset).to(torch.int8) if groups.has_zeros else None)


def _best(
    x: torch.Tensor,
    low: torch.Tensor,
    high: torch.Tensor,
    n_steps: int,
    ranges: tuple[float, ...],
) -> tuple[torch.Tensor, torch.Tensor]:
    """Scale and zero of each column with the least squared error among `ranges`."""
    found: tuple[torch.Tensor, torch.Tensor] | None = None
    for share in ranges:
        scales = _short((high - low) * (share / n_steps))
        zeros = (-low * share * _inverse(scales)).round_().clamp_(0, n_steps)
        if len(ranges) == 1:
            return scales, zeros
        steps = _rounded(x, scales, zeros, n_steps)
        errors = torch.linalg.vector_norm(steps.mul_(scales).sub_(x), dim=0)
        if found is None:
            found, least = (scales, zeros), errors
            continue
        better = errors < least
        least = torch.where(better, errors, least)
        found = (
            torch.where(better, scales, found[0]),
            torch.where(better, zeros, found[1]),
        )
    assert found is not None
    return found


def _rounded(
    x: torch.Tensor, scales: torch.Tensor, zeros: torch.Tensor, n_steps: int
) -> torch.Tensor:
    """Steps from the zero, as floats."""
    steps = (x * _inverse(scales)).round_()
    return steps.clamp_(-zeros, n_steps - zeros)


def _fitted(x: torch.Tensor, steps: torch.Tensor, scales: torch.Tensor) -> torch.Tensor:
    """The scales of least squared error for these steps."""
    squares = steps.square().sum(0)
    return torch.where(squares > 0, _short((x * steps).sum(0) / squares), scales)


def _short(scales: torch.Tensor) -> torch.Tensor:
    """Rounded to 16 significant bits: all products are exact in float32 then, and a header that
    has a zero too holds them."""
    return ((scales.contiguous().view(torch.int32) + 0x80) & ~0xFF).view(torch.float32)


def _inverse(scales: torch.Tensor) -> torch.Tensor:
    """Zero for a group of zeros."""
    return torch.where(scales > 0, 1 / scales, 0)
