"""Experts that a folder has in one tensor: each is seen as a tensor of its own, X[0], X[1], ...

Stacks of matrices are (experts, in, out), those of vectors, whose names end in "_bias", (experts,
out): so transformers has the experts of gpt-oss.
"""

from __future__ import annotations

from collections.abc import Collection
from typing import TYPE_CHECKING

import torch

from sl_serve.weights.file_range import FileRange
from sl_serve.weights.formats import Format
from sl_serve.weights.wrapped import WrappedCheckpoint

if TYPE_CHECKING:
    from sl_serve.weights.checkpoint import Checkpoint  # which opens these

MARK = ".experts."


def with_experts_apart(checkpoint: Checkpoint) -> Checkpoint:
    """`checkpoint` itself where nothing in it is stacked."""
    stacks = [name for name in checkpoint.names() if _is_stack(checkpoint, name)]
    return StackedCheckpoint(checkpoint, stacks) if stacks else checkpoint


class StackedCheckpoint(WrappedCheckpoint):
    def __init__(self, inner: Checkpoint, stacks: Collection[str]) -> None:
        super().__init__(inner)
        self._places = {
            f"{stack}[{expert}]": (stack, expert)
            for stack in stacks
            for expert in range(inner.shape(stack)[0])
        }
        self._names = (set(inner.names()) - set(stacks)) | self._places.keys()

    def names(self) -> Collection[str]:
        return self._names

    def shape(self, name: str) -> tuple[int, ...]:
        if name not in self._places:
            return super().shape(name)
        _, *shape = super().shape(self._places[name][0])
        return tuple(reversed(shape))

    def read(self, name: str) -> torch.Tensor:
        if name not in self._places:
            return super().read(name)
        stack, expert = self._places[name]
        return super().read(stack)[expert].t()

    def format(self, name: str) -> Format:
        return super().format(self._places[name][0] if name in self._places else name)

    def location(self, name: str) -> FileRange | None:
        """Of matrices none: they lie there the other way round."""
        if name not in self._places:
            return super().location(name)
        stack, expert = self._places[name]
        n_experts, *shape = super().shape(stack)
        found = super().location(stack)
        if found is None or len(shape) > 1:
            return None
        n_bytes = found.size_bytes // n_experts
        start = found.offset_bytes + expert * n_bytes
        return found._replace(offset_bytes=start, size_bytes=n_bytes)


def _is_stack(checkpoint: Checkpoint, name: str) -> bool:
    n_dims = 2 if name.endswith("_bias") else 3
    return MARK in name and len(checkpoint.shape(name)) == n_dims
