"""What several families' files are made of: their tensors and their products."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from functools import partial

import torch
from torch.nn import functional as F

from sl_serve.errors import ModelError
from sl_serve.ops import Ops
from sl_serve.weights.fields import Fields
from sl_serve.weights.layout import LayerWeights, Param


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


def norm_heads(ops: Ops, x: torch.Tensor, weight: torch.Tensor, eps: float) -> None:
    """RMSNorm of each head of x (T, heads, D) by itself, in place."""
    x.copy_(ops.rms_norm(x.reshape(-1, x.shape[-1]), weight, eps).view(x.shape))


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
