"""A Hugging Face model folder: config.json, safetensors shards, tokenizer files.

Nothing in the folder is ever executed: `auto_map` is ignored and pickled weights are refused.
"""

from __future__ import annotations

from collections.abc import Collection, Mapping
from pathlib import Path
from typing import Any

import torch

from sl_serve.config import ModelConfig
from sl_serve.errors import CheckpointError, ModelError
from sl_serve.models import load_family
from sl_serve.tokenizer import Tokenizer
from sl_serve.weights.fields import read_json_object, shown
from sl_serve.weights.file_range import FileRange
from sl_serve.weights.formats import Format, plain
from sl_serve.weights.hf_config import model_config_from_hf
from sl_serve.weights.hf_tokenizer import load_hf_tokenizer
from sl_serve.weights.safetensors_file import SafetensorsFile

_PICKLE_SUFFIXES = {".bin", ".pt", ".pth", ".ckpt", ".pkl"}
_COMPUTED_WITH = {torch.float32, torch.float16, torch.bfloat16}
_FLOATS = {torch.float64, torch.float32, torch.float16, torch.bfloat16}


class HfFolder:
    """Checkpoint over safetensors shards. All headers are checked on opening; no data is read."""

    def __init__(self, path: Path) -> None:
        self.path = path
        self.config = read_model_config(path)
        self._tensors = _with_full_names(_open_shards(path), _start_of_names(self.config))

    def names(self) -> Collection[str]:
        return self._tensors.keys()

    def shape(self, name: str) -> tuple[int, ...]:
        file, stored_name = self._find(name)
        return file.entries[stored_name].shape

    def read(self, name: str) -> torch.Tensor:
        """In the stored dtype, over the mapped file: it must not be written to."""
        tensor = self.read_stored(name)
        if tensor.dtype not in _FLOATS:
            raise ModelError(f"{self.path}: {name} is stored as {tensor.dtype}, not as a float")
        return tensor

    def read_stored(self, name: str) -> torch.Tensor:
        """Of any dtype, over the mapped file."""
        file, stored_name = self._find(name)
        return file.read(stored_name)

    def format(self, name: str) -> Format:
        file, stored_name = self._find(name)
        dtype = file.entries[stored_name].dtype
        return plain(dtype if dtype in _COMPUTED_WITH else torch.float32)

    def read_blocks(self, name: str) -> torch.Tensor:
        raise AssertionError("safetensors files hold plain numbers")

    def location(self, name: str) -> FileRange | None:
        file, stored_name = self._find(name)
        entry = file.entries[stored_name]
        return FileRange(file.path, entry.start, entry.stop - entry.start, entry.dtype)

    def drop_pages(self) -> None:
        for file in self._files:
            file.drop_pages()

    def load_tokenizer(self) -> Tokenizer:
        return load_hf_tokenizer(self.path, self.config)

    def close(self) -> None:
        for file in self._files:
            file.close()

    @property
    def _files(self) -> set[SafetensorsFile]:
        return {file for file, _ in self._tensors.values()}

    def _find(self, name: str) -> tuple[SafetensorsFile, str]:
        if name not in self._tensors:
            raise CheckpointError(f"{self.path}: no tensor {name}")
        return self._tensors[name]


def read_model_config(folder: Path) -> ModelConfig:
    generation_path = folder / "generation_config.json"
    generation = read_json_object(generation_path) if generation_path.is_file() else {}
    config_path = folder / "config.json"
    return model_config_from_hf(read_json_object(config_path), generation, str(config_path))


def _start_of_names(config: ModelConfig) -> str:
    """What starts all names but the head's."""
    embedding, _ = load_family(config.family).static_tensors(config)["embed"]
    return embedding.split(".")[0] + "."


def _with_full_names(
    files: Mapping[str, SafetensorsFile], start: str
) -> dict[str, tuple[SafetensorsFile, str]]:
    """Name -> file and name there. Exports of a model without its head, among them early ones of
    OPT, leave out the `start`."""
    bare = not any(name.startswith(start) for name in files)
    return {
        start + name if bare and not name.startswith("lm_head.") else name: (file, name)
        for name, file in files.items()
    }


def _open_shards(folder: Path) -> dict[str, SafetensorsFile]:
    """Tensor name -> the open file that holds it."""
    index_path = folder / "model.safetensors.index.json"
    if index_path.is_file():
        shards = _shards_of(read_json_object(index_path), index_path)
        files = {shard: SafetensorsFile(folder / shard) for shard in sorted(set(shards.values()))}
        for name, shard in shards.items():
            if name not in files[shard].entries:
                raise CheckpointError(
                    f"{folder / shard}: no tensor {name[:120]!r}, which the index promises"
                )
        return {name: files[shard] for name, shard in shards.items()}
    single_path = folder / "model.safetensors"
    if single_path.is_file():
        file = SafetensorsFile(single_path)
        return dict.fromkeys(file.entries, file)
    raise ModelError(_why_no_weights(folder))


def _shards_of(index: Mapping[str, Any], index_path: Path) -> dict[str, str]:
    """The index's tensor name -> file name; every file must lie in the folder itself."""
    shards = index.get("weight_map")
    if not isinstance(shards, dict) or not shards:
        raise CheckpointError(f"{index_path}: needs a weight_map of tensor names to file names")
    for shard in shards.values():
        if not isinstance(shard, str) or not _is_plain(shard):
            raise CheckpointError(f"{index_path}: {shown(shard)} is not a file name of this folder")
    return shards


def _is_plain(name: str) -> bool:
    plain = name == Path(name).name and "\\" not in name and name.isprintable()
    return plain and name.endswith(".safetensors")


def _why_no_weights(folder: Path) -> str:
    files = sorted(path.name for path in folder.iterdir())
    pickled = [name for name in files if Path(name).suffix in _PICKLE_SUFFIXES]
    if pickled:
        return (
            f"{folder}: weights only as {pickled[0]}, a pickle file, which can run code when it is "
            "read; convert them to safetensors"
        )
    return f"{folder}: neither model.safetensors nor model.safetensors.index.json"
