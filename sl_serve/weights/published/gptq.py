"""GPTQ's layout (Frantar et al., arXiv 2210.17323; written by AutoGPTQ and GPTQModel).

A module has qweight (in / n, out) int32 with n = 32 / bits numbers of a column in each, lowest bits
first; qzeros (n_groups, out / n), packed along the outputs; scales (n_groups, out); g_idx (in), the
group of each input. A weight is scale * (number - zero). The first version of the layout stores
zeros less one.
"""

from __future__ import annotations

from functools import partial

import torch

from sl_serve.errors import CheckpointError, ModelError
from sl_serve.weights.fields import Fields
from sl_serve.weights.groups import Grouped, Kind
from sl_serve.weights.hf_folder import HfFolder
from sl_serve.weights.published.packed import (
    SCALES,
    PackedMatrix,
    expect,
    group_size,
    matrix_shape,
    modules_with,
    n_groups_of,
    order_of_groups,
    stored_as,
    unpacked,
)

_ZERO_OFFSETS = {"gptq": 1, "gptq_v2": 0}
_KINDS: dict[int, Kind] = {4: "int4", 8: "int8"}


def matrices(
    folder: HfFolder, settings: Fields, dequantised: torch.dtype
) -> dict[str, PackedMatrix]:
    """Raises ModelError for a variant that cannot be read, CheckpointError for damage."""
    n_bits = settings.integer("bits")
    layout = settings.text("checkpoint_format", settings.text("format", "gptq"))
    if n_bits not in _KINDS:
        raise ModelError(f"{settings.source}: GPTQ of {n_bits} bits cannot be read (4 and 8 can)")
    if layout not in _ZERO_OFFSETS:
        raise ModelError(f"{settings.source}: GPTQ format {layout[:40]!r} cannot be read")
    group = group_size(settings)
    return {
        f"{module}.weight": _matrix(
            folder, module, n_bits, group, _ZERO_OFFSETS[layout], dequantised
        )
        for module in modules_with(folder, ".qweight")
    }


def _matrix(
    folder: HfFolder,
    module: str,
    n_bits: int,
    group: int | None,
    zero_offset: int,
    dequantised: torch.dtype,
) -> PackedMatrix:
    n_packed = 32 // n_bits
    n_lines, n_out = matrix_shape(folder, f"{module}.qweight")
    n_in = n_lines * n_packed
    group = n_in if group is None else group
    n_groups = n_groups_of(n_in, group)
    if n_out % n_packed:
        raise CheckpointError(
            f"{folder.path}: {module}.qweight has {n_out} outputs, which {n_packed} does not divide"
        )
    expect(folder, f"{module}.qweight", (n_lines, n_out), [torch.int32])
    expect(folder, f"{module}.qzeros", (n_groups, n_out // n_packed), [torch.int32])
    expect(folder, f"{module}.scales", (n_groups, n_out), SCALES)
    parts = tuple(f"{module}.{part}" for part in ("qweight", "qzeros", "scales"))
    group_of = None
    if f"{module}.g_idx" in folder.names():
        parts = (*parts, f"{module}.g_idx")
        group_of = order_of_groups(folder, f"{module}.g_idx", n_in, group)
    unpack = partial(_unpack, folder, module, n_bits, zero_offset)
    scale_dtype = stored_as(folder, f"{module}.scales")
    kind, shape = _KINDS[n_bits], (n_out, n_in)
    return PackedMatrix(shape, kind, group, scale_dtype, parts, unpack, dequantised, group_of)


def _unpack(folder: HfFolder, module: str, n_bits: int, zero_offset: int) -> Grouped:
    numbers = unpacked(folder.read_stored(f"{module}.qweight").t(), n_bits)
    zeros = unpacked(folder.read_stored(f"{module}.qzeros"), n_bits).t()
    zeros = (zeros + zero_offset) & ((1 << n_bits) - 1)
    if n_bits == 8:  # kept as signed ones
        numbers, zeros = numbers ^ 0x80, zeros ^ 0x80
    scales = folder.read_stored(f"{module}.scales").t().float()
    return Grouped(numbers, scales, zeros.contiguous().view(torch.int8))
