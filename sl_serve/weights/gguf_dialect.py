"""What llama.cpp's converter does to one family only: a family states it as `GGUF` in its file."""

from __future__ import annotations

from collections.abc import Callable, Collection, Mapping
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import torch

from sl_serve.config import ModelConfig
from sl_serve.weights.fields import Fields as Settings
from sl_serve.weights.hf_windows import FULL, SLIDING

Fields = Mapping[str, Any]  # as in config.json
Derived = Callable[[Fields, Collection[str]], Fields]  # of fields and of the names of tensors
Belongs = Callable[[Mapping[str, Any], Collection[str]], bool]  # of settings and names of tensors
# Of a config and a tensor's number of rows: where in the file each of Hugging Face's rows is.
# ValueError where heads of that config do not have so many.
RowOrder = Callable[[ModelConfig, int], np.ndarray[Any, Any]]
Read = Callable[[Settings, Fields], Fields]  # of the file's settings and of the fields so far


def _nothing(_fields: Fields, _tensors: Collection[str]) -> Fields:
    return {}


def _read_nothing(_settings: Settings, _fields: Fields) -> Fields:
    return {}


@dataclass(frozen=True, slots=True)
class Split:
    """A matrix that files may have as several tensors instead."""

    parts: Callable[[Any], Mapping[str, tuple[int, ...]]]  # of the model's config: module -> shape
    join: Callable[..., torch.Tensor]  # of these tensors, in float32: (out, in)


def _always(_settings: Mapping[str, Any], _tensors: Collection[str]) -> bool:
    return True


@dataclass(frozen=True, slots=True)
class GgufDialect:
    """Names of tensors are no part of it: the gguf package has them."""

    architecture: str  # general.architecture
    # Setting, without the architecture -> key of config.json, where not as in most families.
    settings: Mapping[str, str] = field(default_factory=dict)
    # The key for how much of a head is rotated, as a share of it; None: all is.
    rotary_share: str | None = None
    derived: Derived = _nothing  # what llama.cpp has in its code and not in the file
    rows: Mapping[str, RowOrder] = field(default_factory=dict)  # module, by the end of its name
    has_experts: bool = False
    norm_offset: float = 0.0  # what the file's norms have more than Hugging Face's
    read: Read = _read_nothing  # what several settings say together, or in another way than most
    read_apart: Collection[str] = ()  # the settings that it reads
    splits: Mapping[str, Split] = field(default_factory=dict)  # module, by the end of its name
    # Whether a file of this architecture is one of this family, where several share it.
    belongs: Belongs = _always
    # Tensor of a layer that is one number -> the setting that lists those of all layers.
    numbers: Mapping[str, str] = field(default_factory=dict)
    # Such lists that the family has a constant for.
    constants: Mapping[str, float] = field(default_factory=dict)


WINDOWS: Mapping[str, str] = {"attention.sliding_window_pattern": "sliding_window_pattern"}


def listed_windows(fields: Fields, _tensors: Collection[str]) -> Fields:
    """Where files say of each layer whether it sees only the last tokens (`WINDOWS` among the
    settings). Without a window in the file there is none."""
    found: dict[str, Any] = {"sliding_window": fields.get("sliding_window")}
    slides = fields.get("sliding_window_pattern")
    if isinstance(slides, list):
        found["layer_types"] = [SLIDING if s else FULL for s in slides]
    elif slides is not None:  # refused by whoever reads it
        found["layer_types"] = slides
    return found


def _rotated_pairs(n_rows: int, n_heads: int, head_dim: int) -> np.ndarray[Any, Any]:
    """The file's rows of a head are for rotating neighbours (2i, 2i + 1); here, as in Hugging
    Face's, i and i + head_dim / 2 turn together."""
    rows = np.arange(n_rows).reshape(n_heads, head_dim // 2, 2)
    return rows.swapaxes(1, 2).reshape(-1)


def _query_rows(config: ModelConfig, n_rows: int) -> np.ndarray[Any, Any]:
    return _rotated_pairs(n_rows, config.n_heads, config.head_dim)


def _key_rows(config: ModelConfig, n_rows: int) -> np.ndarray[Any, Any]:
    return _rotated_pairs(n_rows, config.n_kv_heads, config.head_dim)


LLAMA_ROWS: Mapping[str, RowOrder] = {"q_proj": _query_rows, "k_proj": _key_rows}


def grouped_rows(config: ModelConfig, n_rows: int) -> np.ndarray[Any, Any]:
    """Queries, keys, values one after another in the file; in Hugging Face's each key head stands
    behind the query heads that share it, and its value head behind it."""
    groups, dim = config.n_kv_heads, config.head_dim
    ends = [config.q_size, config.q_size + config.kv_size]
    queries, *keys_and_values = np.split(np.arange(n_rows), ends)
    of_groups = [part.reshape(groups, 1, dim) for part in keys_and_values]
    return np.concatenate([queries.reshape(groups, -1, dim), *of_groups], axis=1).reshape(-1)
