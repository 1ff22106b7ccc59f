"""What this machine can do, measured: each figure within a second or two."""

from __future__ import annotations

import io
import os
import tempfile
import time
from collections import deque
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

import torch

from sl_serve.errors import UserError
from sl_serve.host_memory import host_empty
from sl_serve.ops import choose_ops
from sl_serve.plan.budget import MIB, available_bytes
from sl_serve.plan.hardware import Hardware
from sl_serve.plan.probe_compute import (
    Shapes,
    attention_rates,
    cell_rates,
    head_rates,
    matmul_rates,
    typical_seconds,
)
from sl_serve.plan.probe_device import probe_device
from sl_serve.weights.direct_file import BLOCK_BYTES, PIECE_BYTES, DirectFile
from sl_serve.weights.extents import Extent
from sl_serve.weights.readers import N_READERS, Readers, Reading, make_readers

Say = Callable[[str], None]  # hears what is measured next

HOST_BUFFER_BYTES = 512 * MIB
DISK_FILE_BYTES = 512 * MIB
N_QUEUED = 2 * N_READERS  # pieces, so that no reader waits for the next
DISK_SECONDS = 2.0  # for each reading, and before them for writing a file
WEIGHT_FILES = ("*.safetensors", "*.gguf")


def probe(shapes: Shapes, disk_dir: Path | None, n_threads: int, say: Say) -> Hardware:
    """The machine as a Hardware. Raises UserError when `disk_dir` cannot be used."""
    say("host memory")
    host_read = host_read_bytes_per_s()
    disk_bytes, disk_read = 0, 0.0
    if disk_dir is not None:
        say(f"disk at {disk_dir}")
        disk_bytes, disk_read = _free_disk_bytes(disk_dir), disk_read_bytes_per_s(disk_dir)
    if torch.cuda.is_available():
        say("attention by the processor")
        host_ops = choose_ops("float32", n_threads)
        with torch.inference_mode():
            host_attention = attention_rates(host_ops, shapes.model, shapes.kv)
        say("link and accelerator")
        return probe_device(
            shapes.model,
            shapes.stored,
            host_bytes=available_bytes(),
            disk_bytes=disk_bytes,
            host_read_bytes_per_s=host_read,
            disk_read_bytes_per_s=disk_read,
            host_attention=host_attention,
        )
    ops = choose_ops(shapes.compute, n_threads)
    say("matrix products")
    with torch.inference_mode():
        matmul, head = matmul_rates(ops, shapes), head_rates(ops, shapes)
    say("attention")
    with torch.inference_mode():
        attention = attention_rates(ops, shapes.model, shapes.kv)
        cell = cell_rates(ops, shapes.model, shapes.kv)
    return Hardware(
        name="this machine",
        device_bytes=0,
        host_bytes=available_bytes(),
        disk_bytes=disk_bytes,
        link_down_bytes_per_s=0.0,
        link_up_bytes_per_s=0.0,
        link_down_both_bytes_per_s=0.0,
        link_up_both_bytes_per_s=0.0,
        host_read_bytes_per_s=host_read,
        disk_read_bytes_per_s=disk_read,
        device_read_bytes_per_s=0.0,
        matmul=matmul,
        head=head,
        attention=attention,
        elementwise_bytes_per_s=cell.elementwise_bytes_per_s,
        cell_overhead_s=cell.overhead_s,
    )


def measurable_folder(disk_dir: str | None, model: Path) -> Path | None:
    """Where the disk is measured: where asked for, or else where the model lies."""
    if disk_dir is not None:
        return Path(disk_dir)
    folder = model if model.is_dir() else model.parent
    if not model.exists():
        return None
    return folder if os.access(folder, os.W_OK) or _weights_in(folder) else None


def host_read_bytes_per_s() -> float:
    """All threads, from memory that no cache holds."""
    n_bytes = min(HOST_BUFFER_BYTES, available_bytes() // 8)
    values = torch.ones(n_bytes // 4, dtype=torch.float32)
    return values.nbytes / typical_seconds(values.sum)


def disk_read_bytes_per_s(folder: Path) -> float:
    """Large direct reads, several in flight, as the disk tier makes them: of the largest weights
    file there, or else of a file without a name that is made for it. Raises UserError when it
    cannot be made."""
    file = _weights_in(folder)
    if file is not None:
        return _read_rate(DirectFile(file), file.stat().st_size)
    with _file_on(folder) as made:
        n_bytes = os.fstat(made.fileno()).st_size
        return _read_rate(DirectFile.adopt(os.dup(made.fileno()), folder), n_bytes)


def _weights_in(folder: Path) -> Path | None:
    """The very file that would be read; too small a one tells nothing."""
    found = [(f.stat().st_size, f) for kind in WEIGHT_FILES for f in folder.glob(kind)]
    size_bytes, file = max(found, default=(0, None))
    return file if size_bytes >= DISK_FILE_BYTES else None


def _read_rate(file: DirectFile, n_bytes: int) -> float:
    """Bytes/s of reading again what was read before, as every step does: a disk behind a network or
    a hypervisor may need several times as long the first time. As much as DISK_SECONDS allow."""
    readers, memory = make_readers(), host_empty(N_QUEUED * PIECE_BYTES)
    try:
        n_first, _ = _read(readers, file, n_bytes, memory)
        n_again, again_s = _read(readers, file, n_first, memory)
        return n_again / again_s
    finally:
        readers.close()
        file.close()


def _read(
    readers: Readers, file: DirectFile, n_bytes: int, memory: torch.Tensor
) -> tuple[int, float]:
    """How many of the first n_bytes were read, in whole pieces, and in how many seconds."""
    start_s, n_read = time.perf_counter(), 0
    begun: deque[Reading] = deque()
    for offset in range(0, n_bytes - PIECE_BYTES + 1, PIECE_BYTES):
        if len(begun) == N_QUEUED:
            begun.popleft().wait()
        piece = Extent(file, offset, PIECE_BYTES, offset % len(memory))
        begun.append(readers.begin([piece], memory.data_ptr()))
        n_read += PIECE_BYTES
        if time.perf_counter() - start_s > DISK_SECONDS:
            break
    for reading in begun:
        reading.wait()
    return n_read, time.perf_counter() - start_s


@contextmanager
def _file_on(folder: Path) -> Iterator[io.FileIO]:
    """Whole pieces, flushed and out of the cache; as large as DISK_SECONDS of writing allow."""
    n_bytes = min(DISK_FILE_BYTES, _free_disk_bytes(folder) // 4)
    piece = os.urandom(PIECE_BYTES)  # a drive that compresses must not gain
    assert PIECE_BYTES % BLOCK_BYTES == 0
    try:
        with tempfile.TemporaryFile(dir=folder, buffering=0) as file:
            end_s = time.perf_counter() + DISK_SECONDS
            file.write(piece)
            for _ in range(n_bytes // PIECE_BYTES - 1):
                file.write(piece)
                if time.perf_counter() > end_s:
                    break
            os.fsync(file.fileno())
            os.posix_fadvise(file.fileno(), 0, 0, os.POSIX_FADV_DONTNEED)
            yield file
    except OSError as error:
        raise UserError(f"--disk-dir {folder}: cannot be measured ({error.strerror})") from None


def _free_disk_bytes(folder: Path) -> int:
    try:
        found = os.statvfs(folder)
    except OSError as error:
        raise UserError(f"--disk-dir {folder}: {error.strerror}") from None
    return found.f_bavail * found.f_frsize
