"""Rotary positions: inverse frequencies of each scaling kind."""

from __future__ import annotations

import math

import torch

from sl_serve.config import RopeConfig


def inverse_frequencies(rope: RopeConfig, head_dim: int) -> torch.Tensor:
    """(head_dim / 2,) float32 angles per position (RoFormer, arXiv 2104.09864), scaled."""
    exponent = torch.arange(0, head_dim, 2, dtype=torch.int64).float() / head_dim
    inverse = 1.0 / (rope.theta**exponent)
    if rope.kind == "linear":
        return inverse / rope.factor
    if rope.kind == "llama3":
        return _llama3(inverse, rope)
    return inverse


def _llama3(inverse: torch.Tensor, rope: RopeConfig) -> torch.Tensor:
    """Long waves are slowed by `factor`, short ones kept, those between blended (Llama 3.1)."""
    wavelength = 2 * math.pi / inverse
    low = rope.original_max_positions / rope.low_freq_factor
    high = rope.original_max_positions / rope.high_freq_factor
    blend = (rope.original_max_positions / wavelength - rope.low_freq_factor) / (
        rope.high_freq_factor - rope.low_freq_factor
    )
    smooth = (1 - blend) * inverse / rope.factor + blend * inverse
    slowed = torch.where(wavelength > low, inverse / rope.factor, inverse)
    between = (wavelength >= high) & (wavelength <= low)
    return torch.where(between, smooth, slowed)


def rope_table(inverse: torch.Tensor, positions: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """cos and sin, each (T, head_dim / 2), of the tokens at `positions` (T,)."""
    angles = positions[:, None].float() * inverse[None]
    return angles.cos(), angles.sin()
