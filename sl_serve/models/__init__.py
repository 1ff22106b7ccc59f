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

SHARED_MODULES = frozenset({"deepseek_gguf", "experts", "generic", "parts", "rope"})
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


class Routed(NamedTuple):
    """What a sub-batch's tokens ask of their layer's experts."""

    hidden: torch.Tensor  # (T, hidden), what the chosen are given; may lie in a scratch buffer
    experts: torch.Tensor  # (T, k) int64, no expert twice in a line
    weights: torch.Tensor  # (T, k), of what they make of it


# A layer's pass: it yields its new tokens, and is sent what their attention gave, (T, Hq * D). If
# the layer has experts it yields once more, and is sent the weighted sum of what those gave,
# (T, hidden). Other blocks may run in between.
Block = Generator[NewTokens | Routed, torch.Tensor, None]


def begin(block: Block) -> NewTokens:
    """Run a block up to its attention."""
    new = next(block)
    assert isinstance(new, NewTokens)
    return new


def go_on(block: Block, attended: torch.Tensor) -> Routed | None:
    """Run it up to its layer's experts; None: it has none, and has ended."""
    try:
        routed = block.send(attended)
    except StopIteration:
        return None
    assert isinstance(routed, Routed)
    return routed


def finish(block: Block, given: torch.Tensor) -> None:
    """Run what comes after the experts."""
    try:
        block.send(given)
    except StopIteration:
        return
    raise AssertionError("a block yields twice at most")


def run_block(
    block: Block,
    attend: Callable[[NewTokens], torch.Tensor],
    ask: Callable[[Routed], torch.Tensor],
) -> None:
    """All of a block, with attention and experts where they belong."""
    routed = go_on(block, attend(begin(block)))
    if routed is not None:
        finish(block, ask(routed))


class Family(Protocol):
    """What a file in this folder offers. If llama.cpp's converter writes the family, also `GGUF`, a
    GgufDialect."""

    def model_config(self, fields: Fields, generation: Fields) -> ModelConfig:
        """From config.json and generation_config.json. Raises ModelError for what the arithmetic
        does not do, by name: no field that changes results is ignored."""

    def layer_params(self, config: ModelConfig) -> tuple[Param, ...]:
        """The tensors of layers, in image order. `Param` says which are of some layers alone, and
        which each expert has."""

    def static_tensors(self, config: ModelConfig) -> StaticTensors:
        """Our name -> (checkpoint name, shape) of what is in no layer: "embed" and "head", both
        (vocabulary, width), "head_bias" (vocabulary,) where logits have one, and whatever else
        `hidden_states` and `head_input` need. Matrices are (out, in). Equal checkpoint names
        share one tensor."""

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
        queries, keys and values, receive their attention, go on; where there are experts, yield
        what is asked of them and receive what they gave. `ropes`: one for each of config.ropes.
        What is made before a yield and needed after it must not lie in a scratch buffer, and `w`
        is not read any more once the experts have been asked."""

    def expert(
        self, config: ModelConfig, ops: Ops, w: LayerWeights, x: torch.Tensor
    ) -> torch.Tensor:
        """What the expert with these tensors makes of x (n, hidden); may lie in a scratch buffer.
        Only where `layer_params` has experts'."""

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
