"""The one file of a GGUF model, or the several that it is split into, mapped."""

from __future__ import annotations

import math
import mmap
import re
from pathlib import Path
from typing import Any

import gguf
import numpy as np

from sl_serve.errors import CheckpointError, ModelError
from sl_serve.weights.fields import Fields
from sl_serve.weights.gguf_header import GgufTensor, read_gguf_header

Array = np.ndarray[Any, Any]

_PART = re.compile(r"(.+)-(\d{5})-of-(\d{5})\.gguf")
_MAX_PARTS = 1000


class GgufPart:
    """One file, mapped until `close`."""

    def __init__(self, path: Path) -> None:
        self.path = path
        self._mapping: mmap.mmap | None = _map(path)
        header = read_gguf_header(self._mapping, path)
        self.settings, self.tensors = header.settings, header.tensors
        _check_kinds(self.tensors, path)

    def rows(self, tensor: GgufTensor) -> Array:
        """(n_rows, row_bytes) uint8, over the mapped file."""
        assert self._mapping is not None, "read after close"
        n_bytes = tensor.stop - tensor.start
        raw = np.frombuffer(self._mapping, np.uint8, count=n_bytes, offset=tensor.start)
        return raw.reshape(math.prod(tensor.shape[:-1]), -1)

    def dequantised(self, tensor: GgufTensor) -> Array:
        # Any bits may stand for a number: infinite ones times zero are what they are, not news.
        with np.errstate(invalid="ignore", over="ignore"):
            array: Array = gguf.dequantize(self.rows(tensor), tensor.kind)
        return array.reshape(tensor.shape)

    def drop_pages(self) -> None:
        if self._mapping is not None and hasattr(mmap, "MADV_DONTNEED"):
            self._mapping.madvise(mmap.MADV_DONTNEED)

    def close(self) -> None:
        self._mapping = None


def open_parts(path: Path) -> list[GgufPart]:
    """All parts of a split model, from the first one's path: it alone has the settings. Raises
    CheckpointError for one that is missing or belongs to another model."""
    first = GgufPart(path)
    split = Fields(first.settings, str(path), prefix="split.")
    n_parts = split.integer("count", 1, low=0, high=_MAX_PARTS)
    if n_parts <= 1:
        return [first]
    if number := split.integer("no", low=0):
        raise ModelError(f"{path}: part {number + 1} of {n_parts}; give the first one's path")
    others = [_part(_path_of(path, i, n_parts), i, n_parts) for i in range(1, n_parts)]
    parts = [first, *others]
    n_tensors = split.integer("tensors.count", low=0)
    names = {name for part in parts for name in part.tensors}
    if len(names) != n_tensors or sum(len(part.tensors) for part in parts) != n_tensors:
        raise CheckpointError(
            f"{path}: its parts have {len(names)} different tensors, not {n_tensors}; one of them "
            "belongs to another model"
        )
    return parts


def _path_of(first: Path, i: int, n_parts: int) -> Path:
    match = _PART.fullmatch(first.name)
    if match is None or (int(match[2]), int(match[3])) != (1, n_parts):
        raise ModelError(
            f"{first}: the first of {n_parts} parts must be called "
            f"NAME-00001-of-{n_parts:05}.gguf, for the others to be found beside it"
        )
    return first.with_name(f"{match[1]}-{i + 1:05}-of-{n_parts:05}.gguf")


def _part(path: Path, i: int, n_parts: int) -> GgufPart:
    if not path.is_file():
        raise CheckpointError(f"{path}: this part is missing; fetch all {n_parts} into one folder")
    part = GgufPart(path)
    split = Fields(part.settings, str(path), prefix="split.")
    if split.integer("no", low=0) != i or split.integer("count") != n_parts:
        raise CheckpointError(f"{path}: not part {i + 1} of {n_parts}; it belongs to another model")
    return part


def _map(path: Path) -> mmap.mmap:
    try:
        with path.open("rb") as file:
            return mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ)
    except ValueError:
        raise CheckpointError(f"{path}: the file is empty") from None
    except OSError as error:
        raise CheckpointError(f"{path}: cannot be read ({error.strerror})") from None


def _check_kinds(tensors: dict[str, GgufTensor], path: Path) -> None:
    """Every type in the file must be one that can be dequantised: tried on a block of zeros."""
    for kind in {tensor.kind for tensor in tensors.values()}:
        block_bytes = gguf.GGML_QUANT_SIZES[kind][1]
        try:
            gguf.dequantize(np.zeros((1, block_bytes), np.uint8), kind)
        except NotImplementedError:
            raise ModelError(f"{path}: tensors of type {kind.name} cannot be read") from None
