"""Our own layout, which `sl-serve quantise` writes: matrices in the blocks of a layer's image.

A tensor that `formats` names is uint8 (out, row_bytes), its rows in that format; all others are
plain. So files serve as the disk tier, and loading is a copy.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch

from sl_serve.errors import CheckpointError, ModelError
from sl_serve.weights.fields import Fields, shown
from sl_serve.weights.file_range import FileRange
from sl_serve.weights.formats import BLOCK_FORMATS, Format
from sl_serve.weights.groups import GROUP_FORMATS
from sl_serve.weights.hf_folder import HfFolder
from sl_serve.weights.published.packed import expect, matrix_shape

METHOD, VERSION = "sl-serve", 1
_FORMATS = BLOCK_FORMATS | {name: g.format for name, g in GROUP_FORMATS.items()}


@dataclass(frozen=True, slots=True)
class StoredBlocks:
    folder: HfFolder
    name: str
    format: Format
    shape: tuple[int, int]  # (out, in), in elements

    @property
    def parts(self) -> tuple[str, ...]:
        return (self.name,)

    def blocks(self) -> torch.Tensor:
        return self.folder.read_stored(self.name)

    def read(self) -> torch.Tensor:
        return self.format.widen(self.blocks())

    def location(self) -> FileRange | None:
        found = self.folder.location(self.name)
        return None if found is None else found._replace(dtype=None)


def matrices(
    folder: HfFolder, settings: Fields, _dequantised: torch.dtype
) -> dict[str, StoredBlocks]:
    """Raises ModelError for a later version, CheckpointError for damage."""
    if settings.integer("version") != VERSION:
        raise ModelError(
            f"{settings.source}: version {settings.integer('version')} of the layout cannot be "
            f"read ({VERSION} can)"
        )
    formats = settings.get("formats")
    if not isinstance(formats, dict):
        raise CheckpointError(f"{settings.source}: formats must be an object, not {shown(formats)}")
    return {name: _matrix(folder, settings, name, format) for name, format in formats.items()}


def _matrix(folder: HfFolder, settings: Fields, name: str, format_name: object) -> StoredBlocks:
    if name not in folder.names():
        raise CheckpointError(f"{settings.source}: no tensor {shown(name)} in the folder")
    format = _FORMATS.get(format_name) if isinstance(format_name, str) else None
    if format is None:
        raise ModelError(f"{settings.source}: format {shown(format_name)} of {name} is not known")
    n_out, row_bytes = matrix_shape(folder, name)
    expect(folder, name, (n_out, row_bytes), [torch.uint8])
    if row_bytes % format.block_bytes:
        raise CheckpointError(
            f"{folder.path}: rows of {name} have {row_bytes} bytes, no whole {format.name} blocks"
        )
    return StoredBlocks(folder, name, format, (n_out, format.elements(row_bytes)))
