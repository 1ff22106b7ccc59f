"""Direct reads and the ring of the disk tier, against the bytes of the file."""

from __future__ import annotations

import errno
import os
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from sl_serve.errors import WeightReadError
from sl_serve.host_memory import host_empty
from sl_serve.weights.direct_file import BLOCK_BYTES, PIECE_BYTES, Bounce, DirectFile
from sl_serve.weights.disk import DiskRing, Extent, Readers, common_shift, slot_bytes

FILE_BYTES = 3 * PIECE_BYTES + 12_345
CONTENT = torch.randint(
    0, 256, (FILE_BYTES,), dtype=torch.uint8, generator=torch.Generator().manual_seed(1)
)
FEW = settings(derandomize=True, max_examples=60, deadline=None)


@pytest.fixture(scope="module")
def path(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("disk") / "weights"
    path.write_bytes(CONTENT.numpy().tobytes())
    return path


@pytest.fixture(scope="module", params=["direct", "buffered"])
def file(path: Path, request: pytest.FixtureRequest) -> Iterator[DirectFile]:
    with pytest.MonkeyPatch.context() as patch:
        if request.param == "buffered":
            patch.setattr(os, "open", without_direct(os.open))
        opened = DirectFile(path)
    if request.param == "buffered":
        assert not opened.is_direct
    yield opened
    opened.close()


def without_direct(real_open):  # type: ignore[no-untyped-def]
    def refuse(path: Path, flags: int) -> int:
        if flags & os.O_DIRECT:
            raise OSError(errno.EINVAL, "Invalid argument")
        return int(real_open(path, flags))

    return refuse


@FEW
@given(data=st.data())
def test_any_piece_is_read_to_any_address(file: DirectFile, data: st.DataObject) -> None:
    aligned = data.draw(st.booleans())
    unit = BLOCK_BYTES if aligned else 1
    offset = data.draw(st.integers(0, (FILE_BYTES - 1) // unit)) * unit
    longest = min(PIECE_BYTES, FILE_BYTES - offset)
    n_bytes = data.draw(st.sampled_from([longest, min(longest, 4096), min(longest, 777), 1]))
    start = data.draw(st.integers(0, 2)) * unit
    memory = host_empty(PIECE_BYTES + 4 * BLOCK_BYTES)
    file.read_into(memory.data_ptr() + start, offset, n_bytes, Bounce())
    assert torch.equal(memory[start : start + n_bytes], CONTENT[offset : offset + n_bytes])
    assert not memory[:start].any() and not memory[start + n_bytes :].any()


@pytest.mark.parametrize(("offset", "n_bytes"), [(0, 8192), (5, 20_000), (4095, PIECE_BYTES)])
def test_where_file_and_memory_lie_alike_only_shared_blocks_are_copied(
    path: Path, offset: int, n_bytes: int
) -> None:
    file, bounce = DirectFile(path), Bounce()
    memory = host_empty(PIECE_BYTES + 4 * BLOCK_BYTES)
    start = offset % BLOCK_BYTES
    file.read_into(memory.data_ptr() + start, offset, n_bytes, bounce)
    file.close()
    assert torch.equal(memory[start : start + n_bytes], CONTENT[offset : offset + n_bytes])
    if file.is_direct:
        assert not any(bounce.view[2 * BLOCK_BYTES :])


def test_a_layer_is_placed_as_most_of_its_bytes_lie_in_the_file(path: Path) -> None:
    file = DirectFile(path)
    ring_bytes = 40_000
    layers = [
        [Extent(file, 8, 20_000, 0), Extent(file, 30_000, 6_000, 20_000)],
        [Extent(file, 3, 20_000, 0), Extent(file, 30_000, 6_000, 20_000)],  # 3: elements unaligned
        [Extent(file, 3, 20_000, 0)],
    ]
    assert [common_shift(layer) for layer in layers] == [8, 10_000 % BLOCK_BYTES, 0]
    readers, slots = Readers(), [host_empty(slot_bytes(ring_bytes)) for _ in range(2)]
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


@pytest.mark.parametrize("offset", [FILE_BYTES - 5000, FILE_BYTES - 4096, FILE_BYTES, 1 << 40])
def test_a_file_that_is_too_short_is_named_with_the_numbers(file: DirectFile, offset: int) -> None:
    memory = host_empty(8192)
    with pytest.raises(WeightReadError, match="cut short") as failure:
        file.read_into(memory.data_ptr(), offset, 8192, Bounce())
    assert str(file.path) in str(failure.value) and str(offset + 8192) in str(failure.value)


def test_a_failing_disk_is_named(file: DirectFile, monkeypatch: pytest.MonkeyPatch) -> None:
    def fail(*_: object) -> int:
        raise OSError(errno.EIO, "Input/output error")

    monkeypatch.setattr(os, "preadv", fail)
    memory = host_empty(4096)
    with pytest.raises(WeightReadError, match=r"byte 4096 failed .Input/output error"):
        file.read_into(memory.data_ptr(), 4096, 4096, Bounce())


def test_a_missing_file_is_named(tmp_path: Path) -> None:
    with pytest.raises(WeightReadError, match="cannot be opened"):
        DirectFile(tmp_path / "none")


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
    path: Path, n_slots: int, with_copies: bool
) -> None:
    readers = Readers()
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


def test_a_failed_read_is_told_at_the_layer_it_concerns_and_ever_after(tmp_path: Path) -> None:
    path = tmp_path / "short"
    path.write_bytes(CONTENT[: PIECE_BYTES + 12_000].numpy().tobytes())  # enough for layer 1
    readers = Readers()
    file = DirectFile(path)
    slots = [host_empty(slot_bytes(IMAGE_BYTES)), host_empty(slot_bytes(IMAGE_BYTES))]
    ring = DiskRing([1, 8], [extents(file, 1), extents(file, 8)], slots, readers)
    assert is_image_of(ring.acquire(1), 1)
    for _ in range(2):
        with pytest.raises(WeightReadError, match="cut short"):
            ring.acquire(8)
    readers.close()
    ring.close()
