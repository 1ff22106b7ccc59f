"""What several families' files are made of: their tensors and their products."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import partial

import torch
from torch.nn import functional as F

from sl_serve.config import ModelConfig
from sl_serve.errors import ModelError
from sl_serve.models import RopeTable
from sl_serve.ops import CAUSAL, Ops, Scoring
from sl_serve.weights.fields import Fields
from sl_serve.weights.layout import LayerWeights, Param


@dataclass(frozen=True, slots=True)
class WindowedConfig(ModelConfig):
    """Of a model some of whose layers see only the last tokens."""

    # Of each layer: how many tokens, a token itself included; None: all.
    windows: tuple[int | None, ...] = ()

    def scoring(self, layer: int) -> Scoring:
        window = self.windows[layer]
        # The quicker way where no text outgrows the window.
        is_none = window is None or window >= self.max_positions
        return CAUSAL if is_none else Scoring(window=window)


@dataclass(frozen=True, slots=True)
class PartlyRotatedConfig(WindowedConfig):
    """Of a model some of whose layers do not rotate."""

    rotates: tuple[bool, ...] = ()  # of each layer

    def rope(self, layer: int, ropes: Sequence[RopeTable]) -> RopeTable | None:
        return ropes[0] if self.rotates[layer] else None


def linear_params(
    name: str, n_in: int, outputs: Mapping[str, int], bias: bool
) -> tuple[Param, ...]:
    """`outputs`: checkpoint module -> its number of outputs; several are joined into one matrix.
    With `bias`, its vector is called `name`_bias."""
    rows = tuple(outputs.values())
    weights = tuple(f"{module}.weight" for module in outputs)
    matrix = Param(name, (n_in, sum(rows)), weights, rows)
    if not bias:
        return (matrix,)
    biases = tuple(f"{module}.bias" for module in outputs)
    return (matrix, Param(f"{name}_bias", (sum(rows),), biases, rows))


def vector_param(name: str, source: str, size: int) -> Param:
    return Param(name, (size,), (source,), (size,))


def layer_norm_params(name: str, module: str, size: int) -> tuple[Param, ...]:
    """The vectors that `layer_norm` wants."""
    bias = vector_param(f"{name}_bias", f"{module}.bias", size)
    return (vector_param(name, f"{module}.weight", size), bias)


def norm_heads(ops: Ops, x: torch.Tensor, weight: torch.Tensor, eps: float) -> None:
    """RMSNorm of each head of x (T, heads, D) by itself, in place."""
    x.copy_(ops.rms_norm(x.reshape(-1, x.shape[-1]), weight, eps).view(x.shape))


def layer_norm_heads(x: torch.Tensor, weights: torch.Tensor, eps: float) -> None:
    """LayerNorm of each head of x (T, heads, D) with its own of `weights` (heads * D), in place."""
    x.copy_(F.layer_norm(x, x.shape[-1:], eps=eps).mul_(weights.view(x.shape[1:])))


def pairs_apart_(x: torch.Tensor, rope: RopeTable) -> None:
    """Of the elements of each head of x (T, heads, D) that turn, those that do so as neighbours
    (2i, 2i + 1) come to stand as far apart as `Ops.rope_` has them. Queries and keys that are both
    changed so have the same products as before."""
    turning = x[..., : 2 * rope.cos.shape[1]]
    turning.copy_(torch.cat((turning[..., 0::2], turning[..., 1::2]), dim=-1))


def layer_norm(ops: Ops, name: str, x: torch.Tensor, w: LayerWeights, eps: float) -> torch.Tensor:
    """LayerNorm of the lines of x (T, H) with the vectors `name` and `name`_bias."""
    return ops.layer_norm(x, w[name], w[f"{name}_bias"], eps)


Activation = Callable[[torch.Tensor], torch.Tensor]
_GELU_TANH = partial(F.gelu, approximate="tanh")
ACTIVATIONS: Mapping[str, Activation] = {
    "silu": F.silu,
    "swish": F.silu,
    "gelu": F.gelu,
    "gelu_new": _GELU_TANH,
    "gelu_fast": _GELU_TANH,
    "gelu_pytorch_tanh": _GELU_TANH,
    "relu": F.relu,
}


def activation_name(fields: Fields, key: str, default: str) -> str:
    """One of ACTIVATIONS. Raises ModelError for another."""
    name = fields.text(key, default)
    if name not in ACTIVATIONS:
        known = ", ".join(ACTIVATIONS)
        raise ModelError(f"{fields.source}: {key} {name[:40]!r} is not supported ({known})")
    return name


def gated(ops: Ops, activation: str, gate_up: torch.Tensor) -> torch.Tensor:
    """The activation of the first half of each line times the second: (T, 2 I) -> (T, I)."""
    if ACTIVATIONS[activation] is F.silu:
        return ops.silu_mul(gate_up)
    gate, up = gate_up.chunk(2, dim=-1)
    return ACTIVATIONS[activation](gate).mul_(up)


def linear(ops: Ops, name: str, x: torch.Tensor, w: LayerWeights) -> torch.Tensor:
    return ops.linear(name, x, w[name], w.get(f"{name}_bias"))


def add_linear(ops: Ops, name: str, x: torch.Tensor, h: torch.Tensor, w: LayerWeights) -> None:
    ops.add_linear_(x, h, w[name], w.get(f"{name}_bias"))


def product(ops: Ops, name: str, h: torch.Tensor, w: LayerWeights) -> torch.Tensor:
    """What `add_linear` would add, for a family that does more to it first. One scratch buffer
    serves all."""
    return ops.linear("product", h, w[name], w.get(f"{name}_bias"))
