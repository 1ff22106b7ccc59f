"""Threads that read extents of files, several at a time.

Native ones (`csrc/reader.cpp`) where the core is built: between two reads they need nothing of the
interpreter, which others keep for milliseconds. Elsewhere Python's, the twin.
"""

from __future__ import annotations

import threading
from collections.abc import Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from typing import TYPE_CHECKING, Protocol

from sl_serve.weights.direct_file import BLOCK_BYTES, Bounce, read_error
from sl_serve.weights.extents import Extent, pieces

if TYPE_CHECKING:
    from sl_serve import _native

N_READERS = 4  # reads in flight; disks reach their rate with a few of some megabytes each


class Reading(Protocol):
    """Extents on their way to memory."""

    def wait(self) -> None:
        """Blocks until they are there. Raises WeightReadError, again and again where one failed."""


class Readers(Protocol):
    """Owns the threads, each with an aligned buffer of its own; shared by all that is read."""

    def begin(self, extents: Sequence[Extent], address: int) -> Reading:
        """Queue the reading of an image into memory at `address`."""

    def close(self) -> None:
        """Nothing is written to any image from here on."""


def make_readers() -> Readers:
    """The fastest there are here."""
    try:
        return NativeReaders()
    except ImportError:
        return PythonReaders()


class NativeReaders:
    """Raises ImportError where the core is not built."""

    def __init__(self) -> None:
        from sl_serve._native import Reader

        self.bounces = [Bounce() for _ in range(N_READERS)]
        self._reader = Reader([b.address for b in self.bounces], BLOCK_BYTES)

    def begin(self, extents: Sequence[Extent], address: int) -> Reading:
        parts = pieces(extents)
        reading = self._reader.begin(
            [
                (
                    p.file.descriptor,
                    p.file.is_direct,
                    p.offset_bytes,
                    p.size_bytes,
                    address + p.image_offset_bytes,
                )
                for p in parts
            ]
        )
        return _NativeReading(parts, reading)

    def close(self) -> None:
        self._reader.close()


class _NativeReading:
    def __init__(self, parts: list[Extent], reading: _native.Reading) -> None:
        self._parts, self._reading = parts, reading

    def wait(self) -> None:
        failure = self._reading.wait()
        if failure is not None:
            index, at_byte, error_number = failure
            part = self._parts[index]
            stop = part.offset_bytes + part.size_bytes
            raise read_error(part.file.path, at_byte, stop, error_number)


class PythonReaders:
    def __init__(self) -> None:
        self.bounces = [Bounce() for _ in range(N_READERS)]
        self._mine = threading.local()
        free = iter(self.bounces)  # a thread's first act is to take one
        self._pool = ThreadPoolExecutor(
            N_READERS, "weights", lambda: setattr(self._mine, "bounce", next(free))
        )

    def begin(self, extents: Sequence[Extent], address: int) -> Reading:
        return _PythonReading(
            [self._pool.submit(self._read, address, piece) for piece in pieces(extents)]
        )

    def close(self) -> None:
        self._pool.shutdown(wait=True, cancel_futures=True)

    def _read(self, address: int, piece: Extent) -> None:
        to = address + piece.image_offset_bytes
        piece.file.read_into(to, piece.offset_bytes, piece.size_bytes, self._mine.bounce)


class _PythonReading:
    def __init__(self, parts: list[Future[None]]) -> None:
        self._parts = parts

    def wait(self) -> None:
        for part in self._parts:
            part.result()
