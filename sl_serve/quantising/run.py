"""From a checkpoint and calibration windows to a folder."""

from __future__ import annotations

import math
from collections.abc import Callable
from pathlib import Path

import torch

from sl_serve.errors import UserError
from sl_serve.models import GENERIC, load_family
from sl_serve.quantising.folder import Shards, new_folder, write_settings
from sl_serve.quantising.layers import CalibratedLayers
from sl_serve.weights.checkpoint import Checkpoint
from sl_serve.weights.formats import Format
from sl_serve.weights.groups import GROUP_FORMATS
from sl_serve.weights.host import check_checkpoint
from sl_serve.weights.layout import source_name
from sl_serve.weights.requantised import with_weights

OnLayer = Callable[[], None]
_WORDS = ["int4", *(name for name, g in GROUP_FORMATS.items() if g.kind == "int4_min")]


def check_weights(weights: str) -> None:
    """Raises UserError for a word that nothing is calibrated for."""
    if weights not in _WORDS:
        raise UserError(
            f"--weights {weights[:40]!r} cannot be calibrated; these can: {', '.join(_WORDS)}"
        )


def quantise_model(
    checkpoint: Checkpoint, weights: str, windows: torch.Tensor, out: Path, on_layer: OnLayer
) -> None:
    """Write `out`, a folder. Matrices of layers as `weights` says, calibrated with `windows`, ids
    (n, length); embedding and head as `--weights` has them; the rest as it is.

    Raises UserError, CheckpointError."""
    check_weights(weights)
    if checkpoint.config.family == GENERIC:
        raise UserError(
            f"{checkpoint.path}: models that run through transformers' modules cannot be "
            f"calibrated; serve it as it is, with --weights {weights}"
        )
    target = with_weights(checkpoint, weights)
    parts = _parts(checkpoint)
    formats = {name: format for part in parts for name, format in _in_blocks(target, part).items()}
    sizes = [sum(_stored_bytes(target, name) for name in part) for part in parts]
    calibration = {"method": "gptq", "tokens": windows.numel(), "window_tokens": windows.shape[1]}
    with torch.inference_mode(), new_folder(out, sum(sizes)) as folder:
        shards = Shards(folder, sizes)
        shards.add({name: _stored(target, name) for name in parts[0]})
        layers = CalibratedLayers(checkpoint, windows, target)
        for names, blocks in zip(parts[1:], layers, strict=True):
            shards.add({n: blocks[n] if n in blocks else _stored(target, n) for n in names})
            on_layer()
        names_of = {name: format.name for name, format in formats.items()}
        write_settings(checkpoint, names_of, calibration, folder)


def _parts(checkpoint: Checkpoint) -> list[list[str]]:
    """Names of what is in no layer, and of each layer's tensors. Raises CheckpointError."""
    config = checkpoint.config
    family = load_family(config.family)
    params, static = family.layer_params(config), family.static_tensors(config)
    check_checkpoint(checkpoint, params, dict(static.values()))
    layers = [
        [source_name(s, i, e) for p in params if p.is_in(i) for e in p.owners for s in p.sources]
        for i in range(config.n_layers)
    ]
    return [sorted({source for source, _ in static.values()}), *layers]


def _in_blocks(target: Checkpoint, names: list[str]) -> dict[str, Format]:
    formats = {name: target.format(name) for name in names if len(target.shape(name)) == 2}
    return {name: format for name, format in formats.items() if format.dtype is None}


def _stored(target: Checkpoint, name: str) -> torch.Tensor:
    in_blocks = name in _in_blocks(target, [name])
    return target.read_blocks(name) if in_blocks else target.read(name)


def _stored_bytes(target: Checkpoint, name: str) -> int:
    """About: plain numbers of a file that has none of them are float32 ones then."""
    shape = target.shape(name)
    for format in _in_blocks(target, [name]).values():
        return shape[0] * format.row_bytes(shape[1])
    location = target.location(name)
    return location.size_bytes if location else 4 * math.prod(shape)
