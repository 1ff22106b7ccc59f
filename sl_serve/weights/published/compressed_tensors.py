"""The layouts of compressed-tensors, version 0.20: pack-quantized (integers of 4 or 8 bits in
int32s), int-quantized, float-quantized and naive-quantized (a byte each).

Packed, a module has weight_packed (out, in * bits / 32) int32, lowest bits first, of numbers made
positive by adding half their range; weight_shape; weight_scale (out, n_groups); where it is not
symmetric weight_zero_point (out * bits / 32, n_groups), packed along the outputs; and where
activations were ordered by size weight_g_idx (in).
"""

from __future__ import annotations

from collections.abc import Iterator
from functools import partial

import torch

from sl_serve.errors import CheckpointError, ModelError
from sl_serve.weights.fields import Fields, shown
from sl_serve.weights.groups import Grouped, Kind
from sl_serve.weights.hf_folder import HfFolder
from sl_serve.weights.published.eight_bits import Block, eight_bit_matrices
from sl_serve.weights.published.fp8 import block_of
from sl_serve.weights.published.packed import (
    SCALES,
    PackedMatrix,
    expect,
    matrix_shape,
    modules_with,
    order_of_groups,
    stored_as,
    unpacked,
)

_FORMATS = ("pack-quantized", "int-quantized", "float-quantized", "naive-quantized", "dense")
_KINDS: dict[tuple[int, bool], Kind] = {
    (4, True): "int4",
    (4, False): "int4_sym",
    (8, True): "int8",
    (8, False): "int8_sym",
}


def matrices(
    folder: HfFolder, settings: Fields, dequantised: torch.dtype
) -> dict[str, PackedMatrix]:
    """Raises ModelError for a variant that cannot be read, CheckpointError for damage."""
    layout = settings.text("format")
    if layout not in _FORMATS:
        raise ModelError(f"{settings.source}: format {layout[:40]!r} cannot be read")
    for key in ("sparsity_config", "transform_config"):
        if settings.get(key):
            raise ModelError(
                f"{settings.source}: {key} {shown(settings.get(key))} is not supported"
            )
    blocks = set(_blocks(settings))
    if len(blocks) > 1:
        raise ModelError(f"{settings.source}: several block sizes in one model are not supported")
    found = eight_bit_matrices(folder, "weight_scale", next(iter(blocks), None), dequantised)
    for module in modules_with(folder, ".weight_packed"):
        found[f"{module}.weight"] = _packed(folder, module, dequantised)
    return found


def _blocks(settings: Fields) -> Iterator[Block]:
    groups = settings.get("config_groups")
    for scheme in groups.values() if isinstance(groups, dict) else ():
        weights = scheme.get("weights") if isinstance(scheme, dict) else None
        if isinstance(weights, dict):
            block = block_of(Fields(weights, settings.source), "block_structure")
            if block is not None:
                yield block


def _packed(folder: HfFolder, module: str, dequantised: torch.dtype) -> PackedMatrix:
    name, scale_name = f"{module}.weight_packed", f"{module}.weight_scale"
    n_out, n_words = matrix_shape(folder, name)
    expect(folder, name, (n_out, n_words), [torch.int32])
    n_in, n_bits = _inputs_and_bits(folder, module, n_out, n_words)
    found = folder.shape(scale_name)
    n_groups = found[-1] if len(found) == 2 else 0
    if found != (n_out, n_groups) or not n_groups or n_in % n_groups:
        raise CheckpointError(
            f"{folder.path}: tensor {scale_name} has shape {found}, which does not fit "
            f"{(n_out, n_in)} weights"
        )
    expect(folder, scale_name, found, SCALES)
    parts = [name, scale_name, f"{module}.weight_shape"]
    zero_name = f"{module}.weight_zero_point"
    has_zeros = zero_name in folder.names()
    if has_zeros:
        expect(folder, zero_name, (-(-n_out * n_bits // 32), n_groups), [torch.int32])
        parts.append(zero_name)
    order = None
    if f"{module}.weight_g_idx" in folder.names():
        parts.append(f"{module}.weight_g_idx")
        order = order_of_groups(folder, parts[-1], n_in, n_in // n_groups)
    unpack = partial(_unpack, folder, module, (n_out, n_in), n_bits, has_zeros)
    return PackedMatrix(
        (n_out, n_in),
        _KINDS[n_bits, has_zeros],
        n_in // n_groups,
        stored_as(folder, scale_name),
        tuple(parts),
        unpack,
        dequantised,
        order,
    )


def _inputs_and_bits(folder: HfFolder, module: str, n_out: int, n_words: int) -> tuple[int, int]:
    """The shape is a tensor of two numbers; it and the words tell the bits."""
    name = f"{module}.weight_shape"
    expect(folder, name, (2,), [torch.int64, torch.int32])
    rows, n_in = folder.read_stored(name).tolist()
    for n_bits in (4, 8):
        if (rows, n_words) == (n_out, -(-n_in * n_bits // 32)) and n_in > 0:
            return n_in, n_bits
    raise CheckpointError(
        f"{folder.path}: {module}.weight_packed has shape {(n_out, n_words)}, which are not 4 or 8 "
        f"bits for each of {rows} x {n_in} weights"
    )


def _unpack(
    folder: HfFolder, module: str, shape: tuple[int, int], n_bits: int, has_zeros: bool
) -> Grouped:
    n_out, n_in = shape
    sign = 0x80 if n_bits == 8 else 0  # bytes are kept as signed ones
    numbers = unpacked(folder.read_stored(f"{module}.weight_packed"), n_bits)[:, :n_in]
    scales = folder.read_stored(f"{module}.weight_scale").float()
    if not has_zeros:
        return Grouped((numbers ^ sign).contiguous(), scales)
    packed = folder.read_stored(f"{module}.weight_zero_point").t()
    zeros = (unpacked(packed, n_bits)[:, :n_out] ^ sign).t().contiguous()
    return Grouped((numbers ^ sign).contiguous(), scales, zeros.view(torch.int8))
