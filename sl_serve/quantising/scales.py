"""A scale and a minimum for each group, of least error where inputs count by their weight."""

from __future__ import annotations

import torch

from sl_serve.weights.quantise import FITS, RANGES

TOP = 15  # of the numbers 0 to 15


def fit_groups(
    w: torch.Tensor, input_weights: torch.Tensor, group: int
) -> tuple[torch.Tensor, torch.Tensor]:
    """w (in, out) float32, positive input_weights (in,) -> scales and minima (in / group, out), as
    float16 holds them."""
    pairs = [
        _fit(w[start : start + group], input_weights[start : start + group])
        for start in range(0, len(w), group)
    ]
    scales, minima = zip(*pairs, strict=True)
    return torch.stack(scales), torch.stack(minima)


def steps_above(x: torch.Tensor, scales: torch.Tensor, minima: torch.Tensor) -> torch.Tensor:
    """The numbers 0 to 15 nearest to x, as floats."""
    inverse = torch.where(scales > 0, 1 / scales, 0)
    return (x - minima).mul_(inverse).round_().clamp_(0, TOP)


def _fit(x: torch.Tensor, weights: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """x (group, n) and weights (group,) -> (n,) each. Numbers and the line through them improve
    each other by turns, from several ranges."""
    weights = weights / weights.mean()
    low, high = x.amin(0), x.amax(0)
    middle, half = (low + high) / 2, (high - low) / 2
    least = torch.full_like(low, torch.inf)
    found = _halves(half * (2 / TOP), low)
    for share in RANGES:
        scales, minima = _halves(half * (share * 2 / TOP), middle - half * share)
        for _ in range(FITS):
            scales, minima = _line(x, steps_above(x, scales, minima), weights, scales)
        steps = steps_above(x, scales, minima)
        errors = weights @ steps.mul_(scales).add_(minima).sub_(x).square_()
        better = errors < least
        least = torch.where(better, errors, least)
        found = torch.where(better, scales, found[0]), torch.where(better, minima, found[1])
    return found


def _line(
    x: torch.Tensor, steps: torch.Tensor, weights: torch.Tensor, scales: torch.Tensor
) -> tuple[torch.Tensor, torch.Tensor]:
    """Of least weighted squared error, x about scale * steps + minimum; with the scale that was
    where steps are all alike."""
    total = weights.sum()
    mean_x, mean_steps = weights @ x / total, weights @ steps / total
    off = steps - mean_steps
    spread = weights @ (off * off)
    slope = (weights @ (off * x)) / spread
    slope = torch.where((spread > 0) & (slope > 0), slope, scales).half().float()
    return _halves(slope, mean_x - slope * mean_steps)


def _halves(scales: torch.Tensor, minima: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """As a group's header has them."""
    return scales.half().float(), minima.half().float()
