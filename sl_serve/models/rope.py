"""Rotary positions: inverse frequencies of each scaling kind, and the tables of a step."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence

import torch

from sl_serve.config import RopeConfig
from sl_serve.models import RopeTable


class Rotations:
    """A model's kinds of rotation."""

    def __init__(
        self,
        ropes: Sequence[RopeConfig],
        head_dim: int,
        upload: Callable[[torch.Tensor], torch.Tensor],
    ) -> None:
        self._ropes = ropes
        self._inverses = [upload(inverse_frequencies(r, head_dim)) for r in ropes]
        self._long = [
            upload(inverse_frequencies(r, head_dim, is_long=True)) if r.long_factors else None
            for r in ropes
        ]
        self._upload = upload

    def __bool__(self) -> bool:
        return bool(self._ropes)

    def tables(self, positions: torch.Tensor, final_lengths: torch.Tensor) -> tuple[RopeTable, ...]:
        """Of tokens at `positions` (T,), on the device, of texts that may become as long as
        `final_lengths` (T,) says, on the host: a text is turned in one way from its first token to
        its last."""
        found = []
        for rope, inverse, long in zip(self._ropes, self._inverses, self._long, strict=True):
            frequencies = inverse
            if long is not None:
                is_long = self._upload(final_lengths > rope.original_max_positions)
                frequencies = torch.where(is_long[:, None], long, inverse)
            if rope.kind == "positions":
                found.append(RopeTable(positions[:, None], positions[:, None]))
            else:
                found.append(rope_table(frequencies, positions, rope.amplitude))
        return tuple(found)


def inverse_frequencies(rope: RopeConfig, head_dim: int, is_long: bool = False) -> torch.Tensor:
    """(n_dims / 2,) float32 angles per position (RoFormer, arXiv 2104.09864), scaled."""
    n_dims = rope.n_dims or head_dim
    exponent = torch.arange(0, n_dims, 2, dtype=torch.int64).float() / n_dims
    waves = rope.theta**exponent
    if rope.kind == "longrope":
        return 1.0 / (torch.tensor(rope.long_factors if is_long else rope.short_factors) * waves)
    inverse = 1.0 / waves
    if rope.kind == "linear":
        return inverse / rope.factor
    if rope.kind == "llama3":
        return _llama3(inverse, rope)
    if rope.kind == "yarn":
        return _yarn(waves, rope)
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


def _yarn(waves: torch.Tensor, rope: RopeConfig) -> torch.Tensor:
    """Pairs that turn more than beta_fast times in the original length are kept, those that turn
    less than beta_slow times slowed, those between blended (YaRN, arXiv 2309.00071)."""
    n_dims = 2 * len(waves)

    def pair_of(n_turns: float) -> float:
        length = rope.original_max_positions / (n_turns * 2 * math.pi)
        return n_dims * math.log(length) / (2 * math.log(rope.theta))

    low, high = pair_of(rope.beta_fast), pair_of(rope.beta_slow)
    if rope.truncate:
        low, high = math.floor(low), math.ceil(high)
    low, high = max(low, 0), min(high, n_dims - 1)
    width = max(high - low, 0.001)
    slowed = ((torch.arange(len(waves), dtype=torch.float32) - low) / width).clamp(0, 1)
    return 1.0 / (rope.factor * waves) * slowed + 1.0 / waves * (1 - slowed)


def rope_table(inverse: torch.Tensor, positions: torch.Tensor, amplitude: float = 1.0) -> RopeTable:
    """cos and sin, each (T, n_dims / 2), of the tokens at `positions` (T,). `inverse`: (n_dims / 2)
    or (T, n_dims / 2)."""
    angles = positions[:, None].float() * inverse
    return RopeTable(angles.cos() * amplitude, angles.sin() * amplitude)
