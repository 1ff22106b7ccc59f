"""Weights in host memory: layer images, packed once while loading, and what is in no layer."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence

import torch

from sl_serve.host_memory import Allocate, host_empty
from sl_serve.weights.checkpoint import Checkpoint, check_tensors
from sl_serve.weights.layout import LayerLayout, Param


def source_name(template: str, layer: int) -> str:
    return template.replace("{layer}", str(layer))


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
    views = layout.views(image)
    for segment in layout.segments:
        read_param(checkpoint, segment.param, layer, views[segment.param.name])
    checkpoint.drop_pages()


def read_param(checkpoint: Checkpoint, param: Param, layer: int, out: torch.Tensor) -> None:
    """Write a parameter into `out`, joined and converted."""
    start = 0
    for source, rows in zip(param.sources, param.source_rows, strict=True):
        tensor = checkpoint.read(source_name(source, layer))
        out[..., start : start + rows].copy_(tensor.t() if param.is_matrix else tensor)
        start += rows


def expected_shapes(params: Sequence[Param], n_layers: int) -> dict[str, tuple[int, ...]]:
    return {
        source_name(source, layer): param.source_shape(i)
        for layer in range(n_layers)
        for param in params
        for i, source in enumerate(param.sources)
    }


def load_static(
    checkpoint: Checkpoint, names: Mapping[str, str], dtype: torch.dtype
) -> dict[str, torch.Tensor]:
    """What is in no layer: embedding table, final norm, head. `names`: ours -> the checkpoint's.

    Equal checkpoint names share one tensor: a tied head is the embedding table itself. Both are
    stored (vocabulary, hidden): rows are gathered from one and dotted with by the other.
    """
    read: dict[str, torch.Tensor] = {}
    for source in sorted(set(names.values())):
        shape = checkpoint.shape(source)
        n_bytes = math.prod(shape) * dtype.itemsize
        read[source] = host_empty(n_bytes).view(dtype).view(shape).copy_(checkpoint.read(source))
        checkpoint.drop_pages()
    return {ours: read[source] for ours, source in names.items()}


def check_checkpoint(
    checkpoint: Checkpoint, params: Sequence[Param], static: dict[str, tuple[int, ...]]
) -> None:
    """Raise CheckpointError before any weight is read if one is missing or misshapen."""
    shapes = expected_shapes(params, checkpoint.config.n_layers)
    check_tensors(checkpoint, {**shapes, **static})
