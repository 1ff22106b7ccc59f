"""A matrix that a folder holds as several tensors: packed numbers, their scales, their zeros."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch

from sl_serve.errors import CheckpointError
from sl_serve.weights.fields import Fields
from sl_serve.weights.formats import Format, plain
from sl_serve.weights.groups import WITH_ZEROS, Grouped, GroupFormat, Kind, as_floats, group_format
from sl_serve.weights.hf_folder import HfFolder

SHORT_SCALES = (torch.float16, torch.bfloat16)
SCALES = (*SHORT_SCALES, torch.float32)


@dataclass(frozen=True, slots=True)
class PackedMatrix:
    shape: tuple[int, int]  # (out, in)
    kind: Kind
    group: int  # neighbouring inputs that share a scale; the last group may have fewer
    scale_dtype: torch.dtype
    parts: tuple[str, ...]  # the folder's tensors that it is made of
    # numbers as `kind` stores them; scales and zeros (out, n_groups) of the file's own groups
    unpack: Callable[[], Grouped]
    dequantised: torch.dtype  # what it becomes where it cannot stay as it is
    group_of: torch.Tensor | None = None  # (in,), of each input, where no rule gives it

    @property
    def groups(self) -> GroupFormat | None:
        """What it is kept in: the file's groups, or smaller ones that share a scale. None where
        inputs of a group do not lie side by side, or its header cannot hold the scale."""
        if self.group_of is not None:
            return None
        if self.kind in WITH_ZEROS and self.scale_dtype not in SHORT_SCALES:
            return None
        n_in = self.shape[1]
        found = group_format(self.kind, n_in, min(self.group, n_in))
        while found is not None and self.group < n_in and self.group % found.group:
            found = group_format(self.kind, n_in, found.group - 1)
        return found

    @property
    def format(self) -> Format:
        groups = self.groups
        return plain(self.dequantised) if groups is None else groups.format

    def location(self) -> None:
        """No file has it as it is held."""

    def blocks(self) -> torch.Tensor:
        """uint8 (out, row_bytes)."""
        groups, rows = self.groups, self.unpack()
        assert groups is not None
        of_group = torch.arange(0, self.shape[1], groups.group) // self.group
        zeros = None if rows.zeros is None else rows.zeros[:, of_group]
        return groups.pack(Grouped(rows.numbers, rows.scales[:, of_group], zeros))

    def read(self) -> torch.Tensor:
        """(out, in): float32, or in the dtype that it becomes."""
        groups = self.groups
        if groups is not None:
            return groups.format.widen(self.blocks())
        rows = self.unpack()
        group_of = self.group_of
        if group_of is None:
            group_of = torch.arange(self.shape[1]) // self.group
        numbers = as_floats(self.kind, rows.numbers)
        if rows.zeros is not None:
            numbers -= rows.zeros[:, group_of].float()
        return numbers.mul_(rows.scales[:, group_of]).to(self.dequantised)


def unpacked(packed: torch.Tensor, n_bits: int) -> torch.Tensor:
    """(..., n) int32 -> (..., 32 n / n_bits) uint8: lowest bits first."""
    numbers = packed.contiguous().view(torch.uint8)
    if n_bits == 8:
        return numbers
    return torch.stack([numbers & 15, numbers >> 4], dim=-1).flatten(-2)


def expect(
    folder: HfFolder, name: str, shape: Sequence[int], dtypes: Sequence[torch.dtype]
) -> None:
    """Raises CheckpointError unless the folder has such a tensor."""
    found, dtype = folder.shape(name), stored_as(folder, name)
    if found != tuple(shape):
        raise CheckpointError(
            f"{folder.path}: tensor {name} has shape {found}, expected {tuple(shape)}"
        )
    if dtype not in dtypes:
        raise CheckpointError(f"{folder.path}: tensor {name} is stored as {dtype}")


def stored_as(folder: HfFolder, name: str) -> torch.dtype:
    found = folder.location(name)
    assert found is not None and found.dtype is not None
    return found.dtype


def group_size(settings: Fields, default: int | None = None) -> int | None:
    """Inputs of a group; None: a group is all of them, which files call -1."""
    return None if settings.get("group_size") == -1 else settings.integer("group_size", default)


def n_groups_of(n_in: int, group: int) -> int:
    return -(-n_in // group)


def order_of_groups(folder: HfFolder, name: str, n_in: int, group: int) -> torch.Tensor | None:
    """The group of each input, unless that is its number over `group`."""
    expect(folder, name, (n_in,), [torch.int32, torch.int64])
    found = folder.read_stored(name).long()
    if int(found.min()) < 0 or int(found.max()) >= n_groups_of(n_in, group):
        raise CheckpointError(f"{folder.path}: tensor {name} names groups that are not there")
    usual = torch.arange(n_in) // group
    return None if torch.equal(found, usual) else found


def modules_with(folder: HfFolder, suffix: str) -> list[str]:
    """Names of modules that have a tensor of that name."""
    return sorted(n.removesuffix(suffix) for n in folder.names() if n.endswith(suffix))


def matrix_shape(folder: HfFolder, name: str) -> tuple[int, int]:
    """Raises CheckpointError unless the tensor is a matrix of some size."""
    shape = folder.shape(name)
    if len(shape) != 2 or 0 in shape:
        raise CheckpointError(f"{folder.path}: tensor {name} has shape {shape}, not a matrix's")
    return shape[0], shape[1]
