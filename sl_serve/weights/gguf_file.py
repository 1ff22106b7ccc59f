"""A GGUF file, or the parts of one, as a checkpoint under Hugging Face names: tensors dequantised
to float32, or rows in the file's own blocks."""

from __future__ import annotations

from collections.abc import Collection
from dataclasses import replace
from pathlib import Path
from typing import Any

import gguf
import numpy as np
import torch

from sl_serve.errors import CheckpointError
from sl_serve.models import load_family
from sl_serve.tokenizer import Tokenizer
from sl_serve.weights.fields import Fields
from sl_serve.weights.file_range import FileRange
from sl_serve.weights.formats import BLOCK_FORMATS, Format, plain
from sl_serve.weights.gguf_config import config_fields, find_dialect
from sl_serve.weights.gguf_header import GgufTensor
from sl_serve.weights.gguf_names import Place, stored_names
from sl_serve.weights.gguf_numbers import layer_numbers
from sl_serve.weights.gguf_parts import Array, GgufPart, open_parts
from sl_serve.weights.gguf_rope import ROPE_TENSORS
from sl_serve.weights.gguf_tokenizer import load_gguf_tokenizer

_PLAIN = {
    gguf.GGMLQuantizationType.F32: torch.float32,
    gguf.GGMLQuantizationType.F16: torch.float16,
    gguf.GGMLQuantizationType.BF16: torch.bfloat16,
}


class GgufCheckpoint:
    """Checkpoint over files that stay mapped until `close`. `fields`: what config.json would say
    of it; `numbers`: tensors that are among its settings."""

    def __init__(self, path: Path) -> None:
        self.path = path
        self._parts = open_parts(path)
        stored = {name: part for part in self._parts for name in part.tensors}
        tensors = {name: part.tensors[name] for name, part in stored.items()}
        factors = {
            name: stored[name].dequantised(tensors[name]) for name in ROPE_TENSORS & stored.keys()
        }
        self._settings = self._parts[0].settings
        general = Fields(self._settings, str(path))
        architecture = general.text("general.architecture")
        family, self._dialect = find_dialect(architecture, self._settings, tensors.keys(), path)
        self.fields = config_fields(family, self._dialect, self._settings, tensors, factors, path)
        no_more = Fields({}, str(path))  # a generation_config.json has no counterpart
        self.config = load_family(family).model_config(Fields(self.fields, str(path)), no_more)
        self.splits = self._dialect.splits
        places = stored_names(self.config, self._dialect, stored.keys(), path)
        self._tensors = {
            name: (stored[place.name], self._at(tensors[place.name], place))
            for name, place in places.items()
        }
        self.numbers = layer_numbers(self._dialect, self._settings, self.config.n_layers, path)

    def names(self) -> Collection[str]:
        return self._tensors.keys()

    def shape(self, name: str) -> tuple[int, ...]:
        return self._find(name)[1].shape

    def read(self, name: str) -> torch.Tensor:
        """A fresh float32 tensor."""
        part, tensor = self._find(name)
        found = self._in_order(name, part.dequantised(tensor))
        return found - self._dialect.norm_offset if name.endswith("norm.weight") else found

    def format(self, name: str) -> Format:
        kind = self._find(name)[1].kind
        if kind in _PLAIN:
            return plain(_PLAIN[kind])
        return BLOCK_FORMATS.get(kind.name.lower(), plain(torch.float32))

    def read_blocks(self, name: str) -> torch.Tensor:
        part, tensor = self._find(name)
        return self._in_order(name, part.rows(tensor))

    def location(self, name: str) -> FileRange | None:
        return None  # quantised, or rows in another order

    def drop_pages(self) -> None:
        for part in self._parts:
            part.drop_pages()

    def load_tokenizer(self) -> Tokenizer:
        return load_gguf_tokenizer(self._settings, self.config, str(self.path))

    def close(self) -> None:
        for part in self._parts:
            part.close()

    def _at(self, tensor: GgufTensor, place: Place) -> GgufTensor:
        if place.is_row and len(tensor.shape) == 1:  # files need not have sizes of one
            return replace(tensor, shape=(1, *tensor.shape))
        if place.rows is not None:
            n_rows = self.config.q_size + 2 * self.config.kv_size
            if tensor.shape[0] != n_rows:
                raise CheckpointError(
                    f"{self.path}: tensor {place.name} has {tensor.shape[0]} rows, not {n_rows}"
                )
            return tensor.rows(*place.rows)
        if place.expert is None:
            return tensor
        if len(tensor.shape) < 2 or tensor.shape[0] != self.config.n_experts:
            raise CheckpointError(
                f"{self.path}: tensor {place.name} has shape {tensor.shape}, not that of "
                f"{self.config.n_experts} experts"
            )
        return tensor.slice(place.expert)

    def _find(self, name: str) -> tuple[GgufPart, GgufTensor]:
        if name not in self._tensors:
            raise CheckpointError(f"{self.path}: no tensor {name}")
        return self._tensors[name]

    def _in_order(self, name: str, array: Array) -> torch.Tensor:
        """A tensor of its own, rows in Hugging Face's order."""
        module = name.rpartition(".")[0].rpartition(".")[2]
        if module in self._dialect.rows:
            try:
                rows = self._dialect.rows[module](self.config, len(array))
            except ValueError:
                raise CheckpointError(
                    f"{self.path}: {name} has {len(array)} rows, which are not those of heads of "
                    f"{self.config.head_dim}"
                ) from None
            array = array[rows]
        return torch.from_numpy(np.require(array, requirements=["C", "W"]))


def hf_settings(path: Path) -> dict[str, Any]:
    """What a GGUF file's config.json would say."""
    checkpoint = GgufCheckpoint(path)
    checkpoint.close()
    return checkpoint.fields
