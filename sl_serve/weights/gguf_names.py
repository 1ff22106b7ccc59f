"""Hugging Face's names of a model's tensors -> those in a GGUF file, by the gguf package."""

from __future__ import annotations

import re
from collections.abc import Callable, Collection, Iterator
from pathlib import Path
from typing import NamedTuple

import gguf

from sl_serve.config import ModelConfig
from sl_serve.errors import ModelError
from sl_serve.models import load_family
from sl_serve.weights.gguf_dialect import GgufDialect
from sl_serve.weights.gguf_rope import ROPE_TENSORS
from sl_serve.weights.layout import source_name

_FIRST_LAYER = "blk.0."
_PREDICTING = re.compile(r"blk\.(\d{1,5})\.nextn\.")
_QUERY_KEY_VALUE = re.compile(r"\.attn_([qkv])\.")


class Place(NamedTuple):
    name: str
    expert: int | None = None  # whose tensor it is, of all experts' stacked in one; None: all of it
    rows: tuple[int, int] | None = None  # the first and the end of those it is; None: all
    is_row: bool = False  # a matrix of one row, which a file may have as a vector


def stored_names(
    config: ModelConfig, dialect: GgufDialect, stored: Collection[str], path: Path
) -> dict[str, Place]:
    """Of what is there. A tensor without a place in the architecture raises ModelError: leaving it
    out would change the results unnoticed."""
    translate = _translation(dialect.architecture, path)
    found: dict[str, Place] = {}
    for template, is_row in _templates(config, dialect):
        there = translate(source_name(template, 0).replace(".{expert}", ""))
        experts = range(config.n_experts) if "{expert}" in template else (None,)
        for layer in range(config.n_layers if "{layer}" in template else 1):
            name = there.replace(_FIRST_LAYER, f"blk.{layer}.", 1)
            for expert in experts:
                place = _place(config, name, expert, stored)
                if place is not None:
                    found[source_name(template, layer, expert)] = place._replace(is_row=is_row)
    used = {place.name for place in found.values()}
    beyond = tuple(f"blk.{layer}." for layer in predicting_layers(stored))
    for name in sorted(set(stored) - used - ROPE_TENSORS):
        if name.startswith(beyond):
            continue
        raise ModelError(
            f"{path}: tensor {name[:120]!r} has no place in a model of type {config.family}"
        )
    return found


def predicting_layers(stored: Collection[str]) -> frozenset[int]:
    """Those behind the model's own that predict tokens further on, which only speculation needs."""
    matches = (_PREDICTING.match(name) for name in stored)
    return frozenset(int(match[1]) for match in matches if match)


def _place(
    config: ModelConfig, name: str, expert: int | None, stored: Collection[str]
) -> Place | None:
    if name in stored:
        return Place(name, expert)
    alone = name.replace("_exps.", f".{expert}.")  # in the first files with experts
    if alone in stored:
        return Place(alone)
    match = _QUERY_KEY_VALUE.search(name)
    if match is None:
        return None
    joined = name.replace(match[0], ".attn_qkv.")
    n_q, n_kv = config.q_size, config.kv_size
    first, n = {"q": (0, n_q), "k": (n_q, n_kv), "v": (n_q + n_kv, n_kv)}[match[1]]
    return Place(joined, rows=(first, first + n)) if joined in stored else None


def _templates(config: ModelConfig, dialect: GgufDialect) -> Iterator[tuple[str, bool]]:
    """And whether it is a matrix of one row."""
    family = load_family(config.family)
    for param in family.layer_params(config):
        for source, n_rows in zip(param.sources, param.source_rows, strict=True):
            yield source, param.is_matrix and n_rows == 1
            yield from ((part, False) for part in _parts(source, config, dialect))
    for name, _ in family.static_tensors(config).values():
        yield name, False


def _parts(source: str, config: ModelConfig, dialect: GgufDialect) -> Iterator[str]:
    for whole, split in dialect.splits.items():
        if source.endswith(f".{whole}.weight"):
            for part in split.parts(config):
                yield source.replace(f".{whole}.", f".{part}.")


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
        whole = name.replace("language_model.", "").replace("correction_bias", "correction.bias")
        stem, _, end = whole.rpartition(".")
        short = table.get_name(stem) or table.get_name(stem.removeprefix("transformer."))
        if short is None:  # a parameter without an end of its own has one there
            short, end = table.get_name(whole), "weight"
        return f"{short}.{end}" if short else name

    return translate
