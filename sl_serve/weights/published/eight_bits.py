"""Matrices of one byte a number under their usual name, with scales beside them.

The scales are one, one per output, one per group of inputs, or one per block of outputs and inputs.
"""

from __future__ import annotations

from functools import partial

import torch

from sl_serve.errors import CheckpointError
from sl_serve.weights.groups import Grouped, Kind
from sl_serve.weights.hf_folder import HfFolder
from sl_serve.weights.published.packed import (
    SCALES,
    PackedMatrix,
    expect,
    matrix_shape,
    n_groups_of,
    stored_as,
)

_KINDS: dict[torch.dtype, Kind] = {torch.int8: "int8_sym", torch.float8_e4m3fn: "fp8"}
Block = tuple[int, int]  # outputs, inputs


def eight_bit_matrices(
    folder: HfFolder, scale_suffix: str, block: Block | None, dequantised: torch.dtype
) -> dict[str, PackedMatrix]:
    """`scale_suffix` as in "q_proj.weight_scale". Raises CheckpointError."""
    names = [n for n in folder.names() if n.endswith(".weight") and stored_as(folder, n) in _KINDS]
    return {
        name: _matrix(folder, name, name.removesuffix("weight") + scale_suffix, block, dequantised)
        for name in sorted(names)
    }


def _matrix(
    folder: HfFolder, name: str, scale_name: str, block: Block | None, dequantised: torch.dtype
) -> PackedMatrix:
    n_out, n_in = matrix_shape(folder, name)
    n_rows, group = _scale_block(folder, scale_name, (n_out, n_in), block)
    expect(folder, scale_name, folder.shape(scale_name), SCALES)
    kind, parts = _KINDS[stored_as(folder, name)], [name, scale_name]
    zero_name = name.removesuffix("weight") + "weight_zero_point"
    has_zeros = kind == "int8_sym" and zero_name in folder.names()
    if has_zeros:
        expect(folder, zero_name, folder.shape(scale_name), [torch.int8])
        kind = "int8"
        parts.append(zero_name)
    unpack = partial(
        _unpack, folder, name, scale_name, zero_name if has_zeros else None, n_rows, group
    )
    scale_dtype = stored_as(folder, scale_name)
    return PackedMatrix((n_out, n_in), kind, group, scale_dtype, tuple(parts), unpack, dequantised)


def _scale_block(
    folder: HfFolder, scale_name: str, shape: tuple[int, int], block: Block | None
) -> Block:
    """Outputs and inputs that share a scale."""
    n_out, n_in = shape
    found = folder.shape(scale_name)
    if len(found) == 2 and block is not None:
        if found == (n_groups_of(n_out, block[0]), n_groups_of(n_in, block[1])):
            return block
    elif found in ((), (1,), (1, 1)):
        return n_out, n_in
    elif found == (n_out,):
        return 1, n_in
    elif len(found) == 2 and found[0] == n_out and found[1] and n_in % found[1] == 0:
        return 1, n_in // found[1]
    raise CheckpointError(
        f"{folder.path}: tensor {scale_name} has shape {found}, which does not fit {shape} weights"
    )


def _unpack(
    folder: HfFolder, name: str, scale_name: str, zero_name: str | None, n_rows: int, group: int
) -> Grouped:
    n_out, n_in = folder.shape(name)
    row_of = torch.arange(n_out) // n_rows

    def spread(of_blocks: str) -> torch.Tensor:
        return folder.read_stored(of_blocks).reshape(-1, n_groups_of(n_in, group))[row_of]

    numbers = folder.read_stored(name).view(torch.uint8)
    return Grouped(
        numbers, spread(scale_name).float(), None if zero_name is None else spread(zero_name)
    )
