"""Random weights of a model's shape: for measuring what takes no weights to be measured.

One tile of normal numbers serves all matrices: each is a window of it, its rows overlapping, so
reading makes nothing and loading runs at the speed of a copy, however large the model.
"""

from __future__ import annotations

import os
import zlib
from collections.abc import Collection
from pathlib import Path

import torch

from sl_serve.config import DTypeName, ModelConfig
from sl_serve.errors import CheckpointError, ModelError
from sl_serve.models import load_family
from sl_serve.tokenizer import Tokenizer
from sl_serve.weights.dummy_tokenizer import dummy_tokenizer
from sl_serve.weights.file_range import FileRange
from sl_serve.weights.formats import Format, plain
from sl_serve.weights.hf_config import model_config_from_hf
from sl_serve.weights.hf_folder import read_model_config
from sl_serve.weights.hf_tokenizer import has_hf_tokenizer, load_hf_tokenizer
from sl_serve.weights.host import expected_shapes
from sl_serve.weights.shapes import SHAPES

TILE_ELEMENTS = 1 << 23
_SEED = 20240229
_DTYPES: dict[DTypeName, torch.dtype] = {
    "float32": torch.float32,
    "bfloat16": torch.bfloat16,
    "float16": torch.float16,
}


def open_dummy(model: str) -> DummyCheckpoint:
    """A folder with config.json, or the name of a shape. Raises ModelError for anything else."""
    folder = Path(os.path.expanduser(model))
    if os.path.isfile(folder / "config.json"):  # unlike Path's, false for a name too long
        return DummyCheckpoint(folder, read_model_config(folder))
    if model in SHAPES:
        return DummyCheckpoint(folder, model_config_from_hf(SHAPES[model], {}, model))
    raise ModelError(
        f"{model[:200]}: random weights need a folder with config.json, or one of these names: "
        + ", ".join(SHAPES)
    )


class DummyCheckpoint:
    """The same weights for the same name and shape every time, in the dtype that the settings
    name. Matrices have a standard deviation of 1/sqrt(in), so activations keep their size; norms
    are ones, biases zeros."""

    def __init__(self, path: Path, config: ModelConfig) -> None:
        self.path = path
        self.config = config
        family = load_family(config.family)
        self._shapes = expected_shapes(family.layer_params(config), config.n_layers)
        self._shapes |= dict(family.static_tensors(config).values())
        self._dtype = _DTYPES[config.dtype]
        self._tiles: dict[int, torch.Tensor] = {}  # by number of inputs; there are two or three

    def names(self) -> Collection[str]:
        return self._shapes.keys()

    def shape(self, name: str) -> tuple[int, ...]:
        if name not in self._shapes:
            raise CheckpointError(f"{self.path}: no tensor {name}")
        return self._shapes[name]

    def read(self, name: str) -> torch.Tensor:
        """A view: rows of matrices overlap, elements of vectors are one and the same."""
        shape = self.shape(name)
        if len(shape) < 2:
            value = 0.0 if name.endswith(".bias") else 1.0
            return torch.full((), value, dtype=self._dtype).expand(shape)
        n_rows, n_in = shape
        tile = self._tile(n_in)
        slack = tile.numel() - n_in
        row_stride = slack // 2 // n_rows
        start = zlib.crc32(name.encode()) % (slack - row_stride * n_rows + 1)
        return tile.as_strided(shape, (row_stride, 1), start)

    def format(self, name: str) -> Format:
        return plain(self._dtype)

    def read_blocks(self, name: str) -> torch.Tensor:
        raise AssertionError("random weights are plain numbers")

    def location(self, name: str) -> FileRange | None:
        return None

    def drop_pages(self) -> None:
        pass

    def load_tokenizer(self) -> Tokenizer:
        if has_hf_tokenizer(self.path):
            return load_hf_tokenizer(self.path, self.config)
        return dummy_tokenizer(self.config)

    def close(self) -> None:
        self._tiles.clear()

    def _tile(self, n_in: int) -> torch.Tensor:
        """Threads that meet here make the same tile twice, and no harm is done."""
        tile = self._tiles.get(n_in)
        if tile is None:
            random = torch.Generator().manual_seed(_SEED)
            numbers = torch.randn(max(TILE_ELEMENTS, 2 * n_in), generator=random)
            tile = self._tiles[n_in] = numbers.mul_(n_in**-0.5).to(self._dtype)
        return tile
