"""Experts that a folder has in one tensor: each is seen as tensors of its own, by the names that
folders with experts apart have: X.3.gate_proj.weight is of X.gate_up_proj, expert 3.

Stacks of matrices are (experts, in, out), those of vectors, whose names end in "_bias", (experts,
out): so transformers has the experts of gpt-oss.
"""

from __future__ import annotations

from collections.abc import Collection, Iterator, Mapping
from typing import TYPE_CHECKING, NamedTuple

import torch

from sl_serve.config import ModelConfig
from sl_serve.weights.file_range import FileRange
from sl_serve.weights.formats import Format
from sl_serve.weights.wrapped import WrappedCheckpoint

if TYPE_CHECKING:
    from sl_serve.weights.checkpoint import Checkpoint  # which opens these

_MARK, _BIAS = ".experts.", "_bias"


class Part(NamedTuple):
    """What a module of one expert has of a stack."""

    module: str
    expert: int
    outputs: slice  # of the expert's


def parts_of(config: ModelConfig, stack: str, n_experts: int) -> Iterator[Part]:
    """`stack`: its name without what says which tensor of its modules it has. None where the family
    has no such stack."""
    start, mark, end = stack.rpartition(_MARK)
    modules = dict(config.stacked).get(end, ()) if mark else ()
    for expert in range(n_experts if modules else 0):
        for turn, module in enumerate(modules):
            yield Part(f"{start}{_MARK}{expert}.{module}", expert, slice(turn, None, len(modules)))


def with_experts_apart(checkpoint: Checkpoint) -> Checkpoint:
    """`checkpoint` itself where nothing in it is stacked."""
    parts = {
        f"{part.module}.{'bias' if name.endswith(_BIAS) else 'weight'}": (name, part)
        for name in checkpoint.names()
        if _is_stack(checkpoint, name)
        for part in parts_of(checkpoint.config, name.removesuffix(_BIAS), checkpoint.shape(name)[0])
    }
    return StackedCheckpoint(checkpoint, parts) if parts else checkpoint


def _is_stack(checkpoint: Checkpoint, name: str) -> bool:
    shape = checkpoint.shape(name)
    return len(shape) == (2 if name.endswith(_BIAS) else 3) and 0 not in shape


class StackedCheckpoint(WrappedCheckpoint):
    def __init__(self, inner: Checkpoint, parts: Mapping[str, tuple[str, Part]]) -> None:
        """`parts`: name -> that of the stack, and which part of it."""
        super().__init__(inner)
        self._parts = parts
        stacks = {stack for stack, _ in parts.values()}
        self._names = (set(inner.names()) - stacks) | parts.keys()

    def names(self) -> Collection[str]:
        return self._names

    def shape(self, name: str) -> tuple[int, ...]:
        if name not in self._parts:
            return super().shape(name)
        stack, part = self._parts[name]
        _, *n_in, n_out = super().shape(stack)
        return (len(range(n_out)[part.outputs]), *n_in)

    def read(self, name: str) -> torch.Tensor:
        if name not in self._parts:
            return super().read(name)
        stack, part = self._parts[name]
        return super().read(stack)[part.expert, ..., part.outputs].t()

    def format(self, name: str) -> Format:
        return super().format(self._parts[name][0] if name in self._parts else name)

    def location(self, name: str) -> FileRange | None:
        """Of matrices none: they lie there the other way round. Nor of outputs by turns."""
        if name not in self._parts:
            return super().location(name)
        stack, part = self._parts[name]
        n_experts, *shape = super().shape(stack)
        found = super().location(stack)
        if found is None or len(shape) > 1 or part.outputs.step > 1:
            return None
        n_bytes = found.size_bytes // n_experts
        start = found.offset_bytes + part.expert * n_bytes
        return found._replace(offset_bytes=start, size_bytes=n_bytes)
