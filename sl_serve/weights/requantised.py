"""A checkpoint with other weights than its files have: quantised tensor by tensor as it is read."""

from __future__ import annotations

from collections.abc import Mapping
from typing import NamedTuple

import torch

from sl_serve.errors import UserError
from sl_serve.models import load_family
from sl_serve.weights.checkpoint import Checkpoint
from sl_serve.weights.file_range import FileRange
from sl_serve.weights.formats import Format, plain
from sl_serve.weights.groups import GROUP_FORMATS, GroupFormat, Kind, group_format
from sl_serve.weights.host import expected_shapes
from sl_serve.weights.quantise import PART_ELEMENTS, quantise
from sl_serve.weights.wrapped import WrappedCheckpoint


class _Wanted(NamedTuple):
    kind: Kind
    group: int  # at most: rows that it does not divide have a smaller one


# The short names. Groups of 64 divide the rows of more models and lose less; 8-bit floats have
# scales for what is left after their own exponents.
_SHORT = {
    "int8": _Wanted("int8_sym", 64),
    "int4": _Wanted("int4_min", 64),
    "fp8": _Wanted("fp8", 128),
}
_NAMES = _SHORT | {name: _Wanted(g.kind, g.group) for name, g in GROUP_FORMATS.items()}
# Embedding and head. The head decides between tokens and is read in every step: eight bits cost no
# quality that shows, and half the bytes.
_VOCABULARY = _SHORT["int8"]


def with_weights(checkpoint: Checkpoint, weights: str) -> Checkpoint:
    """`checkpoint` with its matrices as `weights` says: auto (as they are), bf16, fp8, int8, int4
    or a format's full name. Raises UserError for another word."""
    if weights == "auto":
        return checkpoint
    if weights == "bf16":
        return RequantisedCheckpoint(checkpoint, None)
    if weights not in _NAMES:
        raise UserError(
            f"--weights {weights[:40]!r} is not known; there are: "
            + ", ".join(["auto", "bf16", *_NAMES])
        )
    return RequantisedCheckpoint(checkpoint, _NAMES[weights])


class RequantisedCheckpoint(WrappedCheckpoint):
    """Matrices of layers, embedding and head in groups of `wanted`, or in bfloat16 for None.
    Vectors, and matrices whose rows no group divides, stay as they are."""

    def __init__(self, checkpoint: Checkpoint, wanted: _Wanted | None) -> None:
        super().__init__(checkpoint)
        self._groups = {} if wanted is None else _groups_of(checkpoint, wanted)
        self._short = set() if wanted is not None else _matrices(checkpoint).keys()

    def format(self, name: str) -> Format:
        if name in self._short:
            return plain(torch.bfloat16)
        groups = self._groups.get(name)
        return self._inner.format(name) if groups is None else groups.format

    def read(self, name: str) -> torch.Tensor:
        if name in self._groups:
            return self.format(name).widen(self.read_blocks(name))
        tensor = self._inner.read(name)
        return tensor.bfloat16() if name in self._short else tensor

    def read_blocks(self, name: str) -> torch.Tensor:
        groups = self._groups.get(name)
        if groups is None:
            return self._inner.read_blocks(name)
        n_out, n_in = self.shape(name)
        out = torch.empty(n_out, groups.format.row_bytes(n_in), dtype=torch.uint8)
        stored = self._inner.format(name)
        if stored.dtype is not None:
            quantise(self._inner.read(name), groups, out)
            return out
        blocks, n_part = self._inner.read_blocks(name), max(1, PART_ELEMENTS // n_in)
        for start in range(0, n_out, n_part):
            rows = slice(start, start + n_part)
            quantise(stored.widen(blocks[rows]), groups, out[rows])
        return out

    def location(self, name: str) -> FileRange | None:
        found = self._inner.location(name)
        if found is None or name in self._groups or found.dtype != self.format(name).dtype:
            return None
        return found


def _matrices(checkpoint: Checkpoint) -> Mapping[str, tuple[int, ...]]:
    """Name -> shape of those of layers, and of embedding and head."""
    config = checkpoint.config
    family = load_family(config.family)
    static = family.static_tensors(config)
    params = [p for p in family.layer_params(config) if p.is_matrix and not p.is_exact]
    shapes = expected_shapes(params, config.n_layers)
    return shapes | {static[name][0]: static[name][1] for name in ("embed", "head")}


def _groups_of(checkpoint: Checkpoint, wanted: _Wanted) -> dict[str, GroupFormat]:
    static = load_family(checkpoint.config.family).static_tensors(checkpoint.config)
    vocabulary = {static[name][0] for name in ("embed", "head")}
    found = {}
    for name, shape in _matrices(checkpoint).items():
        is_vocabulary = name in vocabulary
        if is_vocabulary and checkpoint.format(name).dtype is None:
            continue  # in few bits already
        kind, group = _VOCABULARY if is_vocabulary else wanted
        groups = group_format(kind, shape[1], group)
        if groups is not None:
            found[name] = groups
    return found
