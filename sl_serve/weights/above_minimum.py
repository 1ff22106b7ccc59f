"""Groups of numbers 0 to 15 above a minimum: the scale and minimum of least squared error."""

from __future__ import annotations

import torch

TOP = 15

# Shares of a group's range. With 16 numbers to stand for them, most groups lose less by clipping
# their largest ones than by coarser steps for all: which share, is tried (minimal squared error by
# search: Choukroun et al., "Low-bit Quantization of Neural Networks for Efficient Inference",
# arXiv 1902.06822).
RANGES = (1.0, 0.93, 0.86, 0.79, 0.72)
FITS = 3  # of scale and minimum; a fourth gains less than 0.5 % of the error


def fit(x: torch.Tensor, weights: torch.Tensor | None = None) -> tuple[torch.Tensor, torch.Tensor]:
    """x (group, n) float32, one group a column -> scales and minima (n,), as float16 holds them.

    weights (group,), positive: how much an error counts; None: all alike. Numbers and the line
    through them improve each other by turns, from several ranges."""
    low, high = x.amin(0), x.amax(0)
    middle, half = (low + high) / 2, (high - low) / 2
    least = torch.full_like(low, torch.inf)
    found = _halves(half * (2 / TOP), low)
    for share in RANGES:
        scales, minima = _halves(half * (share * 2 / TOP), middle - half * share)
        for _ in range(FITS):
            scales, minima = _line(x, steps_above(x, scales, minima), weights, scales)
        steps = steps_above(x, scales, minima)
        errors = _sum(steps.mul_(scales).add_(minima).sub_(x).square_(), weights)
        better = errors < least
        least = torch.where(better, errors, least)
        found = torch.where(better, scales, found[0]), torch.where(better, minima, found[1])
    return found


def steps_above(x: torch.Tensor, scales: torch.Tensor, minima: torch.Tensor) -> torch.Tensor:
    """The numbers 0 to 15 nearest to x, as floats."""
    inverse = torch.where(scales > 0, 1 / scales, 0)
    return (x - minima).mul_(inverse).round_().clamp_(0, TOP)


def _line(
    x: torch.Tensor, steps: torch.Tensor, weights: torch.Tensor | None, scales: torch.Tensor
) -> tuple[torch.Tensor, torch.Tensor]:
    """Of least squared error, x about scale * steps + minimum; with the scale that was where steps
    are all alike."""
    n = len(x) if weights is None else weights.sum()
    sum_x, sum_steps = _sum(x, weights), _sum(steps, weights)
    spread = n * _sum(steps * steps, weights) - sum_steps * sum_steps
    slope = (n * _sum(x * steps, weights) - sum_x * sum_steps) / spread
    slope = torch.where((spread > 0) & (slope > 0), slope, scales).half().float()
    return _halves(slope, (sum_x - slope * sum_steps) / n)


def _sum(x: torch.Tensor, weights: torch.Tensor | None) -> torch.Tensor:
    return x.sum(0) if weights is None else weights @ x


def _halves(scales: torch.Tensor, minima: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """As a group's header has them."""
    return scales.half().float(), minima.half().float()
