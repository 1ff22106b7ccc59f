"""Folders whose matrices were quantised by other programs, read as they are: a file per layout.

A layout says which matrices a folder has under which tensors; those that it does not name are
plain. Everything is checked before any weight is read. How activations were to be quantised does
not matter here: they stay float.
"""

from __future__ import annotations

import logging
from collections.abc import Callable, Collection, Mapping

import torch

from sl_serve.errors import CheckpointError, ModelError
from sl_serve.weights.fields import Fields, read_json_object, shown
from sl_serve.weights.file_range import FileRange
from sl_serve.weights.formats import Format
from sl_serve.weights.hf_folder import HfFolder
from sl_serve.weights.published import awq, blocks, compressed_tensors, fp8, gptq, mxfp4
from sl_serve.weights.published.packed import PackedMatrix
from sl_serve.weights.wrapped import WrappedCheckpoint

MAX_NAME_CHARS = 200
log = logging.getLogger(__name__)

Matrix = PackedMatrix | mxfp4.ExpertMatrix | blocks.StoredBlocks
Layout = Callable[[HfFolder, Fields, torch.dtype], Mapping[str, Matrix]]
_LAYOUTS: Mapping[str, Layout] = {
    "gptq": gptq.matrices,
    "awq": awq.matrices,
    "compressed-tensors": compressed_tensors.matrices,
    "fp8": fp8.matrices,
    "mxfp4": mxfp4.matrices,
    blocks.METHOD: blocks.matrices,
}
_ABOUT_ACTIVATIONS = ("activation_scheme", "kv_cache_scheme")


def open_published(folder: HfFolder) -> HfFolder | PublishedFolder:
    """`folder` itself where nothing in it is quantised.

    Raises ModelError for a layout that cannot be read, CheckpointError for a damaged one."""
    source = str(folder.path / "config.json")
    raw = read_json_object(folder.path / "config.json").get("quantization_config")
    if raw is None:
        return folder
    if not isinstance(raw, dict):
        raise ModelError(f"{source}: quantization_config must be an object, not {shown(raw)}")
    method = raw.get("quant_method", "unnamed")
    if not isinstance(method, str) or method not in _LAYOUTS:
        raise ModelError(
            f"{source}: weights quantised with {shown(method)} cannot be read "
            f"({', '.join(_LAYOUTS)} can)"
        )
    for name in folder.names():  # messages repeat them
        if not name.isprintable() or len(name) > MAX_NAME_CHARS:
            raise CheckpointError(f"{folder.path}: {shown(name)} is no name of a tensor")
    settings = Fields(raw, f"{source}: quantization_config")
    dequantised: torch.dtype = getattr(torch, folder.config.dtype)
    matrices = _LAYOUTS[method](folder, settings, dequantised)
    if not matrices and raw.get("format") != "dense":
        raise CheckpointError(f"{folder.path}: no weights quantised with {method} in it")
    _tell(folder, raw, matrices)
    return PublishedFolder(folder, matrices)


def _tell(folder: HfFolder, raw: Mapping[str, object], matrices: Mapping[str, Matrix]) -> None:
    schemes = raw.get("config_groups")
    groups = schemes.values() if isinstance(schemes, dict) else ()
    of_inputs = any(isinstance(g, dict) and g.get("input_activations") for g in groups)
    if of_inputs or any(raw.get(key) for key in _ABOUT_ACTIVATIONS):
        log.info("%s: activations and KV are not quantised, whatever it says", folder.path)
    n_plain = sum(m.format.dtype is not None for m in matrices.values())
    if n_plain:
        log.warning(
            "%s: %d matrices cannot stay in their groups; they are held as %s",
            folder.path,
            n_plain,
            folder.config.dtype,
        )


class PublishedFolder(WrappedCheckpoint):
    """Checkpoint over a folder some of whose matrices are quantised."""

    def __init__(self, folder: HfFolder, matrices: Mapping[str, Matrix]) -> None:
        super().__init__(folder)
        self._matrices = matrices
        parts = {part for matrix in matrices.values() for part in matrix.parts}
        self._names = (set(folder.names()) - parts) | matrices.keys()

    def names(self) -> Collection[str]:
        return self._names

    def shape(self, name: str) -> tuple[int, ...]:
        matrix = self._matrices.get(name)
        return super().shape(name) if matrix is None else matrix.shape

    def read(self, name: str) -> torch.Tensor:
        matrix = self._matrices.get(name)
        return super().read(name) if matrix is None else matrix.read()

    def format(self, name: str) -> Format:
        matrix = self._matrices.get(name)
        return super().format(name) if matrix is None else matrix.format

    def read_blocks(self, name: str) -> torch.Tensor:
        return self._matrices[name].blocks()

    def location(self, name: str) -> FileRange | None:
        matrix = self._matrices.get(name)
        return super().location(name) if matrix is None else matrix.location()
