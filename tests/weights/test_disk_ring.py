"""The ring of the disk tier, against the bytes of the file."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
import torch

from sl_serve.errors import WeightReadError
from sl_serve.host_memory import host_empty
from sl_serve.weights.direct_file import BLOCK_BYTES, PIECE_BYTES, DirectFile
from sl_serve.weights.disk import DiskRing, common_shift, slot_bytes
from sl_serve.weights.extents import Extent
from sl_serve.weights.readers import NativeReaders, PythonReaders, Readers
from tests.weights.random_file import CONTENT, write_random_file


@pytest.fixture(scope="module")
def path(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_random_file(tmp_path_factory.mktemp("disk"))


@pytest.fixture(params=[NativeReaders, PythonReaders])
def readers(request: pytest.FixtureRequest) -> Iterator[Readers]:
    make: Callable[[], Readers] = request.param
    readers = make()
    yield readers
    readers.close()


def test_a_layer_is_placed_as_most_of_its_bytes_lie_in_the_file(
    path: Path, readers: Readers
) -> None:
    file = DirectFile(path)
    ring_bytes = 40_000
    layers = [
        [Extent(file, 8, 20_000, 0), Extent(file, 30_000, 6_000, 20_000)],
        [Extent(file, 3, 20_000, 0), Extent(file, 30_000, 6_000, 20_000)],  # 3: elements unaligned
        [Extent(file, 3, 20_000, 0)],
    ]
    assert [common_shift(layer) for layer in layers] == [8, 10_000 % BLOCK_BYTES, 0]
    slots = [host_empty(slot_bytes(ring_bytes)) for _ in range(2)]
    ring = DiskRing(range(3), layers, slots, readers)
    for layer, shift in ((0, 8), (1, 10_000 % BLOCK_BYTES), (2, 0)):
        image = ring.acquire(layer)
        assert image.data_ptr() % BLOCK_BYTES == shift and len(image) == ring_bytes
        for e in layers[layer]:
            got = image[e.image_offset_bytes : e.image_offset_bytes + e.size_bytes]
            assert torch.equal(got, CONTENT[e.offset_bytes : e.offset_bytes + e.size_bytes])
        ring.release(None)
    readers.close()
    ring.close()


# The ring: four images of two extents each, unaligned, some shared.

IMAGE_BYTES = PIECE_BYTES + 9000
SHAPES = [(0, 5000, 0), (7001, PIECE_BYTES + 3000, 5120)]  # (file offset, size, image offset)


def extents(file: DirectFile, layer: int) -> list[Extent]:
    return [Extent(file, layer * 999 + at, size, to) for at, size, to in SHAPES]


def is_image_of(image: torch.Tensor, layer: int) -> bool:
    return all(
        torch.equal(image[to : to + size], CONTENT[layer * 999 + at : layer * 999 + at + size])
        for at, size, to in SHAPES
    )


@pytest.mark.parametrize("with_copies", [False, True], ids=["in place", "copied from"])
@pytest.mark.parametrize("n_slots", [2, 3, 6])
def test_layers_come_in_order_whole_and_stay_until_released(
    path: Path, readers: Readers, n_slots: int, with_copies: bool
) -> None:
    slots = [host_empty(slot_bytes(IMAGE_BYTES)) for _ in range(n_slots)]
    file = DirectFile(path)
    ring = DiskRing([1, 3, 4, 8], [extents(file, i) for i in (1, 3, 4, 8)], slots, readers)
    unfinished: list[tuple[torch.Tensor, int]] = []

    def done() -> None:  # the copy that was queued at the release reads its image now
        assert is_image_of(*unfinished.pop(0))

    for layer in [1, 3, 4, 8] * 5:
        image = ring.acquire(layer)
        assert is_image_of(image, layer)
        if with_copies:
            unfinished.append((image, layer))
            ring.release(done)
        else:
            ring.release(None)
    assert ring.n_bytes_read == 20 * sum(size for _, size, _ in SHAPES)
    readers.close()
    ring.close()


def test_a_failed_read_is_told_at_the_layer_it_concerns_and_ever_after(
    tmp_path: Path, readers: Readers
) -> None:
    path = tmp_path / "short"
    path.write_bytes(CONTENT[: PIECE_BYTES + 12_000].numpy().tobytes())  # enough for layer 1
    file = DirectFile(path)
    slots = [host_empty(slot_bytes(IMAGE_BYTES)), host_empty(slot_bytes(IMAGE_BYTES))]
    ring = DiskRing([1, 8], [extents(file, 1), extents(file, 8)], slots, readers)
    assert is_image_of(ring.acquire(1), 1)
    for _ in range(2):
        with pytest.raises(WeightReadError, match="cut short"):
            ring.acquire(8)
    readers.close()
    ring.close()
