"""One file per family, named as Hugging Face's `model_type`: a set of pure functions.

A family states its tensors (`layer_params`, `static_tensors`) and its arithmetic
(`hidden_states`, `block`, `head_input`). Weights, activations and the past come as arguments;
nothing is kept.
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

SHARED_MODULES = frozenset({"parts", "rope"})


# Our name -> (checkpoint name, shape): "embed", "head", and what else stands outside the layers.
StaticTensors = dict[str, tuple[str, tuple[int, ...]]]


class RopeTable(NamedTuple):
    cos: torch.Tensor  # (T, head_dim / 2)
    sin: torch.Tensor


# q (T, Hq, D), k and v (T, Hk, D) of a sub-batch's new tokens -> their attention (T, Hq * D)
Attend = Callable[[torch.Tensor, torch.Tensor, torch.Tensor], torch.Tensor]


class Family(Protocol):
    """What a file in this folder offers."""

    def layer_params(self, config: ModelConfig) -> tuple[Param, ...]:
        """The tensors of one layer, in image order."""

    def static_tensors(self, config: ModelConfig) -> StaticTensors:
        """Our name -> (checkpoint name, shape) of what is in no layer: "embed" and "head", both
        (vocabulary, width), and whatever else `hidden_states` and `head_input` need. Matrices
        are (out, in). Equal checkpoint names share one tensor."""

    def hidden_states(
        self,
        config: ModelConfig,
        ops: Ops,
        w: LayerWeights,
        tokens: torch.Tensor,
        positions: torch.Tensor,
    ) -> torch.Tensor:
        """What enters the first layer, (T, hidden). `tokens` (T, width) are rows of "embed" in
        the compute dtype, in memory of their own; `positions` (T,) int64; `w` has the static
        tensors, in the storage dtype."""

    def block(
        self,
        config: ModelConfig,
        ops: Ops,
        w: LayerWeights,
        x: torch.Tensor,
        rope: RopeTable | None,
        attend: Attend,
    ) -> None:
        """Pass x (T, hidden) through one layer, in place. `rope` is None where config.rope is."""

    def head_input(
        self, config: ModelConfig, ops: Ops, w: LayerWeights, x: torch.Tensor
    ) -> torch.Tensor:
        """What the head is applied to, (n, width): x (n, hidden) after the final norm."""


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
