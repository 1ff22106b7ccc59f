"""A checkpoint seen through another: what is not overridden is answered by the one within."""

from __future__ import annotations

from collections.abc import Collection
from typing import TYPE_CHECKING

import torch

from sl_serve.tokenizer import Tokenizer
from sl_serve.weights.file_range import FileRange
from sl_serve.weights.formats import Format

if TYPE_CHECKING:
    from sl_serve.weights.checkpoint import Checkpoint  # which opens some of those that wrap


class WrappedCheckpoint:
    """Checkpoint; owns `inner`, which it closes."""

    def __init__(self, inner: Checkpoint) -> None:
        self.path, self.config = inner.path, inner.config
        self._inner = inner

    def names(self) -> Collection[str]:
        return self._inner.names()

    def shape(self, name: str) -> tuple[int, ...]:
        return self._inner.shape(name)

    def format(self, name: str) -> Format:
        return self._inner.format(name)

    def read(self, name: str) -> torch.Tensor:
        return self._inner.read(name)

    def read_blocks(self, name: str) -> torch.Tensor:
        return self._inner.read_blocks(name)

    def location(self, name: str) -> FileRange | None:
        return self._inner.location(name)

    def drop_pages(self) -> None:
        self._inner.drop_pages()

    def load_tokenizer(self) -> Tokenizer:
        return self._inner.load_tokenizer()

    def close(self) -> None:
        self._inner.close()
