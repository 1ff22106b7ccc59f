"""One file per family, named as Hugging Face's `model_type`: a set of pure functions.

A family reads its settings (`model_config`), states its tensors (`layer_params`,
`static_tensors`) and its arithmetic (`hidden_states`, `block`, `head_input`). Weights, activations
and the past come as arguments; nothing is kept.
"""

from __future__ import annotations

import importlib
import pkgutil
from collections.abc import Callable, Generator, Sequence
from typing import NamedTuple, Protocol, cast

import torch

from sl_serve.config import ModelConfig
from sl_serve.errors import ModelError
from sl_serve.ops import CAUSAL, Ops, Scoring
from sl_serve.weights.fields import Fields
from sl_serve.weights.layout import LayerWeights, Param

SHARED_MODULES = frozenset({"parts", "rope", "generic"})
GENERIC = "generic"  # the family of what has no file here: transformers' modules, opened

# Our name -> (checkpoint name, shape): "embed", "head", and what else stands outside the layers.
StaticTensors = dict[str, tuple[str, tuple[int, ...]]]


class RopeTable(NamedTuple):
    cos: torch.Tensor  # (T, n_dims / 2)
    sin: torch.Tensor


class NewTokens(NamedTuple):
    """Of a sub-batch's new tokens; may lie in a scratch buffer that the next block uses too."""

    q: torch.Tensor  # (T, Hq, D)
    k: torch.Tensor  # (T, Hk, D)
    v: torch.Tensor
    scoring: Scoring = CAUSAL


# A layer's pass, in two halves: it yields once, and is sent what the tokens' attention gave,
# (T, Hq * D). Other blocks may run in between.
Block = Generator[NewTokens, torch.Tensor, None]


def finish(block: Block, attended: torch.Tensor) -> None:
    """Run the second half of a block."""
    try:
        block.send(attended)
    except StopIteration:
        return
    raise AssertionError("a block yields once")


def run_block(block: Block, attend: Callable[[NewTokens], torch.Tensor]) -> None:
    """Both halves of a block, with attention between them."""
    finish(block, attend(next(block)))


class Family(Protocol):
    """What a file in this folder offers."""

    def model_config(self, fields: Fields, generation: Fields) -> ModelConfig:
        """From config.json and generation_config.json. Raises ModelError for what the arithmetic
        does not do, by name: no field that changes results is ignored."""

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
        layer: int,
        w: LayerWeights,
        x: torch.Tensor,
        ropes: Sequence[RopeTable],
    ) -> Block:
        """Pass x (T, hidden) through the layer with this number, in place: yield the new tokens'
        queries, keys and values, receive their attention, go on. `ropes`: one for each of
        config.ropes. What the first half makes and the second needs must not lie in a scratch
        buffer."""

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
    if name not in (*supported_families(), GENERIC):
        supported = ", ".join(supported_families())
        raise ModelError(f"model type '{name}' is not supported; supported: {supported}")
    return cast(Family, importlib.import_module(f"{__name__}.{name}"))
