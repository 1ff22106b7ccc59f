"""The vocabulary matrix, in memory or coming from disk piece by piece, once for each use."""

from __future__ import annotations

from collections.abc import Generator
from typing import Protocol

from sl_serve.device import Device
from sl_serve.weights.direct_file import DirectFile
from sl_serve.weights.disk import DiskRing, slot_bytes
from sl_serve.weights.extents import Extent
from sl_serve.weights.file_range import FileRange
from sl_serve.weights.host import host_images_of
from sl_serve.weights.quantised import Rows
from sl_serve.weights.readers import Readers

PIECE_BYTES = 16 << 20  # at most, of rows that are read while those before are multiplied with
N_PIECES = 2  # in memory


class HeadWeight(Protocol):
    n_rows: int  # the vocabulary's size

    def pieces(self) -> Generator[tuple[int, Rows]]:
        """(first row, some rows (n, hidden)), all rows in order; each valid until the next. To be
        closed if it is left before its end.

        Raises WeightReadError.
        """
        ...

    def close(self) -> None: ...


class ResidentHead:
    def __init__(self, weight: Rows) -> None:
        self.n_rows = weight.shape[0]
        self._weight = weight

    def pieces(self) -> Generator[tuple[int, Rows]]:
        yield 0, self._weight

    def close(self) -> None:
        pass


class FileHead:
    """Rows of a tensor in a file, through a ring of their own."""

    def __init__(
        self, location: FileRange, shape: tuple[int, int], readers: Readers, device: Device
    ) -> None:
        self._device = device
        self.n_rows, self._width = shape
        assert location.dtype is not None
        self._dtype = location.dtype
        row_bytes = self._width * self._dtype.itemsize
        self._rows_per_piece = max(1, PIECE_BYTES // row_bytes)
        file = DirectFile(location.path)
        self._firsts = range(0, self.n_rows, self._rows_per_piece)
        extents = [
            [Extent(file, location.offset_bytes + first * row_bytes, self._n(first) * row_bytes, 0)]
            for first in self._firsts
        ]
        slots = host_images_of(slot_bytes(self._rows_per_piece * row_bytes), range(N_PIECES))
        self._ring = DiskRing(range(len(extents)), extents, list(slots.values()), readers)

    def pieces(self) -> Generator[tuple[int, Rows]]:
        numbered = enumerate(self._firsts)
        try:
            for i, first in numbered:
                rows = self._ring.acquire(i).view(self._dtype).view(-1, self._width)
                try:
                    yield first, self._device.upload(rows[: self._n(first)])
                finally:
                    self._ring.release(None)
        finally:
            for i, _ in numbered:  # left before the end: the ring's order never changes
                self._ring.acquire(i)
                self._ring.release(None)

    def close(self) -> None:
        self._ring.close()

    def _n(self, first: int) -> int:
        return min(self._rows_per_piece, self.n_rows - first)
