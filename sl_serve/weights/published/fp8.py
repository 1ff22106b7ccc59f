"""8-bit floats: scales of blocks under weight_scale_inv (as DeepSeek-V3 has them, arXiv 2412.19437;
they are multiplied with, despite their name), or of whole matrices under weight_scale."""

from __future__ import annotations

import torch

from sl_serve.errors import ModelError
from sl_serve.weights.fields import Fields, shown
from sl_serve.weights.hf_folder import HfFolder
from sl_serve.weights.published.eight_bits import Block, eight_bit_matrices
from sl_serve.weights.published.packed import PackedMatrix


def matrices(
    folder: HfFolder, settings: Fields, dequantised: torch.dtype
) -> dict[str, PackedMatrix]:
    """Raises ModelError for a variant that cannot be read, CheckpointError for damage."""
    kind = settings.text("fmt", "e4m3")
    if kind not in ("e4m3", "float8_e4m3fn"):
        raise ModelError(f"{settings.source}: 8-bit floats of kind {kind[:40]!r} cannot be read")
    block = block_of(settings, "weight_block_size")
    suffix = "weight_scale" if block is None else "weight_scale_inv"
    return eight_bit_matrices(folder, suffix, block, dequantised)


def block_of(settings: Fields, key: str) -> Block | None:
    """Two sizes, or None where there are none."""
    value = settings.get(key)
    if value is None:
        return None
    if not isinstance(value, list) or [type(v) for v in value] != [int, int] or min(value) < 1:
        raise ModelError(f"{settings.source}: {key} must be two sizes, not {shown(value)}")
    return value[0], value[1]
