"""Where parts of an image lie in files: plain data."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass

from sl_serve.weights.direct_file import PIECE_BYTES, DirectFile


@dataclass(frozen=True, slots=True)
class Extent:
    """Bytes [offset, offset + size) of a file, and where in the image they belong."""

    file: DirectFile
    offset_bytes: int
    size_bytes: int
    image_offset_bytes: int


def total_bytes(extents: Iterable[Extent]) -> int:
    return sum(e.size_bytes for e in extents)


def within(extents: Iterable[Extent], part: slice) -> list[Extent]:
    """What belongs to these bytes of the image."""
    found = []
    for e in extents:
        start = max(part.start, e.image_offset_bytes)
        stop = min(part.stop, e.image_offset_bytes + e.size_bytes)
        if start < stop:
            offset = e.offset_bytes + start - e.image_offset_bytes
            found.append(Extent(e.file, offset, stop - start, start))
    return found


def pieces(extents: Sequence[Extent]) -> list[Extent]:
    """The same bytes in extents of at most PIECE_BYTES."""
    return [
        Extent(
            e.file,
            e.offset_bytes + start,
            min(PIECE_BYTES, e.size_bytes - start),
            e.image_offset_bytes + start,
        )
        for e in extents
        for start in range(0, e.size_bytes, PIECE_BYTES)
    ]
