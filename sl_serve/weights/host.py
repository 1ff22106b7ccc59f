"""Weights in host memory: layer images, packed once while loading, and what is in no layer."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from types import MappingProxyType

import torch

from sl_serve.host_memory import Allocate, host_empty
from sl_serve.weights.checkpoint import Checkpoint, check_tensors
from sl_serve.weights.formats import Format, plain
from sl_serve.weights.layout import LayerLayout, Param, Segment, source_name
from sl_serve.weights.quantised import QuantisedRows, Rows

WIDENED_ROWS = 1024  # at a time: what that takes stays small beside the matrix


def host_images(
    layout: LayerLayout, layers: Sequence[int], allocate: Allocate = host_empty
) -> dict[int, torch.Tensor]:
    """Memory for the images of some layers, in one buffer."""
    return host_images_of(layout.image_bytes, layers, allocate)


def host_images_of(
    image_bytes: int, keys: Sequence[int], allocate: Allocate = host_empty
) -> dict[int, torch.Tensor]:
    buffer = allocate(max(1, len(keys) * image_bytes))
    return {key: buffer[i * image_bytes : (i + 1) * image_bytes] for i, key in enumerate(keys)}


def load_image(
    checkpoint: Checkpoint, layout: LayerLayout, layer: int, image: torch.Tensor
) -> None:
    """Fill an image tensor by tensor: never more than one tensor beside it."""
    _load(checkpoint, layout.segments(layer), layer, image, 0)


def load_expert(
    checkpoint: Checkpoint, layout: LayerLayout, layer: int, expert: int, memory: torch.Tensor
) -> None:
    """As `load_image`, of one expert; `memory` begins with its bytes."""
    own = [s for s in layout.segments(layer) if s.expert == expert]
    _load(checkpoint, own, layer, memory, layout.expert_range(layer, expert).start)


def _load(
    checkpoint: Checkpoint,
    segments: Sequence[Segment],
    layer: int,
    image: torch.Tensor,
    first_byte: int,
) -> None:
    for segment in segments:
        end, format = segment.offset_bytes - first_byte, segment.format
        for i in segment.sources:
            start, end = end, end + segment.param.source_bytes(i, format)
            read_tensor(checkpoint, segment.source(i, layer), format, image[start:end])
    checkpoint.drop_pages()


def read_tensor(checkpoint: Checkpoint, name: str, format: Format, out: torch.Tensor) -> None:
    """Fill `out` (uint8) with a tensor in `format`: as the file has it, or in another dtype."""
    if format.dtype is None:
        blocks = checkpoint.read_blocks(name)
        out.view(blocks.shape).copy_(blocks)
    else:
        out.view(format.dtype).view(checkpoint.shape(name)).copy_(checkpoint.read(name))


def expected_shapes(params: Sequence[Param], n_layers: int) -> dict[str, tuple[int, ...]]:
    return {
        source_name(source, layer, expert): param.source_shape(i)
        for layer in range(n_layers)
        for param in params
        if param.is_in(layer)
        for expert in param.owners
        for i, source in enumerate(param.sources)
    }


def load_static(
    checkpoint: Checkpoint,
    names: Mapping[str, str],
    dtype: torch.dtype,
    formats: Mapping[str, Format] = MappingProxyType({}),
) -> dict[str, Rows]:
    """What is in no layer: embedding table, final norm, head. `names`: ours -> the checkpoint's;
    `formats`: of those by the checkpoint's name that are not to be in `dtype`.

    Equal checkpoint names share one tensor: a tied head is the embedding table itself. Both are
    stored (vocabulary, hidden): rows are gathered from one and dotted with by the other.
    """
    read: dict[str, Rows] = {}
    for source in sorted(set(names.values())):
        shape, format = checkpoint.shape(source), formats.get(source, plain(dtype))
        memory = host_empty(static_bytes(shape, format))
        read_tensor(checkpoint, source, format, memory)
        if format.dtype is None:
            read[source] = QuantisedRows(memory.view(shape[0], -1), format)
        else:
            read[source] = memory.view(format.dtype).view(shape)
        checkpoint.drop_pages()
    return {ours: read[source] for ours, source in names.items()}


def plain_rows(rows: Rows, dtype: torch.dtype) -> torch.Tensor:
    """(out, in), rows in blocks made into numbers of `dtype`, some at a time."""
    if not isinstance(rows, QuantisedRows):
        return rows
    memory = host_empty(static_bytes(rows.shape, plain(dtype)))
    plain_ = memory.view(dtype).view(rows.shape)
    for start in range(0, len(rows), WIDENED_ROWS):
        some = slice(start, start + WIDENED_ROWS)
        plain_[some] = rows[some].widened()
    return plain_


def static_bytes(shape: Sequence[int], format: Format) -> int:
    *lines, n_in = shape
    return math.prod(lines) * format.row_bytes(n_in)


def check_checkpoint(
    checkpoint: Checkpoint, params: Sequence[Param], static: dict[str, tuple[int, ...]]
) -> None:
    """Raise CheckpointError before any weight is read if one is missing or misshapen."""
    shapes = expected_shapes(params, checkpoint.config.n_layers)
    check_tensors(checkpoint, {**shapes, **static})
