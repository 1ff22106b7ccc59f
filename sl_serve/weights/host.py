"""The host tier: every layer's image in one buffer, packed once while loading."""

from __future__ import annotations

from collections.abc import Callable, Sequence

import torch

from sl_serve.host_memory import host_empty
from sl_serve.weights.checkpoint import Checkpoint, check_tensors
from sl_serve.weights.layout import LayerLayout, LayerWeights, Param

OnLayer = Callable[[], None]


def source_name(template: str, layer: int) -> str:
    return template.replace("{layer}", str(layer))


class HostWeights:
    """`images[i]` are the bytes of layer i in the order of the device slot."""

    def __init__(self, layout: LayerLayout, n_layers: int) -> None:
        self.layout = layout
        self.n_layers = n_layers
        buffer = host_empty(n_layers * layout.image_bytes)
        self.images = list(buffer.view(n_layers, layout.image_bytes))

    @property
    def n_bytes(self) -> int:
        return self.n_layers * self.layout.image_bytes

    def load(self, checkpoint: Checkpoint, on_layer: OnLayer = lambda: None) -> None:
        """Fill the images tensor by tensor: never more than one tensor beside them."""
        for layer, image in enumerate(self.images):
            views = self.layout.views(image)
            for segment in self.layout.segments:
                read_param(checkpoint, segment.param, layer, views[segment.param.name])
            on_layer()


def read_param(checkpoint: Checkpoint, param: Param, layer: int, out: torch.Tensor) -> None:
    """Write a parameter into `out`, joined, transposed and converted."""
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


class StaticWeights:
    """What is not in a layer: embedding table, final norm, head. Stays where it is computed with.

    A tied head is the embedding table itself. Both are stored (vocabulary, hidden): rows are
    gathered from one and dotted with by the other.
    """

    def __init__(self, tensors: LayerWeights) -> None:
        self.tensors = tensors

    @classmethod
    def load(
        cls, checkpoint: Checkpoint, names: dict[str, str], dtype: torch.dtype
    ) -> StaticWeights:
        """`names`: our name -> the checkpoint's. Equal checkpoint names share one tensor."""
        read = {
            source: checkpoint.read(source).to(dtype).contiguous() for source in set(names.values())
        }
        return cls({ours: read[source] for ours, source in names.items()})

    @property
    def n_bytes(self) -> int:
        unique = {t.data_ptr(): t.nbytes for t in self.tensors.values()}
        return sum(unique.values())


def check_checkpoint(
    checkpoint: Checkpoint, params: Sequence[Param], static: dict[str, tuple[int, ...]]
) -> None:
    """Raise CheckpointError before any weight is read if one is missing or misshapen."""
    shapes = expected_shapes(params, checkpoint.config.n_layers)
    check_tensors(checkpoint, {**shapes, **static})
