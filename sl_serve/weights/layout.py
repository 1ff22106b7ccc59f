"""Where each tensor of a layer lies in the layer's image: the bytes that cross the link."""

from __future__ import annotations

import math
from collections.abc import Collection, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from itertools import groupby, pairwise
from typing import Any

import torch

from sl_serve.weights.formats import Format, plain
from sl_serve.weights.quantised import QuantisedRows, QuantisedWeight, Weight

ALIGNMENT_BYTES = 256  # of every segment: enough for any vector load and for device copies
IMAGE_ALIGNMENT_BYTES = 4096  # of a whole image: direct reads of a file of images need no bounce

LayerWeights = Mapping[str, Any]  # vectors are tensors, matrices are `Weight`s
ExpertWeights = Mapping[int, LayerWeights]  # by the expert's number


@dataclass(frozen=True, slots=True)
class Param:
    """A tensor as the arithmetic wants it, and the checkpoint tensors it is made of.

    A layer computes `x @ w` with w (in, out). In memory a matrix is (out, in), as checkpoints
    store it: loading is a copy, a checkpoint's own file can serve as the disk tier, and several
    sources joined along the output are simply one after another.
    """

    name: str
    shape: tuple[int, ...]
    sources: tuple[str, ...]  # "{layer}" stands for the layer's number, "{expert}" for an expert's
    source_rows: tuple[int, ...]  # outputs of each source
    layers: Collection[int] | None = None  # that have it; None: all
    n_experts: int = 0  # each of so many has one of its own; 0: it is the layer's
    is_exact: bool = False  # stays as the checkpoint has it, whatever becomes of the others
    # Of a vector that checkpoints store in lines: how many elements one has.
    source_line: int | None = None

    @property
    def owners(self) -> Sequence[int | None]:
        """The experts that have one; None is the layer itself."""
        return range(self.n_experts) if self.n_experts else (None,)

    def is_in(self, layer: int) -> bool:
        return self.layers is None or layer in self.layers

    @property
    def is_matrix(self) -> bool:
        return len(self.shape) == 2

    def source_bytes(self, i: int, format: Format) -> int:
        n_in = self.shape[0] if self.is_matrix else 1
        return self.source_rows[i] * format.row_bytes(n_in)

    def source_shape(self, i: int) -> tuple[int, ...]:
        rows, line = self.source_rows[i], self.source_line
        if self.is_matrix:
            return (rows, self.shape[0])
        if not self.shape:
            return ()
        return (rows,) if line is None else (rows // line, line)

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
    expert: int | None = None

    def source(self, i: int, layer: int) -> str:
        """The name of its parameter's i-th source in the checkpoint."""
        return source_name(self.param.sources[i], layer, self.expert)


class LayerLayout:
    """The segment tables of layer images. One serves all layers, unless layers differ, or a file
    has a layer's matrices in other formats than the next one's; images are as large as the largest
    needs.

    A layer's own parameters come first, its dense part; then those of its experts, expert by
    expert, each a whole number of IMAGE_ALIGNMENT_BYTES.
    """

    def __init__(
        self,
        params: Sequence[Param],
        dtype: torch.dtype,
        formats: Mapping[str, Format] | None = None,
        n_layers: int = 1,
    ) -> None:
        """`formats`: checkpoint name -> how that tensor lies in memory, where not in `dtype`."""
        self.params, self.dtype, self._n_layers = params, dtype, n_layers
        self._formats = formats or {}
        differ = bool(formats) or any(p.layers is not None for p in params)
        tables = [list(self._segments(i)) for i in range(n_layers if differ else 1)]
        self._tables = tables
        plain_format = plain(dtype)
        self._are_plain = [all(s.format == plain_format for s in table) for table in tables]
        self._ends = [_ends(table) for table in tables]
        self.image_bytes = max(ends[-1] for ends in self._ends)

    def segments(self, layer: int) -> list[Segment]:
        """In the order of the image."""
        return self._tables[layer % len(self._tables)]

    def stored_bytes(self, layer: int) -> int:
        """How much of an image the layer fills, in whole alignments: what crosses the link."""
        return self._ends_of(layer)[-1]

    def dense_bytes(self, layer: int) -> int:
        """How much of it is not its experts': the first bytes of the image."""
        return self._ends_of(layer)[0]

    def n_experts(self, layer: int) -> int:
        return len(self._ends_of(layer)) - 1

    def expert_range(self, layer: int, expert: int) -> slice:
        """The expert's bytes of the image."""
        ends = self._ends_of(layer)
        return slice(ends[expert], ends[expert + 1])

    def experts_bytes(self, layer: int, experts: Iterable[int]) -> int:
        ends = self._ends_of(layer)
        return sum(ends[e + 1] - ends[e] for e in experts)

    def is_plain(self, layer: int) -> bool:
        """Whether all of it lies there in `dtype`."""
        return self._are_plain[layer % len(self._are_plain)]

    @property
    def expanded(self) -> LayerLayout:
        """The same with all of it in `dtype`."""
        return LayerLayout(self.params, self.dtype, n_layers=self._n_layers)

    @property
    def expanded_bytes(self) -> int:
        """Of an expanded image; 0 where no layer needs one."""
        return 0 if all(self._are_plain) else self.expanded.image_bytes

    def views(self, image: torch.Tensor, layer: int) -> dict[str, Weight]:
        """Named weights of the dense part over an image's bytes (uint8). Made once per image,
        never in a step."""
        assert image.numel() == self.image_bytes
        return _views([s for s in self.segments(layer) if s.expert is None], image)

    def experts(self, image: torch.Tensor, layer: int) -> ExpertViews:
        """Those of the layer's experts over an image's bytes."""
        by_expert = groupby(self.segments(layer), key=lambda s: s.expert)
        return ExpertViews({e: list(parts) for e, parts in by_expert if e is not None}, image)

    def expert_views(self, memory: torch.Tensor, layer: int, expert: int) -> dict[str, Weight]:
        """Of one expert, over memory that begins with its bytes."""
        start = self.expert_range(layer, expert).start
        segments = [s for s in self.segments(layer) if s.expert == expert]
        moved = [replace(s, offset_bytes=s.offset_bytes - start) for s in segments]
        return _views(moved, memory)

    @property
    def expert_bytes(self) -> int:
        """Of the largest one; 0 where there are none."""
        return max((b - a for ends in self._ends for a, b in pairwise(ends)), default=0)

    def _ends_of(self, layer: int) -> list[int]:
        return self._ends[layer % len(self._ends)]

    def _segments(self, layer: int) -> Iterator[Segment]:
        present = [p for p in self.params if p.is_in(layer)]
        offset = 0
        for expert, params in _by_owner(present):
            for param in params:
                for format, sources in self._runs(param, layer, expert):
                    size = sum(param.source_bytes(i, format) for i in sources)
                    yield Segment(param, sources, format, offset, size, expert)
                    offset = _aligned(offset + size, ALIGNMENT_BYTES)
            offset = _aligned(offset, IMAGE_ALIGNMENT_BYTES)

    def _runs(self, param: Param, layer: int, expert: int | None) -> Iterator[tuple[Format, range]]:
        """Neighbouring sources of one format."""

        def format_of(i: int) -> Format:
            name = source_name(param.sources[i], layer, expert)
            return self._formats.get(name, plain(self.dtype))

        for format, run in groupby(range(len(param.sources)), key=format_of):
            sources = list(run)
            yield format, range(sources[0], sources[-1] + 1)


class ExpertViews(ExpertWeights):
    """Named weights of each expert over an image's bytes, made when they are first looked at: of
    thousands of experts a step may need a few."""

    def __init__(self, segments: Mapping[int, list[Segment]], image: torch.Tensor) -> None:
        self._segments, self._image = segments, image
        self._seen: dict[int, LayerWeights] = {}

    def __getitem__(self, expert: int) -> LayerWeights:
        if expert not in self._seen:
            self._seen[expert] = _views(self._segments[expert], self._image)
        return self._seen[expert]

    def __iter__(self) -> Iterator[int]:
        return iter(self._segments)

    def __len__(self) -> int:
        return len(self._segments)


def largest_layer(params: Sequence[Param], n_layers: int) -> int:
    """Where layers differ, the first of those with the most elements."""
    sizes = [(p, math.prod(p.shape) * len(p.owners)) for p in params]
    return max(range(n_layers), key=lambda i: sum(n for p, n in sizes if p.is_in(i)))


def source_name(template: str, layer: int, expert: int | None = None) -> str:
    """A tensor's name in the checkpoint."""
    name = template.replace("{layer}", str(layer))
    return name if expert is None else name.replace("{expert}", str(expert))


def _by_owner(params: Sequence[Param]) -> Iterator[tuple[int | None, list[Param]]]:
    """The layer's own, and then each expert's."""
    yield None, [p for p in params if not p.n_experts]
    for expert in range(max((p.n_experts for p in params), default=0)):
        yield expert, [p for p in params if p.n_experts]


def _ends(segments: Sequence[Segment]) -> list[int]:
    """Where in the image the dense part ends, and each expert."""
    last = {s.expert: s.offset_bytes + s.size_bytes for s in segments}
    return [_aligned(end, IMAGE_ALIGNMENT_BYTES) for end in last.values()]


def _aligned(n_bytes: int, alignment_bytes: int) -> int:
    return -(-n_bytes // alignment_bytes) * alignment_bytes


def _views(segments: Sequence[Segment], image: torch.Tensor) -> dict[str, Weight]:
    by_param = groupby(segments, key=lambda s: s.param)
    return {param.name: _seen(param, list(parts), image) for param, parts in by_param}


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
