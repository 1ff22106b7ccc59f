"""The header of a GGUF file (versions 2 and 3, little-endian), read as hostile input.

Layout: magic, version, number of tensors, number of settings; the settings; per tensor its name,
sizes, type and offset; padding to the alignment; the data. All counts and offsets come from the
file, so each is compared with what the file can hold before it is used.
"""

from __future__ import annotations

import mmap
import struct
from dataclasses import dataclass
from math import prod
from pathlib import Path
from typing import Any

import gguf
import numpy as np

from sl_serve.errors import CheckpointError
from sl_serve.weights.fields import shown

_MAX_NAME_BYTES = 65535
_MAX_ELEMENTS = 2**48
_STRING, _ARRAY = 8, 9
_SCALARS = {  # value type -> struct format
    0: "<B",
    1: "<b",
    2: "<H",
    3: "<h",
    4: "<I",
    5: "<i",
    6: "<f",
    7: "<?",
    10: "<Q",
    11: "<q",
    12: "<d",
}
_MIN_SETTING_BYTES = 8 + 4 + 1
_MIN_TENSOR_BYTES = 8 + 4 + 8 + 4 + 8


@dataclass(frozen=True, slots=True)
class GgufTensor:
    """Bytes [start, stop) of the file; `shape` as (out, in), the reverse of the file's order."""

    kind: gguf.GGMLQuantizationType
    shape: tuple[int, ...]
    start: int
    stop: int

    def slice(self, i: int) -> GgufTensor:
        """One of those that are stacked in it."""
        one = self.rows(i, i + 1)
        return GgufTensor(self.kind, self.shape[1:], one.start, one.stop)

    def rows(self, first: int, end: int) -> GgufTensor:
        """Those from `first` up to `end`."""
        n_bytes = (self.stop - self.start) // self.shape[0]
        start, stop = self.start + first * n_bytes, self.start + end * n_bytes
        return GgufTensor(self.kind, (end - first, *self.shape[1:]), start, stop)


@dataclass(frozen=True, slots=True)
class GgufHeader:
    settings: dict[str, Any]  # numeric arrays as numpy arrays, arrays of strings as lists
    tensors: dict[str, GgufTensor]


def read_gguf_header(data: mmap.mmap, path: Path) -> GgufHeader:
    """Raises CheckpointError for a file that is truncated or contradicts itself."""
    cursor = _Cursor(data, path)
    if cursor.take(4) != b"GGUF":
        raise CheckpointError(f"{path}: not a GGUF file")
    version = cursor.scalar("<I")
    if version not in (2, 3):
        hint = " (big-endian)" if version > 0xFFFF else ""
        raise CheckpointError(f"{path}: GGUF version {version}{hint}; versions 2 and 3 can be read")
    n_tensors = cursor.count(_MIN_TENSOR_BYTES)
    n_settings = cursor.count(_MIN_SETTING_BYTES)
    settings = _unique((_setting(cursor) for _ in range(n_settings)), "setting", path)
    raw_tensors = _unique((_tensor(cursor) for _ in range(n_tensors)), "tensor", path)
    alignment = settings.get("general.alignment", 32)
    if type(alignment) is not int or not 0 < alignment <= 1 << 20 or alignment & (alignment - 1):
        raise CheckpointError(f"{path}: impossible alignment {shown(alignment)}")
    data_start = -(-cursor.position // alignment) * alignment
    tensors = {
        name: _place(name, raw, data_start, alignment, len(data), path)
        for name, raw in raw_tensors.items()
    }
    _check_overlaps(tensors, path)
    return GgufHeader(settings, tensors)


class _Cursor:
    """Reads forward through the file and never past its end."""

    def __init__(self, data: mmap.mmap, path: Path) -> None:
        self.data = data
        self.path = path
        self.position = 0

    def take(self, n_bytes: int) -> bytes:
        stop = self.position + n_bytes
        if stop > len(self.data):
            raise CheckpointError(f"{self.path}: truncated or damaged at byte {self.position}")
        taken = self.data[self.position : stop]
        self.position = stop
        return taken

    def scalar(self, form: str) -> Any:
        return struct.unpack(form, self.take(struct.calcsize(form)))[0]

    def count(self, min_bytes_each: int) -> int:
        """A number of things to come, refused when the rest of the file cannot hold them."""
        count: int = self.scalar("<Q")
        if count * min_bytes_each > len(self.data) - self.position:
            raise CheckpointError(f"{self.path}: truncated or damaged ({count} entries announced)")
        return count

    def text(self, max_bytes: int | None = None) -> str:
        n_bytes = self.count(1)
        if max_bytes is not None and n_bytes > max_bytes:
            raise CheckpointError(f"{self.path}: a name of {n_bytes} bytes")
        return self._decoded(self.take(n_bytes))

    def _decoded(self, raw: bytes) -> str:
        try:
            return raw.decode()
        except UnicodeDecodeError:
            raise CheckpointError(f"{self.path}: a text that is not UTF-8: {raw[:40]!r}") from None

    def texts(self, count: int) -> list[str]:
        """As `text`, many times: written out, since token lists have 100,000 and more."""
        data, position, size = self.data, self.position, len(self.data)
        unpack = struct.Struct("<Q").unpack_from
        found = []
        for _ in range(count):
            start = position + 8
            stop = start + unpack(data, position)[0] if start <= size else size + 1
            if stop > size:
                raise CheckpointError(f"{self.path}: truncated or damaged at byte {position}")
            found.append(self._decoded(data[start:stop]))
            position = stop
        self.position = position
        return found

    def value(self) -> Any:
        kind = self.scalar("<I")
        if kind == _ARRAY:
            return self._array()
        if kind == _STRING:
            return self.text()
        return self.scalar(self._form(kind))

    def _array(self) -> list[str] | np.ndarray[Any, Any]:
        kind = self.scalar("<I")
        if kind == _STRING:
            return self.texts(self.count(8))
        form = self._form(kind)
        n_bytes = self.count(struct.calcsize(form)) * struct.calcsize(form)
        return np.frombuffer(self.take(n_bytes), dtype=np.dtype(form))

    def _form(self, kind: int) -> str:
        if kind not in _SCALARS:
            what = "an array of arrays" if kind == _ARRAY else f"value type {kind}"
            raise CheckpointError(f"{self.path}: {what} at byte {self.position} cannot be read")
        return _SCALARS[kind]


def _setting(cursor: _Cursor) -> tuple[str, Any]:
    return cursor.text(_MAX_NAME_BYTES), cursor.value()


def _tensor(cursor: _Cursor) -> tuple[str, tuple[list[int], int, int]]:
    """Name and (sizes in the file's order, type, offset in the data)."""
    name = cursor.text(_MAX_NAME_BYTES)
    n_dims = cursor.scalar("<I")
    if not 1 <= n_dims <= 4:
        raise CheckpointError(f"{cursor.path}: tensor {name[:120]!r} has {n_dims} dimensions")
    sizes = [cursor.scalar("<Q") for _ in range(n_dims)]
    return name, (sizes, cursor.scalar("<I"), cursor.scalar("<Q"))


def _unique(pairs: Any, what: str, path: Path) -> dict[str, Any]:
    found: dict[str, Any] = {}
    for name, value in pairs:
        if name in found:
            raise CheckpointError(f"{path}: {what} {name[:120]!r} is there twice")
        found[name] = value
    return found


def _place(
    name: str,
    raw: tuple[list[int], int, int],
    data_start: int,
    alignment: int,
    file_bytes: int,
    path: Path,
) -> GgufTensor:
    sizes, kind_number, offset = raw
    where = f"{path}: tensor {name[:120]!r}"
    if kind_number not in gguf.GGML_QUANT_SIZES:
        raise CheckpointError(f"{where} is of unknown type {kind_number}")
    kind = gguf.GGMLQuantizationType(kind_number)
    block_elements, block_bytes = gguf.GGML_QUANT_SIZES[kind]
    if prod(sizes) > _MAX_ELEMENTS or min(sizes) < 1 or sizes[0] % block_elements:
        raise CheckpointError(f"{where} has the impossible sizes {sizes} for {kind.name}")
    start = data_start + offset
    stop = start + prod(sizes) // block_elements * block_bytes
    if offset % alignment or stop > file_bytes:
        raise CheckpointError(
            f"{where} ends at byte {stop} of {file_bytes}: truncated or damaged; fetch it again"
        )
    return GgufTensor(kind, tuple(reversed(sizes)), start, stop)


def _check_overlaps(tensors: dict[str, GgufTensor], path: Path) -> None:
    end = 0
    for name, tensor in sorted(tensors.items(), key=lambda item: item[1].start):
        if tensor.start < end:
            raise CheckpointError(f"{path}: tensor {name[:120]!r} overlaps another")
        end = tensor.stop
