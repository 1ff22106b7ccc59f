"""Where each tensor of a layer lies in the layer's image: the bytes that cross the link."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import torch

ALIGNMENT_BYTES = 256  # of every segment: enough for any vector load and for device copies
IMAGE_ALIGNMENT_BYTES = 4096  # of a whole image: direct reads of a file of images need no bounce

LayerWeights = Mapping[str, torch.Tensor]


@dataclass(frozen=True, slots=True)
class Param:
    """A tensor as the arithmetic wants it, and the checkpoint tensors it is made of.

    A layer computes `x @ w` with w (in, out). In memory a matrix is (out, in), as checkpoints
    store it: loading is a copy, a checkpoint's own file can serve as the disk tier, and several
    sources joined along the output are simply one after another.
    """

    name: str
    shape: tuple[int, ...]
    sources: tuple[str, ...]  # "{layer}" stands for the layer's number
    source_rows: tuple[int, ...]  # outputs of each source

    @property
    def is_matrix(self) -> bool:
        return len(self.shape) == 2

    def source_shape(self, i: int) -> tuple[int, ...]:
        rows = self.source_rows[i]
        return (rows, self.shape[0]) if self.is_matrix else (rows,)

    def seen(self, elements: torch.Tensor) -> torch.Tensor:
        """The parameter's elements, one after another in memory, in the parameter's shape."""
        if self.is_matrix:
            n_in, n_out = self.shape
            return elements.view(n_out, n_in).t()
        return elements.view(self.shape)


@dataclass(frozen=True, slots=True)
class Segment:
    param: Param
    offset_bytes: int
    size_bytes: int


class LayerLayout:
    """The segment table of one layer image; the same for all layers of a model."""

    def __init__(self, params: Sequence[Param], dtype: torch.dtype) -> None:
        self.dtype = dtype
        self.segments: list[Segment] = []
        end = 0
        for param in params:
            size = math.prod(param.shape) * dtype.itemsize
            self.segments.append(Segment(param, end, size))
            end += -(-size // ALIGNMENT_BYTES) * ALIGNMENT_BYTES
        self.image_bytes = -(-end // IMAGE_ALIGNMENT_BYTES) * IMAGE_ALIGNMENT_BYTES

    def views(self, image: torch.Tensor) -> dict[str, torch.Tensor]:
        """Named tensors over an image's bytes (uint8). Made once per image, never in a step."""
        assert image.numel() == self.image_bytes
        return {
            s.param.name: s.param.seen(
                image[s.offset_bytes : s.offset_bytes + s.size_bytes].view(self.dtype)
            )
            for s in self.segments
        }
