"""A GGUF file as a checkpoint, under Hugging Face names: tensors dequantised to float32, or rows in
the file's own blocks."""

from __future__ import annotations

import math
import mmap
from collections.abc import Collection
from pathlib import Path
from typing import Any

import gguf
import numpy as np
import torch

from sl_serve.errors import CheckpointError, ModelError
from sl_serve.tokenizer import Tokenizer
from sl_serve.weights.file_range import FileRange
from sl_serve.weights.formats import BLOCK_FORMATS, Format, plain
from sl_serve.weights.gguf_config import (
    ROPE_FACTORS,
    hugging_face_names,
    model_config_from_gguf,
)
from sl_serve.weights.gguf_header import GgufTensor, read_gguf_header
from sl_serve.weights.gguf_tokenizer import load_gguf_tokenizer

_Array = np.ndarray[Any, Any]
_PLAIN = {
    gguf.GGMLQuantizationType.F32: torch.float32,
    gguf.GGMLQuantizationType.F16: torch.float16,
    gguf.GGMLQuantizationType.BF16: torch.bfloat16,
}


class GgufCheckpoint:
    """Checkpoint over one GGUF file, which stays mapped until `close`."""

    def __init__(self, path: Path) -> None:
        self.path = path
        self._mapping: mmap.mmap | None = _map(path)
        self._header = read_gguf_header(self._mapping, path)
        _check_kinds(self._header.tensors, path)
        factors = self._header.tensors.get(ROPE_FACTORS)
        self.config = model_config_from_gguf(
            self._header, None if factors is None else self._dequantised(factors), path
        )
        self._names = hugging_face_names(self._header, path)

    def names(self) -> Collection[str]:
        return self._names.keys()

    def shape(self, name: str) -> tuple[int, ...]:
        return self._tensor(name).shape

    def read(self, name: str) -> torch.Tensor:
        """A fresh float32 tensor."""
        return self._in_order(name, self._dequantised(self._tensor(name)))

    def format(self, name: str) -> Format:
        kind = self._tensor(name).kind
        if kind in _PLAIN:
            return plain(_PLAIN[kind])
        return BLOCK_FORMATS.get(kind.name.lower(), plain(torch.float32))

    def read_blocks(self, name: str) -> torch.Tensor:
        return self._in_order(name, self._rows(self._tensor(name)))

    def location(self, name: str) -> FileRange | None:
        return None  # quantised, or rows in another order

    def drop_pages(self) -> None:
        if self._mapping is not None and hasattr(mmap, "MADV_DONTNEED"):
            self._mapping.madvise(mmap.MADV_DONTNEED)

    def load_tokenizer(self) -> Tokenizer:
        return load_gguf_tokenizer(self._header.settings, self.config, str(self.path))

    def close(self) -> None:
        self._mapping = None

    def _tensor(self, name: str) -> GgufTensor:
        if name not in self._names:
            raise CheckpointError(f"{self.path}: no tensor {name}")
        return self._header.tensors[self._names[name]]

    def _in_order(self, name: str, array: _Array) -> torch.Tensor:
        """A tensor of its own, rows in Hugging Face's order."""
        if name.endswith(("q_proj.weight", "q_proj.bias")):
            array = self._unpermuted(name, array, self.config.n_heads)
        elif name.endswith(("k_proj.weight", "k_proj.bias")):
            array = self._unpermuted(name, array, self.config.n_kv_heads)
        return torch.from_numpy(np.require(array, requirements=["C", "W"]))

    def _unpermuted(self, name: str, array: _Array, n_heads: int) -> _Array:
        """GGUF stores the rows of a llama's q and k for rotating neighbours (2i, 2i + 1); here, as
        in Hugging Face's, i and i + head_dim / 2 turn together."""
        n_rows = n_heads * self.config.head_dim
        if array.shape[0] != n_rows:
            raise CheckpointError(f"{self.path}: {name} has {array.shape[0]} rows, not {n_rows}")
        pairs = array.reshape(n_heads, -1, 2, *array.shape[1:])
        return pairs.swapaxes(1, 2).reshape(array.shape)

    def _dequantised(self, tensor: GgufTensor) -> _Array:
        # Any bits may stand for a number: infinite ones times zero are what they are, not news.
        with np.errstate(invalid="ignore", over="ignore"):
            array: _Array = gguf.dequantize(self._rows(tensor), tensor.kind)
        return array.reshape(tensor.shape)

    def _rows(self, tensor: GgufTensor) -> _Array:
        """(n_rows, row_bytes) uint8, over the mapped file."""
        assert self._mapping is not None, "read after close"
        n_bytes = tensor.stop - tensor.start
        raw = np.frombuffer(self._mapping, np.uint8, count=n_bytes, offset=tensor.start)
        return raw.reshape(math.prod(tensor.shape[:-1]), -1)


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
