"""A scale and a minimum for each group, of least error where inputs count by their weight."""

from __future__ import annotations

import torch

from sl_serve.weights.above_minimum import fit


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


def _fit(x: torch.Tensor, weights: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    return fit(x, weights / weights.mean())
