"""The disk on its own: its rate for the very file that is served, the page cache, what was read."""

from __future__ import annotations

import ctypes
import mmap
import os
import threading
import time
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path

from bench.errors import BenchError

_SLOT_BYTES = 64 << 20  # about a layer
_N_SLOTS = 2
_PIECE_BYTES = 4 << 20
_N_THREADS = 4
_HUGE_PAGE_BYTES = 2 << 20


@dataclass(frozen=True, slots=True)
class Bandwidth:
    """Of whole files read once each way, directly and cold."""

    readers_bytes_per_s: float  # as the disk tier reads
    plain_bytes_per_s: float  # a loop of preadv that shares no code with it

    @property
    def bytes_per_s(self) -> float:
        """The faster: a rate that is measured too low would flatter what is compared with it."""
        return max(self.readers_bytes_per_s, self.plain_bytes_per_s)


def weight_files(model: Path) -> list[Path]:
    return sorted(model.glob("*.safetensors"))


def measure_bandwidth(files: Sequence[Path]) -> Bandwidth:
    """Raises BenchError where the file system refuses direct reads."""
    n_bytes = sum(file.stat().st_size for file in files)
    drop_page_cache(files)
    seconds = []
    for read in (_read_as_engine, _read_plainly):
        start = time.perf_counter()
        for file in files:
            read(file)
        seconds.append(time.perf_counter() - start)
    return Bandwidth(n_bytes / seconds[0], n_bytes / seconds[1])


def drop_page_cache(files: Sequence[Path]) -> None:
    """The next read of any of them comes from the disk."""
    for file in files:
        descriptor = os.open(file, os.O_RDONLY)
        try:
            os.fsync(descriptor)  # a page that is not written yet cannot be dropped
            os.posix_fadvise(descriptor, 0, 0, os.POSIX_FADV_DONTNEED)
        finally:
            os.close(descriptor)


def read_bytes() -> int:
    """What this process has had the storage deliver so far; pages found in the cache are free."""
    lines = Path("/proc/self/io").read_text().splitlines()
    return next(int(line.split()[1]) for line in lines if line.startswith("read_bytes:"))


def _read_as_engine(path: Path) -> None:
    from sl_serve.weights.direct_file import DirectFile
    from sl_serve.weights.disk import DiskRing, slot_bytes
    from sl_serve.weights.extents import Extent
    from sl_serve.weights.host import host_images_of
    from sl_serve.weights.readers import make_readers

    file = DirectFile(path)
    size = path.stat().st_size
    extents = [
        [Extent(file, start, min(_SLOT_BYTES, size - start), 0)]
        for start in range(0, size, _SLOT_BYTES)
    ]
    slots = host_images_of(slot_bytes(_SLOT_BYTES), range(_N_SLOTS))
    readers = make_readers()
    ring = DiskRing(range(len(extents)), extents, list(slots.values()), readers)
    try:
        for i in range(len(extents)):
            ring.acquire(i)
            ring.release(None)
    finally:
        readers.close()
        ring.close()
    if not file.is_direct:
        raise _refused(path)


def _read_plainly(path: Path) -> None:
    try:
        descriptor = os.open(path, os.O_RDONLY | os.O_DIRECT)
    except OSError:
        raise _refused(path) from None
    buffers = threading.local()

    def prepare() -> None:
        buffers.mine = _huge_pages(_PIECE_BYTES)

    def read(offset: int) -> int:
        return os.preadv(descriptor, [buffers.mine], offset)

    try:
        with ThreadPoolExecutor(_N_THREADS, initializer=prepare) as pool:
            n_read = sum(pool.map(read, range(0, path.stat().st_size, _PIECE_BYTES)))
    finally:
        os.close(descriptor)
    if n_read != path.stat().st_size:
        raise BenchError(f"{path}: {n_read} of {path.stat().st_size} bytes could be read")


def _huge_pages(n_bytes: int) -> memoryview:
    """Memory in as few pieces as there can be. A read into 4 KiB pages needs an entry for each of
    them, and devices take a few hundred in one request: measured on a virtual disk, 0.9 GB/s into
    such pages and 2.2 GB/s into huge ones."""
    area = mmap.mmap(
        -1, n_bytes + _HUGE_PAGE_BYTES, flags=mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS
    )  # a shared mapping, the default, has no huge pages
    area.madvise(mmap.MADV_HUGEPAGE)
    start = -ctypes.addressof(ctypes.c_char.from_buffer(area)) % _HUGE_PAGE_BYTES
    return memoryview(area)[start : start + n_bytes]


def _refused(path: Path) -> BenchError:
    return BenchError(f"{path}: its file system refuses direct reads; use a local disk")
