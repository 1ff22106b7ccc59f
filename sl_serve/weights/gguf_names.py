"""Hugging Face's names of a model's tensors -> those in a GGUF file, by the gguf package."""

from __future__ import annotations

from collections.abc import Callable, Collection, Iterator
from pathlib import Path
from typing import NamedTuple

import gguf

from sl_serve.config import ModelConfig
from sl_serve.errors import ModelError
from sl_serve.models import load_family
from sl_serve.weights.gguf_rope import ROPE_TENSORS
from sl_serve.weights.layout import source_name

_FIRST_LAYER = "blk.0."


class Place(NamedTuple):
    name: str
    expert: int | None  # whose tensor it is, of all experts' stacked in one; None: all of it


def stored_names(
    config: ModelConfig, architecture: str, stored: Collection[str], path: Path
) -> dict[str, Place]:
    """Of what is there. A tensor without a place in the architecture raises ModelError: leaving it
    out would change the results unnoticed."""
    translate = _translation(architecture, path)
    found: dict[str, Place] = {}
    for template in _templates(config):
        there = translate(source_name(template, 0).replace(".{expert}", ""))
        experts = range(config.n_experts) if "{expert}" in template else (None,)
        for layer in range(config.n_layers if "{layer}" in template else 1):
            name = there.replace(_FIRST_LAYER, f"blk.{layer}.", 1)
            if name in stored:
                found |= {source_name(template, layer, e): Place(name, e) for e in experts}
    used = {place.name for place in found.values()}
    for name in sorted(set(stored) - used - ROPE_TENSORS):
        raise ModelError(
            f"{path}: tensor {name[:120]!r} has no place in a model of type {config.family}"
        )
    return found


def _templates(config: ModelConfig) -> Iterator[str]:
    family = load_family(config.family)
    for param in family.layer_params(config):
        yield from param.sources
    for name, _ in family.static_tensors(config).values():
        yield name


def _translation(architecture: str, path: Path) -> Callable[[str], str]:
    """For the first layer's tensors and those of none. One that no GGUF file has keeps its name."""
    kinds = {name: kind for kind, name in gguf.MODEL_ARCH_NAMES.items()}
    if architecture not in kinds:
        raise ModelError(
            f"{path}: the gguf package that is installed does not know {architecture[:80]!r}; "
            "a newer one may (pip install -U gguf)"
        )
    table = gguf.get_tensor_name_map(kinds[architecture], 1)

    def translate(name: str) -> str:
        whole = name.replace("language_model.", "")
        stem, _, end = whole.rpartition(".")
        short = table.get_name(stem) or table.get_name(stem.removeprefix("transformer."))
        if short is None:  # a parameter without an end of its own has one there
            short, end = table.get_name(whole), "weight"
        return f"{short}.{end}" if short else name

    return translate
