"""One file per family, named as Hugging Face's `model_type`: a set of pure functions.

A family states its tensors (`layer_params`, `static_tensors`) and its arithmetic (`block`).
Weights, activations and the past come as arguments; nothing is kept.
"""

from __future__ import annotations

import importlib
import pkgutil
from collections.abc import Callable
from typing import NamedTuple, Protocol, cast

import torch

from sl_serve.config import ModelConfig
from sl_serve.errors import ModelError
from sl_serve.ops import Ops
from sl_serve.weights.layout import LayerWeights, Param

SHARED_MODULES = frozenset({"rope"})


class RopeTable(NamedTuple):
    cos: torch.Tensor  # (T, head_dim / 2)
    sin: torch.Tensor


# q (T, Hq, D), k and v (T, Hk, D) of a sub-batch's new tokens -> their attention (T, Hq * D)
Attend = Callable[[torch.Tensor, torch.Tensor, torch.Tensor], torch.Tensor]


class Family(Protocol):
    """What a file in this folder offers."""

    def layer_params(self, config: ModelConfig) -> tuple[Param, ...]:
        """The tensors of one layer, in image order."""

    def static_tensors(self, config: ModelConfig) -> dict[str, tuple[str, tuple[int, ...]]]:
        """Our name -> (checkpoint name, shape) of "embed", "final_norm" and "head"."""

    def block(
        self,
        config: ModelConfig,
        ops: Ops,
        w: LayerWeights,
        x: torch.Tensor,
        rope: RopeTable,
        attend: Attend,
    ) -> None:
        """Pass x (T, hidden) through one layer, in place."""

    def head_input(
        self, config: ModelConfig, ops: Ops, w: LayerWeights, x: torch.Tensor
    ) -> torch.Tensor:
        """What the head is applied to: x (n, hidden) after the final norm."""


def supported_families() -> tuple[str, ...]:
    """The files of this folder."""
    names = (m.name for m in pkgutil.iter_modules(__path__))
    return tuple(sorted(n for n in names if n not in SHARED_MODULES))


def load_family(name: str) -> Family:
    """The family's module. Raises ModelError, naming what is supported."""
    if name not in supported_families():
        supported = ", ".join(supported_families())
        raise ModelError(f"model type '{name}' is not supported; supported: {supported}")
    return cast(Family, importlib.import_module(f"{__name__}.{name}"))
