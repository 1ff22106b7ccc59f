"""A model on disk, whatever its format: settings, tensors by Hugging Face name, tokenizer."""

from __future__ import annotations

from collections.abc import Collection, Mapping
from pathlib import Path
from typing import Protocol

import torch

from sl_serve.config import ModelConfig
from sl_serve.errors import CheckpointError, ModelError
from sl_serve.tokenizer import Tokenizer
from sl_serve.weights.file_range import FileRange
from sl_serve.weights.formats import Format
from sl_serve.weights.gguf_file import GgufCheckpoint
from sl_serve.weights.gguf_joined import with_splits_joined
from sl_serve.weights.gguf_numbers import with_numbers
from sl_serve.weights.hf_folder import HfFolder
from sl_serve.weights.published import open_published
from sl_serve.weights.stacked import with_experts_apart


class Checkpoint(Protocol):
    """An opened model. Its headers are checked; data is read tensor by tensor."""

    path: Path
    config: ModelConfig

    def names(self) -> Collection[str]:
        """Hugging Face names, e.g. model.layers.0.self_attn.q_proj.weight."""
        ...

    def shape(self, name: str) -> tuple[int, ...]:
        """In elements; matrices as (out, in). Raises CheckpointError for an unknown name."""
        ...

    def read(self, name: str) -> torch.Tensor:
        """A CPU tensor of that shape, to be copied from and not written to: in the stored float
        dtype from safetensors, float32 from whatever is quantised. Safe to call from several
        threads."""
        ...

    def format(self, name: str) -> Format:
        """What its rows may be held in without loss: as the file has them, if we compute so."""
        ...

    def read_blocks(self, name: str) -> torch.Tensor:
        """Rows of a matrix whose `format` has blocks, uint8 (out, row_bytes), to be copied from."""
        ...

    def location(self, name: str) -> FileRange | None:
        """Where a file holds exactly what `read` gives, or, of a matrix whose `format` has blocks,
        `read_blocks`; None if none does."""
        ...

    def drop_pages(self) -> None:
        """Files that were mapped and read no longer count as this process's memory."""
        ...

    def load_tokenizer(self) -> Tokenizer: ...

    def close(self) -> None:
        """Releases the files; tensors already read stay valid."""
        ...


def open_checkpoint(path: Path) -> Checkpoint:
    """Opens a folder with config.json or a .gguf file.

    Raises ModelError when it cannot be run, CheckpointError when it is damaged."""
    if path.is_dir():
        if (path / "config.json").is_file():
            return with_experts_apart(open_published(HfFolder(path)))
        ggufs = sorted(path.glob("*.gguf"))
        hint = f"; give the file itself: {ggufs[0]}" if ggufs else ""
        raise ModelError(f"{path}: no config.json in this folder{hint}")
    if not path.is_file():
        raise ModelError(f"no such model: {path}")
    if path.suffix != ".gguf":
        raise ModelError(f"{path}: a model is a folder with config.json or a .gguf file")
    file = GgufCheckpoint(path)
    return with_numbers(with_splits_joined(file), file.numbers)


def check_tensors(checkpoint: Checkpoint, expected: Mapping[str, tuple[int, ...]]) -> None:
    """Raises CheckpointError unless every expected tensor is there in the expected shape."""
    names = checkpoint.names()
    for name, shape in expected.items():
        if name not in names:
            raise CheckpointError(f"{checkpoint.path}: no tensor {name} (expected {shape})")
        actual = checkpoint.shape(name)
        if actual != shape:
            raise CheckpointError(
                f"{checkpoint.path}: tensor {name} has shape {actual}, expected {shape}"
            )
