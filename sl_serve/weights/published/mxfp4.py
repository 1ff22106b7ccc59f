"""MXFP4, as gpt-oss has its experts: 4-bit floats (E2M1), 32 of which share a power of two (E8M0):
"OCP Microscaling Formats (MX) Specification", version 1.0, 5.3.3 and 5.4.1.

X_blocks (experts, out, n_groups, 16) uint8, the first of two numbers in the lower half of a byte;
X_scales (experts, out, n_groups) uint8. Each expert's is a matrix of its own here, X[0], X[1], ...
Twice a number is an integer of 5 bits: it is kept in 8, to the last bit.
"""

from __future__ import annotations

from functools import partial

import torch

from sl_serve.errors import CheckpointError
from sl_serve.weights.fields import Fields
from sl_serve.weights.groups import Grouped
from sl_serve.weights.hf_folder import HfFolder
from sl_serve.weights.published.packed import PackedMatrix, expect, modules_with

BLOCKS, SCALES = "_blocks", "_scales"
GROUP, GROUP_BYTES = 32, 16
_MAGNITUDES = (0, 1, 2, 3, 4, 6, 8, 12)  # twice those of E2M1
_NUMBERS = torch.tensor([*_MAGNITUDES, *(-m for m in _MAGNITUDES)], dtype=torch.int8)


def matrices(
    folder: HfFolder, _settings: Fields, dequantised: torch.dtype
) -> dict[str, PackedMatrix]:
    """Raises CheckpointError for damage."""
    found = {}
    for name in modules_with(folder, BLOCKS):
        parts = (name + BLOCKS, name + SCALES)
        n_experts, n_out, n_groups = _sizes(folder, name)
        for expert in range(n_experts):
            found[f"{name}[{expert}]"] = PackedMatrix(
                shape=(n_out, n_groups * GROUP),
                kind="int8_sym",
                group=GROUP,
                scale_dtype=torch.float32,
                parts=parts,
                unpack=partial(_unpack, folder, parts, expert),
                dequantised=dequantised,
            )
    return found


def _sizes(folder: HfFolder, name: str) -> tuple[int, int, int]:
    shape = folder.shape(name + BLOCKS)
    if len(shape) != 4 or 0 in shape or shape[3] != GROUP_BYTES:
        raise CheckpointError(
            f"{folder.path}: tensor {name}{BLOCKS} has shape {shape}, expected (experts, outputs, "
            f"groups, {GROUP_BYTES})"
        )
    expect(folder, name + BLOCKS, shape, [torch.uint8])
    if name + SCALES not in folder.names():
        raise CheckpointError(f"{folder.path}: no tensor {name}{SCALES}")
    expect(folder, name + SCALES, shape[:3], [torch.uint8])
    return shape[0], shape[1], shape[2]


def _unpack(folder: HfFolder, parts: tuple[str, str], expert: int) -> Grouped:
    blocks, scales = (folder.read_stored(part)[expert] for part in parts)
    codes = torch.stack([blocks & 15, blocks >> 4], dim=-1).flatten(1)
    numbers = _NUMBERS[codes.int()].view(torch.uint8)
    return Grouped(numbers, _half_of_power(scales.int()))


def _half_of_power(exponents: torch.Tensor) -> torch.Tensor:
    """2 ** (e - 128), for numbers that are doubled; the least two are no normal floats."""
    least = torch.full_like(exponents, 1 << 21) << exponents.clamp(max=1)
    return torch.where(exponents > 1, (exponents - 1) << 23, least).view(torch.float32)
