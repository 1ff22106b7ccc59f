"""The disk tier: layers that stay in files and come through a ring of host memory.

The order in which layers are needed never changes, so the ring simply reads on in that order:
read number s brings disk layer s mod n into slot s mod n_slots. A slot is read into again when
its layer has been released, and, if copies of it to a device are still under way, when those are
done. Reading is by several threads, a piece of a layer each, so that the disk has a queue.

Of a routed step's layers the dense part alone is read ahead. Experts follow when they are asked
for, and are waited for; what a step of the other kind has begun is made up for when it is acquired.

Direct reads reach memory without a copy where file and memory lie alike within a block. Tensors
begin anywhere in a checkpoint's file, so a layer is placed in its slot just as far into a block as
its tensors lie in the file: slots are a block larger than images.
"""

from __future__ import annotations

from collections import Counter, deque
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass

import torch

from sl_serve.weights.direct_file import BLOCK_BYTES
from sl_serve.weights.extents import Extent, total_bytes, within
from sl_serve.weights.layout import LayerLayout
from sl_serve.weights.readers import Readers, Reading

SHIFT_ALIGNMENT_BYTES = 8  # of a layer in its slot: elements must be aligned

Done = Callable[[], None]  # returns when nobody reads the slot any more


@dataclass(slots=True)
class _Read:
    """A layer on its way to a slot, or in it."""

    layer: int
    image: torch.Tensor
    n_bytes: int  # of the image's first ones, those that were read
    experts: set[int]  # read besides
    reading: Reading


class DiskRing:
    """Owns the slots and the files."""

    def __init__(
        self,
        layers: Sequence[int],
        extents: Sequence[Sequence[Extent]],
        slots: list[torch.Tensor],
        readers: Readers,
        layout: LayerLayout | None = None,
    ) -> None:
        """`extents[i]` make up the image of `layers[i]`. `slots`: memory of `slot_bytes`.
        `layout`: where layers may have experts."""
        assert len(slots) > 0 and len(extents) == len(layers)
        self._layers, self._extents, self._slots = list(layers), extents, slots
        self._readers, self._layout = readers, layout
        self._is_routed = False
        self._reads: deque[_Read] = deque()  # begun, in order, not yet acquired
        self._in_use: deque[_Read] = deque()  # acquired, not yet released
        self._releases: deque[Done] = deque()  # given back, not yet read into again
        self._n_begun = 0
        self._n_acquired = 0
        self._shifts = [common_shift(layer) for layer in extents]
        self.n_bytes_read = 0  # of layers acquired
        for _ in slots:
            self._begin()

    def begin(self, is_routed: bool) -> None:
        """A step begins, which needs few of each layer's experts, or all."""
        self._is_routed = is_routed

    def acquire(self, layer: int) -> torch.Tensor:
        """The image of the next layer in order; blocks until it is there.

        Raises WeightReadError, again and again once a read has failed.
        """
        turn = self._n_acquired % len(self._layers)
        assert layer == self._layers[turn], "layers are acquired in order"
        while not self._reads:
            self._begin_next()
        read = self._reads[0]
        read.reading.wait()
        n_bytes = self._ahead_bytes(layer)
        if read.n_bytes < n_bytes:
            self._bring(read, [slice(read.n_bytes, n_bytes)])
            read.n_bytes = n_bytes
        self._in_use.append(self._reads.popleft())
        self._n_acquired += 1
        self.n_bytes_read += total_bytes(within(self._extents[turn], slice(0, read.n_bytes)))
        return read.image

    def fetch(self, layer: int, experts: Iterable[int]) -> None:
        """Bring those of an acquired layer's experts that are not there; blocks until they are.
        Raises WeightReadError."""
        assert self._layout is not None
        read = next(r for r in self._in_use if r.layer == layer)
        places = {e: self._layout.expert_range(layer, e) for e in experts}
        missing = {
            e: place
            for e, place in places.items()
            if place.stop > read.n_bytes and e not in read.experts
        }
        self.n_bytes_read += self._bring(read, list(missing.values()))
        read.experts |= missing.keys()

    def release(self, done: Done | None) -> None:
        """The layer acquired longest ago may be overwritten, `done` having returned."""
        self._in_use.popleft()
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
        turn = self._n_begun % len(self._layers)
        image, layer = self._image(self._n_begun), self._layers[turn]
        self._n_begun += 1
        n_bytes = self._ahead_bytes(layer)
        extents = within(self._extents[turn], slice(0, n_bytes))
        reading = self._readers.begin(extents, image.data_ptr())
        self._reads.append(_Read(layer, image, n_bytes, set(), reading))

    def _ahead_bytes(self, layer: int) -> int:
        """How much of an image is read before it is acquired."""
        if self._layout is None:
            return len(self._slots[0])
        return (self._layout.dense_bytes if self._is_routed else self._layout.stored_bytes)(layer)

    def _bring(self, read: _Read, parts: Sequence[slice]) -> int:
        """Read more of an image; returns how many bytes when they are there."""
        of_layer = self._extents[self._layers.index(read.layer)]
        extents = [e for part in parts for e in within(of_layer, part)]
        self._readers.begin(extents, read.image.data_ptr()).wait()
        return total_bytes(extents)

    def _image(self, read: int) -> torch.Tensor:
        """Where read number `read` puts its layer."""
        slot = self._slots[read % len(self._slots)]
        shift = self._shifts[read % len(self._layers)]
        return slot[shift : shift + len(slot) - BLOCK_BYTES]


def slot_bytes(image_bytes: int) -> int:
    return image_bytes + BLOCK_BYTES


def common_shift(extents: Sequence[Extent]) -> int:
    """How far into a block an image must begin, so that as many of its bytes as can be lie there
    as they lie in the file. In a checkpoint that is usually all of them: sizes of tensors are
    whole blocks, and only a header of any length puts them out of step."""
    n_bytes: Counter[int] = Counter()
    for extent in extents:
        shift = (extent.offset_bytes - extent.image_offset_bytes) % BLOCK_BYTES
        if shift % SHIFT_ALIGNMENT_BYTES == 0:
            n_bytes[shift] += extent.size_bytes
    return max(n_bytes, key=lambda shift: n_bytes[shift], default=0)
