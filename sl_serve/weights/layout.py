"""Where each tensor of a layer lies in the layer's image: the bytes that cross the link."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from itertools import groupby
from typing import Any

import torch

from sl_serve.weights.formats import Format, plain
from sl_serve.weights.quantised import QuantisedRows, QuantisedWeight, Weight

ALIGNMENT_BYTES = 256  # of every segment: enough for any vector load and for device copies
IMAGE_ALIGNMENT_BYTES = 4096  # of a whole image: direct reads of a file of images need no bounce

LayerWeights = Mapping[str, Any]  # vectors are tensors, matrices are `Weight`s


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

    def source_bytes(self, i: int, format: Format) -> int:
        n_in = self.shape[0] if self.is_matrix else 1
        return self.source_rows[i] * format.row_bytes(n_in)

    def source_shape(self, i: int) -> tuple[int, ...]:
        rows = self.source_rows[i]
        if self.is_matrix:
            return rows, self.shape[0]
        return (rows,) if self.shape else ()

    def seen(self, elements: torch.Tensor) -> torch.Tensor:
        """The parameter's elements, one after another in memory, in the parameter's shape."""
        if self.is_matrix:
            n_in, n_out = self.shape
            return elements.view(n_out, n_in).t()
        return elements.view(self.shape)


@dataclass(frozen=True, slots=True)
class Segment:
    """Sources of a parameter that follow each other in one format: nearly always all of them."""

    param: Param
    sources: range  # their numbers
    format: Format
    offset_bytes: int
    size_bytes: int


class LayerLayout:
    """The segment tables of layer images. One serves all layers, unless a file has a layer's
    matrices in other formats than the next one's; images are as large as the largest needs."""

    def __init__(
        self,
        params: Sequence[Param],
        dtype: torch.dtype,
        formats: Mapping[str, Format] | None = None,
        n_layers: int = 1,
    ) -> None:
        """`formats`: checkpoint name -> how that tensor lies in memory, where not in `dtype`."""
        self.params, self.dtype = params, dtype
        self._formats = formats or {}
        tables = [list(self._segments(i)) for i in range(n_layers if formats else 1)]
        self._tables = tables
        plain_format = plain(dtype)
        self._are_plain = [all(s.format == plain_format for s in table) for table in tables]
        self.image_bytes = max(self.stored_bytes(i) for i in range(len(tables)))

    def segments(self, layer: int) -> list[Segment]:
        """In the order of the image."""
        return self._tables[layer % len(self._tables)]

    def stored_bytes(self, layer: int) -> int:
        """How much of an image the layer fills, in whole alignments: what crosses the link."""
        last = self.segments(layer)[-1]
        end = last.offset_bytes + last.size_bytes
        return -(-end // IMAGE_ALIGNMENT_BYTES) * IMAGE_ALIGNMENT_BYTES

    def is_plain(self, layer: int) -> bool:
        """Whether all of it lies there in `dtype`."""
        return self._are_plain[layer % len(self._are_plain)]

    @property
    def expanded(self) -> LayerLayout:
        """Of any layer, all of it in `dtype`."""
        return LayerLayout(self.params, self.dtype)

    @property
    def expanded_bytes(self) -> int:
        """Of an expanded image; 0 where no layer needs one."""
        return 0 if all(self._are_plain) else self.expanded.image_bytes

    def views(self, image: torch.Tensor, layer: int) -> dict[str, Weight]:
        """Named weights over an image's bytes (uint8). Made once per image, never in a step."""
        assert image.numel() == self.image_bytes
        by_param = groupby(self.segments(layer), key=lambda s: s.param)
        return {param.name: _seen(param, list(parts), image) for param, parts in by_param}

    def _segments(self, layer: int) -> Iterator[Segment]:
        offset = 0
        for param in self.params:
            for format, sources in self._runs(param, layer):
                size = sum(param.source_bytes(i, format) for i in sources)
                yield Segment(param, sources, format, offset, size)
                offset += -(-size // ALIGNMENT_BYTES) * ALIGNMENT_BYTES

    def _runs(self, param: Param, layer: int) -> Iterator[tuple[Format, range]]:
        """Neighbouring sources of one format."""

        def format_of(i: int) -> Format:
            return self._formats.get(source_name(param.sources[i], layer), plain(self.dtype))

        for format, run in groupby(range(len(param.sources)), key=format_of):
            sources = list(run)
            yield format, range(sources[0], sources[-1] + 1)


def source_name(template: str, layer: int) -> str:
    """A tensor's name in the checkpoint."""
    return template.replace("{layer}", str(layer))


def _seen(param: Param, segments: Sequence[Segment], image: torch.Tensor) -> Weight:
    """A tensor where the parameter is plain numbers in one piece, as vectors always are."""
    pieces = [image[s.offset_bytes : s.offset_bytes + s.size_bytes] for s in segments]
    dtype = segments[0].format.dtype
    if len(segments) == 1 and dtype is not None:
        return param.seen(pieces[0].view(dtype))
    n_in = param.shape[0]
    return QuantisedWeight(
        tuple(
            QuantisedRows(piece.view(-1, s.format.row_bytes(n_in)), s.format)
            for s, piece in zip(segments, pieces, strict=True)
        )
    )
