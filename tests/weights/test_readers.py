"""Reads of files by native threads and by their twin, against the bytes of the file."""

from __future__ import annotations

import errno
import os
from collections.abc import Iterator
from concurrent.futures import CancelledError
from pathlib import Path

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from sl_serve.errors import WeightReadError
from sl_serve.host_memory import host_empty
from sl_serve.weights.direct_file import BLOCK_BYTES, PIECE_BYTES, DirectFile
from sl_serve.weights.extents import Extent
from sl_serve.weights.readers import NativeReaders, PythonReaders, make_readers
from tests.weights.random_file import CONTENT, FILE_BYTES, write_random_file

AnyReaders = NativeReaders | PythonReaders

FEW = settings(derandomize=True, max_examples=60, deadline=None)


@pytest.fixture(scope="module")
def path(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_random_file(tmp_path_factory.mktemp("disk"))


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


@pytest.fixture(scope="module", params=[NativeReaders, PythonReaders])
def readers(request: pytest.FixtureRequest) -> Iterator[AnyReaders]:
    readers: AnyReaders = request.param()
    yield readers
    readers.close()


def without_direct(real_open):  # type: ignore[no-untyped-def]
    def refuse(path: Path, flags: int) -> int:
        if flags & os.O_DIRECT:
            raise OSError(errno.EINVAL, "Invalid argument")
        return int(real_open(path, flags))

    return refuse


def read(readers: AnyReaders, file: DirectFile, address: int, offset: int, n_bytes: int) -> None:
    readers.begin([Extent(file, offset, n_bytes, 0)], address).wait()


def test_the_native_ones_are_taken_where_they_are_built() -> None:
    readers = make_readers()
    assert isinstance(readers, NativeReaders)
    readers.close()


@FEW
@given(data=st.data())
def test_any_bytes_are_read_to_any_address(
    readers: AnyReaders, file: DirectFile, data: st.DataObject
) -> None:
    unit = BLOCK_BYTES if data.draw(st.booleans()) else 1
    offset = data.draw(st.integers(0, (FILE_BYTES - 1) // unit)) * unit
    longest = min(PIECE_BYTES + 5000, FILE_BYTES - offset)  # two pieces, where there are so many
    n_bytes = data.draw(st.sampled_from([longest, min(longest, 4096), min(longest, 777), 1]))
    start = data.draw(st.integers(0, 2)) * unit
    memory = host_empty(PIECE_BYTES + 4 * BLOCK_BYTES)
    read(readers, file, memory.data_ptr() + start, offset, n_bytes)
    assert torch.equal(memory[start : start + n_bytes], CONTENT[offset : offset + n_bytes])
    assert not memory[:start].any() and not memory[start + n_bytes :].any()


@pytest.mark.parametrize("make", [NativeReaders, PythonReaders])
@pytest.mark.parametrize(("offset", "n_bytes"), [(0, 8192), (5, 20_000), (4095, PIECE_BYTES)])
def test_where_file_and_memory_lie_alike_only_shared_blocks_are_copied(
    make: type[AnyReaders], path: Path, offset: int, n_bytes: int
) -> None:
    file, readers = DirectFile(path), make()
    memory = host_empty(PIECE_BYTES + 4 * BLOCK_BYTES)
    start = offset % BLOCK_BYTES
    read(readers, file, memory.data_ptr() + start, offset, n_bytes)
    readers.close()
    file.close()
    assert torch.equal(memory[start : start + n_bytes], CONTENT[offset : offset + n_bytes])
    if file.is_direct:
        assert not any(any(bounce.view[2 * BLOCK_BYTES :]) for bounce in readers.bounces)


@pytest.mark.parametrize("offset", [FILE_BYTES - 5000, FILE_BYTES - 4096, FILE_BYTES, 1 << 40])
def test_a_file_that_is_too_short_is_named_with_the_numbers(
    readers: AnyReaders, file: DirectFile, offset: int
) -> None:
    memory = host_empty(8192)
    with pytest.raises(WeightReadError, match="cut short") as failure:
        read(readers, file, memory.data_ptr(), offset, 8192)
    said = str(failure.value)
    assert str(file.path) in said and f"bytes up to {offset + 8192} " in said
    assert f"ends at byte {max(FILE_BYTES, offset)}," in said


def test_a_failing_read_is_named(readers: AnyReaders, tmp_path: Path) -> None:
    folder = DirectFile.adopt(os.open(tmp_path, os.O_RDONLY), tmp_path)
    memory = host_empty(4096)
    with pytest.raises(WeightReadError, match=r"reading at byte 4096 failed .Is a directory"):
        read(readers, folder, memory.data_ptr(), 4096, 4096)
    folder.close()


def test_the_first_of_several_failures_is_told_again_and_again(
    readers: AnyReaders, file: DirectFile
) -> None:
    memory = host_empty(2 * BLOCK_BYTES)
    extents = [Extent(file, 0, 4096, 0), Extent(file, FILE_BYTES, 4096, 4096)]
    reading = readers.begin(extents, memory.data_ptr())
    for _ in range(2):
        with pytest.raises(WeightReadError, match="cut short"):
            reading.wait()
    assert torch.equal(memory[:4096], CONTENT[:4096])


@pytest.mark.parametrize("make", [NativeReaders, PythonReaders])
def test_what_has_not_begun_when_they_are_closed_has_failed(
    make: type[AnyReaders], path: Path
) -> None:
    file, readers, memory = DirectFile(path), make(), host_empty(PIECE_BYTES)
    pieces = [Extent(file, 0, PIECE_BYTES, 0)] * 2000  # some seconds of reading
    readings = [readers.begin([piece], memory.data_ptr()) for piece in pieces]
    readers.close()
    memory.zero_()
    n_failed = 0
    for reading in readings:
        try:
            reading.wait()
        except (WeightReadError, CancelledError):
            n_failed += 1
    assert n_failed > 0
    assert not memory.any()
    file.close()


def test_a_missing_file_is_named(tmp_path: Path) -> None:
    with pytest.raises(WeightReadError, match="cannot be opened"):
        DirectFile(tmp_path / "none")
