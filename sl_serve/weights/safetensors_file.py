"""One safetensors file, read as hostile input.

Layout: 8 bytes little-endian header length, the header (a JSON object), then the data. Each entry
of the header gives dtype, shape and [start, stop) in the data; together the entries cover the data
exactly, without holes or overlaps.
"""

from __future__ import annotations

import mmap
import sys
from collections.abc import Mapping
from dataclasses import dataclass
from math import prod
from pathlib import Path
from typing import Any

import torch

from sl_serve.errors import CheckpointError
from sl_serve.weights.fields import parse_json_object, shown

_MAX_HEADER_BYTES = 100_000_000  # as the safetensors package
_MAX_ELEMENTS = 2**48
_MAX_DIMS = 8
_MAP_NORESERVE = 0x4000 if sys.platform == "linux" else 0  # not yet named in Python 3.11's mmap

_DTYPES = {
    "F64": torch.float64,
    "F32": torch.float32,
    "F16": torch.float16,
    "BF16": torch.bfloat16,
    "F8_E4M3": torch.float8_e4m3fn,
    "F8_E5M2": torch.float8_e5m2,
    "I64": torch.int64,
    "I32": torch.int32,
    "I16": torch.int16,
    "I8": torch.int8,
    "U8": torch.uint8,
    "BOOL": torch.bool,
}


@dataclass(frozen=True, slots=True)
class TensorEntry:
    """Where a tensor lies: bytes [start, stop) of the file."""

    dtype: torch.dtype
    shape: tuple[int, ...]
    start: int
    stop: int


class SafetensorsFile:
    """Maps the file; `read` gives tensors over the mapping. The header is checked on opening."""

    def __init__(self, path: Path) -> None:
        self.path = path
        try:
            with path.open("rb") as file:
                self.entries: Mapping[str, TensorEntry] = _read_header(file, path)
                self._mapping: mmap.mmap | None = _map_private(file.fileno())
        except OSError as error:
            raise CheckpointError(f"{path}: cannot be read ({error.strerror})") from None

    def read(self, name: str) -> torch.Tensor:
        """The tensor in its stored dtype, over the mapped file: it must not be written to.

        Raises CheckpointError when there is no such tensor."""
        assert self._mapping is not None, "read after close"
        entry = self.entries.get(name)
        if entry is None:
            raise CheckpointError(f"{self.path}: no tensor {name}")
        if entry.start == entry.stop:
            return torch.empty(entry.shape, dtype=entry.dtype)
        source: mmap.mmap | bytearray = self._mapping
        start = entry.start
        if start % entry.dtype.itemsize:  # legal, though no writer is known to do it
            source, start = bytearray(self._mapping[entry.start : entry.stop]), 0
        count = prod(entry.shape)
        flat = torch.frombuffer(source, dtype=entry.dtype, count=count, offset=start)
        return flat.reshape(entry.shape)

    def drop_pages(self) -> None:
        """Pages brought in by reading leave this process; the kernel may keep them cached."""
        if self._mapping is not None and hasattr(mmap, "MADV_DONTNEED"):
            self._mapping.madvise(mmap.MADV_DONTNEED)

    def close(self) -> None:
        """Lets go of the mapping; it ends when the last tensor over it does."""
        self._mapping = None


def _map_private(descriptor: int) -> mmap.mmap:
    """Writable, since torch knows no read-only tensors, but a write never reaches the file.

    Without swap reserved for it: such a file may be larger than memory."""
    flags = mmap.MAP_PRIVATE | _MAP_NORESERVE
    return mmap.mmap(descriptor, 0, flags=flags, prot=mmap.PROT_READ | mmap.PROT_WRITE)


def _read_header(file: Any, path: Path) -> dict[str, TensorEntry]:
    file_bytes = path.stat().st_size
    prefix = file.read(8)
    header_bytes = int.from_bytes(prefix, "little")
    if len(prefix) < 8 or header_bytes > file_bytes - 8:
        raise CheckpointError(f"{path}: truncated ({file_bytes} bytes, the header does not fit)")
    if header_bytes > _MAX_HEADER_BYTES:
        raise CheckpointError(f"{path}: header of {header_bytes} bytes, over {_MAX_HEADER_BYTES}")
    header = parse_json_object(file.read(header_bytes), f"{path}: header")
    _check_metadata(header.pop("__metadata__", {}), path)
    data_start = 8 + header_bytes
    entries = {name: _entry(name, raw, data_start, path) for name, raw in header.items()}
    _check_coverage(entries, data_start, file_bytes, path)
    return entries


def _check_metadata(metadata: object, path: Path) -> None:
    if not isinstance(metadata, dict) or not all(isinstance(v, str) for v in metadata.values()):
        raise CheckpointError(f"{path}: __metadata__ must map strings to strings")


def _entry(name: str, raw: Any, data_start: int, path: Path) -> TensorEntry:
    """One entry, its sizes consistent with each other. Not yet compared with the file's length."""
    where = f"{path}: tensor {name[:120]!r}"
    if not isinstance(raw, dict) or raw.keys() != {"dtype", "shape", "data_offsets"}:
        raise CheckpointError(f"{where}: needs exactly dtype, shape and data_offsets")
    dtype = _DTYPES.get(raw["dtype"]) if isinstance(raw["dtype"], str) else None
    if dtype is None:
        raise CheckpointError(f"{where}: unknown dtype {shown(raw['dtype'])}")
    shape, offsets = raw["shape"], raw["data_offsets"]
    if not _is_shape(shape):
        raise CheckpointError(f"{where}: impossible shape {shown(shape)}")
    if not _are_sizes(offsets) or len(offsets) != 2 or offsets[0] > offsets[1]:
        raise CheckpointError(f"{where}: impossible offsets {shown(offsets)}")
    start, stop = offsets
    if stop - start != prod(shape) * dtype.itemsize:
        raise CheckpointError(f"{where}: {stop - start} bytes do not hold {raw['dtype']} {shape}")
    return TensorEntry(dtype, tuple(shape), data_start + start, data_start + stop)


def _is_shape(value: Any) -> bool:
    """Not more elements than an offset counts, the empty ones of a zero beside other sizes too."""
    few = isinstance(value, list) and len(value) <= _MAX_DIMS
    return few and _are_sizes(value) and prod(max(1, size) for size in value) <= _MAX_ELEMENTS


def _are_sizes(value: object) -> bool:
    return isinstance(value, list) and all(type(item) is int and item >= 0 for item in value)


def _check_coverage(
    entries: Mapping[str, TensorEntry], data_start: int, file_bytes: int, path: Path
) -> None:
    """Sorted, each tensor starts where the one before stops, and the last one ends the file."""
    position = data_start
    for name, entry in sorted(entries.items(), key=lambda item: (item[1].start, item[1].stop)):
        if entry.start != position:
            problem = "overlaps another" if entry.start < position else "leaves a hole before it"
            raise CheckpointError(f"{path}: tensor {name[:120]!r} {problem}")
        position = entry.stop
    if position > file_bytes:
        raise CheckpointError(
            f"{path}: truncated ({file_bytes} bytes of {position}); fetch it again"
        )
    if position < file_bytes:
        raise CheckpointError(f"{path}: {file_bytes - position} bytes belong to no tensor")
