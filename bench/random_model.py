"""Random weights of a well-known shape as a Hugging Face folder: a file to stream from disk."""

from __future__ import annotations

import json
import tempfile
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file

from bench.errors import BenchError
from bench.tiny import write_byte_tokenizer
from sl_serve.weights.dummy import DummyCheckpoint
from sl_serve.weights.hf_config import model_config_from_hf
from sl_serve.weights.shapes import SHAPES

_STANDARD_DEVIATION = 0.02  # what transformers initialises Llama with
_NAMES = [name for name, settings in SHAPES.items() if settings["model_type"] == "llama"]


def cached_random_model(name: str, cache: Path, say: Callable[[str], None]) -> Path:
    """The folder of that shape in `cache`, written unless it is there. Raises BenchError."""
    folder = cache / f"random-{name}"
    if folder.is_dir():
        return folder
    if name not in _NAMES:
        raise BenchError(f"no shape is named {name!r}; there are: {', '.join(_NAMES)}")
    say(f"writing random weights to {folder}")
    cache.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(dir=cache, prefix="unfinished-") as unfinished:
        # Renamed only when complete, so that what is found under the name is complete.
        write_random_model(SHAPES[name], Path(unfinished) / name).rename(folder)
    return folder


def write_random_model(settings: Mapping[str, Any], folder: Path) -> Path:
    """`settings`: a Llama's config.json. The same weights every time, in its dtype; norms are ones.

    All are in memory at once. Unlike the weights of the load format "dummy" no two parts are
    alike, so a disk that compresses or shares equal blocks gains nothing.
    """
    folder.mkdir(parents=True)
    shapes = DummyCheckpoint(folder, model_config_from_hf(settings, {}, "random"))
    dtype = getattr(torch, settings["dtype"])
    generator = torch.Generator().manual_seed(0)
    tensors = {n: _random(shapes.shape(n), dtype, generator) for n in sorted(shapes.names())}
    save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})
    architecture = {"architectures": ["LlamaForCausalLM"]}
    (folder / "config.json").write_text(json.dumps(architecture | dict(settings), indent=2))
    write_byte_tokenizer(folder)
    return folder


def _random(shape: tuple[int, ...], dtype: torch.dtype, generator: torch.Generator) -> torch.Tensor:
    if len(shape) == 1:
        return torch.ones(shape, dtype=dtype)
    return torch.empty(shape, dtype=dtype).normal_(0.0, _STANDARD_DEVIATION, generator=generator)
