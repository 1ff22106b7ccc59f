"""The disk tier: layers that stay in files and come through a ring of host memory.

The order in which layers are needed never changes, so the ring simply reads on in that order:
read number s brings disk layer s mod n into slot s mod n_slots. A slot is read into again when
its layer has been released, and, if copies of it to a device are still under way, when those are
done. Reading is by several threads, a piece of a layer each, so that the disk has a queue.
"""

from __future__ import annotations

import threading
from collections import deque
from collections.abc import Callable, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass

import torch

from sl_serve.weights.direct_file import PIECE_BYTES, Bounce, DirectFile

N_READERS = 4  # reads in flight; disks reach their rate with a few of some megabytes each

Done = Callable[[], None]  # returns when nobody reads the slot any more


@dataclass(frozen=True, slots=True)
class Extent:
    """Bytes [offset, offset + size) of a file, and where in the layer's image they belong."""

    file: DirectFile
    offset_bytes: int
    size_bytes: int
    image_offset_bytes: int


class Readers:
    """Threads that read extents, each with its own aligned buffer; shared by all rings."""

    def __init__(self) -> None:
        self._pool = ThreadPoolExecutor(N_READERS, thread_name_prefix="weights")
        self._bounces = threading.local()

    def begin(self, extents: Sequence[Extent], address: int) -> list[Future[None]]:
        """Queue the reading of an image into memory at `address`."""
        return [self._pool.submit(self._read, address, piece) for piece in pieces(extents)]

    def close(self) -> None:
        """Nothing is written to any image from here on."""
        self._pool.shutdown(wait=True, cancel_futures=True)

    def _read(self, address: int, piece: Extent) -> None:
        if not hasattr(self._bounces, "mine"):
            self._bounces.mine = Bounce()
        to = address + piece.image_offset_bytes
        piece.file.read_into(to, piece.offset_bytes, piece.size_bytes, self._bounces.mine)


class DiskRing:
    """Owns the slots and the files."""

    def __init__(
        self,
        layers: Sequence[int],
        extents: Sequence[Sequence[Extent]],
        slots: list[torch.Tensor],
        readers: Readers,
    ) -> None:
        """`extents[i]` make up the image of `layers[i]`. `slots`: host memory, an image each."""
        assert len(slots) > 0 and len(extents) == len(layers)
        self._layers, self._extents, self._slots = list(layers), extents, slots
        self._readers = readers
        self._reads: deque[list[Future[None]]] = deque()  # begun, in order, not yet acquired
        self._releases: deque[Done] = deque()  # given back, not yet read into again
        self._n_begun = 0
        self._n_acquired = 0
        self._n_bytes = [sum(e.size_bytes for e in layer) for layer in extents]
        self.n_bytes_read = 0  # of layers acquired
        for _ in slots:
            self._begin()

    def acquire(self, layer: int) -> torch.Tensor:
        """The image of the next layer in order; blocks until it is there.

        Raises WeightReadError, again and again once a read has failed.
        """
        turn = self._n_acquired % len(self._layers)
        assert layer == self._layers[turn], "layers are acquired in order"
        while not self._reads:
            self._begin_next()
        for read in self._reads[0]:
            read.result()
        self._reads.popleft()
        slot = self._slots[self._n_acquired % len(self._slots)]
        self._n_acquired += 1
        self.n_bytes_read += self._n_bytes[turn]
        return slot

    def release(self, done: Done | None) -> None:
        """The layer acquired longest ago may be overwritten, `done` having returned."""
        if done is None:
            self._begin()
            return
        # A copy from the slot is queued, not done: waiting for it now would hold up the queue.
        self._releases.append(done)
        if len(self._releases) > 1:
            self._begin_next()

    def close(self) -> None:
        """After the readers."""
        for file in {id(e.file): e.file for layer in self._extents for e in layer}.values():
            file.close()

    def _begin_next(self) -> None:
        self._releases.popleft()()
        self._begin()

    def _begin(self) -> None:
        """Queue the reads of the next layer into the slot that is free for it."""
        slot = self._slots[self._n_begun % len(self._slots)].data_ptr()
        extents = self._extents[self._n_begun % len(self._layers)]
        self._n_begun += 1
        self._reads.append(self._readers.begin(extents, slot))


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
