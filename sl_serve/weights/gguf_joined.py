"""Matrices that a GGUF file has in several tensors: each is seen as the one that it was made of."""

from __future__ import annotations

from collections.abc import Collection
from typing import TYPE_CHECKING

import torch

from sl_serve.errors import CheckpointError
from sl_serve.weights.formats import Format, plain
from sl_serve.weights.gguf_dialect import Split
from sl_serve.weights.gguf_file import GgufCheckpoint
from sl_serve.weights.wrapped import WrappedCheckpoint

if TYPE_CHECKING:
    from sl_serve.weights.checkpoint import Checkpoint  # which opens these


def with_splits_joined(checkpoint: GgufCheckpoint) -> Checkpoint:
    """`checkpoint` itself where nothing in it is in parts."""
    joined = JoinedCheckpoint(checkpoint)
    return joined if joined.wholes else checkpoint


class JoinedCheckpoint(WrappedCheckpoint):
    """Raises CheckpointError for parts of other shapes than they must have."""

    def __init__(self, inner: GgufCheckpoint) -> None:
        super().__init__(inner)
        # The name of a whole -> how to join it, and the names of its parts.
        self.wholes: dict[str, tuple[Split, tuple[str, ...]]] = {}
        for module, split in inner.splits.items():
            self._find_parts(module, split)
        parts = {name for _, names in self.wholes.values() for name in names}
        self._names = (set(inner.names()) - parts) | self.wholes.keys()

    def names(self) -> Collection[str]:
        return self._names

    def shape(self, name: str) -> tuple[int, ...]:
        if name not in self.wholes:
            return super().shape(name)
        split, parts = self.wholes[name]
        empty = (torch.empty(self._inner.shape(part), device="meta") for part in parts)
        return tuple(split.join(*empty).shape)

    def read(self, name: str) -> torch.Tensor:
        if name not in self.wholes:
            return super().read(name)
        split, parts = self.wholes[name]
        return split.join(*(self._inner.read(part) for part in parts))

    def format(self, name: str) -> Format:
        """A whole's is plain: blocks of its parts may run along another side of it."""
        if name not in self.wholes:
            return super().format(name)
        formats = {self._inner.format(part).dtype for part in self.wholes[name][1]}
        dtype = formats.pop() if len(formats) == 1 else None
        return plain(dtype or torch.float32)

    def _find_parts(self, module: str, split: Split) -> None:
        shapes = {f"{part}.weight": shape for part, shape in split.parts(self.config).items()}
        names = self._inner.names()
        stems = {n.removesuffix(end) for end in shapes for n in names if n.endswith(f".{end}")}
        for stem in sorted(stems):
            parts = {stem + end: shape for end, shape in shapes.items()}
            self._check(parts)
            self.wholes[f"{stem}{module}.weight"] = (split, tuple(parts))

    def _check(self, parts: dict[str, tuple[int, ...]]) -> None:
        for part, shape in parts.items():
            actual = self._inner.shape(part)
            if actual != shape:
                raise CheckpointError(
                    f"{self.path}: tensor {part} has shape {actual}, expected {shape}"
                )
