"""What this machine can do, measured: each figure within a second or two."""

from __future__ import annotations

import io
import math
import os
import tempfile
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

import torch

from sl_serve.config import DTypeName, ModelConfig
from sl_serve.errors import UserError
from sl_serve.models import load_family
from sl_serve.ops import Ops, choose_ops
from sl_serve.plan.budget import MIB, available_bytes
from sl_serve.plan.hardware import Hardware, MatmulRates
from sl_serve.plan.probe_device import probe_device
from sl_serve.weights.direct_file import BLOCK_BYTES, PIECE_BYTES, Bounce, DirectFile
from sl_serve.weights.disk import N_READERS
from sl_serve.weights.layout import Param

Say = Callable[[str], None]  # hears what is measured next

MATMUL_ROWS = (1, 4, 16, 64, 256, 1024)
# Weights of one sweep: more than caches hold, little enough for a second.
SWEEP_BYTES = 192 * MIB
HOST_BUFFER_BYTES = 512 * MIB
DISK_FILE_BYTES = 512 * MIB
DISK_SECONDS = 2.0  # for writing the file that is then read
MEASURED_SECONDS = 0.4  # per figure, at least two rounds


@dataclass(frozen=True, slots=True)
class Shapes:
    """Of which model, and in what dtypes, products are to be timed."""

    model: ModelConfig
    stored: torch.dtype
    compute: DTypeName


def probe(shapes: Shapes, disk_dir: Path | None, n_threads: int, say: Say) -> Hardware:
    """The machine as a Hardware. Raises UserError when `disk_dir` cannot be used."""
    say("host memory")
    host_read = host_read_bytes_per_s()
    disk_bytes, disk_read = 0, 0.0
    if disk_dir is not None:
        say(f"disk at {disk_dir}")
        disk_bytes, disk_read = _free_disk_bytes(disk_dir), disk_read_bytes_per_s(disk_dir)
    if torch.cuda.is_available():
        say("link and accelerator")
        return probe_device(
            shapes.model,
            shapes.stored,
            host_bytes=available_bytes(),
            disk_bytes=disk_bytes,
            host_read_bytes_per_s=host_read,
            disk_read_bytes_per_s=disk_read,
        )
    ops = choose_ops(shapes.compute, n_threads)
    say("matrix products")
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
        matmul=matmul_rates(ops, shapes),
        cell_overhead_s=call_overhead_s(ops),
    )


def host_read_bytes_per_s() -> float:
    """All threads, from memory that no cache holds."""
    n_bytes = min(HOST_BUFFER_BYTES, available_bytes() // 8)
    values = torch.ones(n_bytes // 4, dtype=torch.float32)
    return values.nbytes / _best_seconds(values.sum)


def matmul_rates(ops: Ops, shapes: Shapes) -> MatmulRates:
    """FLOP/s of one layer's products by rows, over as many distinct layers as SWEEP_BYTES allow;
    very wide matrices are timed over a part of their outputs."""
    params = [p for p in load_family(shapes.model.family).layer_params(shapes.model) if p.is_matrix]
    layer_bytes = sum(p.shape[0] * p.shape[1] for p in params) * shapes.stored.itemsize
    part = min(1.0, SWEEP_BYTES / layer_bytes)
    n_layers = max(1, min(shapes.model.n_layers, int(SWEEP_BYTES / layer_bytes)))
    layers = [[_weight(p, part, shapes.stored) for p in params] for _ in range(n_layers)]
    with torch.inference_mode():
        return MatmulRates(tuple((rows, _rate(ops, layers, rows)) for rows in MATMUL_ROWS))


def _weight(param: Param, part: float, dtype: torch.dtype) -> torch.Tensor:
    n_in, n_out = param.shape
    n_out = max(1, int(n_out * part))
    # Zeros would share one page until they are written, and then be read from cache.
    return torch.full((n_out, n_in), 0.01, dtype=dtype).t()


def _rate(ops: Ops, layers: list[list[torch.Tensor]], rows: int) -> float:
    """Of a layer whose every product is the best of its kind: where threads wait for one another,
    a busy neighbour would spoil each sweep somewhere."""
    inputs = {len(w): torch.ones(rows, len(w), dtype=ops.dtype) for w in layers[0]}
    best_s = [math.inf] * len(layers[0])

    def sweep() -> None:
        for layer in layers:
            for i, w in enumerate(layer):
                start = time.perf_counter()
                ops.linear("probe", inputs[len(w)], w, None)
                best_s[i] = min(best_s[i], time.perf_counter() - start)

    _best_seconds(sweep)
    return 2.0 * rows * sum(w.numel() for w in layers[0]) / sum(best_s)


def call_overhead_s(ops: Ops) -> float:
    """Of a cell: a dozen operations on next to nothing."""
    x, w = torch.ones(2, 16, dtype=ops.dtype), torch.ones(16, 16, dtype=ops.dtype).t()

    def calls() -> None:
        for _ in range(12):
            ops.linear("probe", x, w, None)

    with torch.inference_mode():
        return _best_seconds(calls)


def disk_read_bytes_per_s(folder: Path) -> float:
    """Large direct reads, several in flight, as the disk tier makes them; of a file that is made
    for it and has no name. Raises UserError when it cannot be made."""
    with _file_on(folder) as file, ThreadPoolExecutor(N_READERS) as pool:
        n_bytes = os.fstat(file.fileno()).st_size
        reader = DirectFile.adopt(os.dup(file.fileno()), folder)
        try:
            start = time.perf_counter()
            done = pool.map(lambda i: _read_share(reader, i, n_bytes), range(N_READERS))
            return sum(done) / (time.perf_counter() - start)
        finally:
            reader.close()


def _read_share(reader: DirectFile, index: int, n_bytes: int) -> int:
    """Every N_READERS-th piece, into one buffer."""
    bounce, n_read = Bounce(), 0
    for offset in range(index * PIECE_BYTES, n_bytes, N_READERS * PIECE_BYTES):
        reader.read_into(bounce.address, offset, PIECE_BYTES, bounce)
        n_read += PIECE_BYTES
    return n_read


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


def _best_seconds(act: Callable[[], object]) -> float:
    """The best of some rounds: what other programs take away meanwhile is not the machine's."""
    act()  # touches memory, fills caches of code
    seconds: list[float] = []
    while len(seconds) < 2 or sum(seconds) < MEASURED_SECONDS:
        start = time.perf_counter()
        act()
        seconds.append(time.perf_counter() - start)
    return min(seconds)
