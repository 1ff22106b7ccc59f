"""AWQ's layout for matrix products (Lin et al., arXiv 2306.00978; version "gemm" of AutoAWQ).

A module has qweight (in, out / 8) int32, qzeros (n_groups, out / 8) and scales (n_groups, out), all
of 4 bits and packed along the outputs; the eight of a set stand in an order of their own. A weight
is scale * (number - zero).
"""

from __future__ import annotations

from functools import partial

import torch

from sl_serve.errors import ModelError
from sl_serve.weights.fields import Fields
from sl_serve.weights.groups import Grouped
from sl_serve.weights.hf_folder import HfFolder
from sl_serve.weights.published.packed import (
    SCALES,
    PackedMatrix,
    expect,
    group_size,
    matrix_shape,
    modules_with,
    n_groups_of,
    stored_as,
    unpacked,
)

PLACES = [0, 4, 1, 5, 2, 6, 3, 7]  # where the outputs of a set stand


def matrices(
    folder: HfFolder, settings: Fields, dequantised: torch.dtype
) -> dict[str, PackedMatrix]:
    """Raises ModelError for a variant that cannot be read, CheckpointError for damage."""
    n_bits, version = settings.integer("bits", 4), settings.text("version", "gemm").lower()
    if n_bits != 4:
        raise ModelError(f"{settings.source}: AWQ of {n_bits} bits cannot be read (4 can)")
    if version != "gemm":
        raise ModelError(f"{settings.source}: AWQ version {version[:40]!r} cannot be read")
    group = group_size(settings, 128)
    return {
        f"{module}.weight": _matrix(folder, module, group, dequantised)
        for module in modules_with(folder, ".qweight")
    }


def _matrix(
    folder: HfFolder, module: str, group: int | None, dequantised: torch.dtype
) -> PackedMatrix:
    n_in, n_sets = matrix_shape(folder, f"{module}.qweight")
    group = n_in if group is None else group
    n_groups = n_groups_of(n_in, group)
    expect(folder, f"{module}.qweight", (n_in, n_sets), [torch.int32])
    expect(folder, f"{module}.qzeros", (n_groups, n_sets), [torch.int32])
    expect(folder, f"{module}.scales", (n_groups, n_sets * 8), SCALES)
    parts = tuple(f"{module}.{part}" for part in ("qweight", "qzeros", "scales"))
    scale_dtype = stored_as(folder, f"{module}.scales")
    unpack, shape = partial(_unpack, folder, module), (n_sets * 8, n_in)
    return PackedMatrix(shape, "int4", group, scale_dtype, parts, unpack, dequantised)


def _unpack(folder: HfFolder, module: str) -> Grouped:
    numbers = _in_order(folder.read_stored(f"{module}.qweight"))
    zeros = _in_order(folder.read_stored(f"{module}.qzeros"))
    scales = folder.read_stored(f"{module}.scales").t().float()
    return Grouped(numbers.t().contiguous(), scales, zeros.t().contiguous().view(torch.int8))


def _in_order(packed: torch.Tensor) -> torch.Tensor:
    """(n, out / 8) int32 -> (n, out) uint8."""
    sets = unpacked(packed, 4).view(*packed.shape, 8)
    return sets[..., PLACES].flatten(1)
