"""What several families' files are made of: their tensors and their products."""

from __future__ import annotations

from collections.abc import Mapping

import torch

from sl_serve.ops import Ops
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


def linear(ops: Ops, name: str, x: torch.Tensor, w: LayerWeights) -> torch.Tensor:
    return ops.linear(name, x, w[name], w.get(f"{name}_bias"))


def add_linear(ops: Ops, name: str, x: torch.Tensor, h: torch.Tensor, w: LayerWeights) -> None:
    ops.add_linear_(x, h, w[name], w.get(f"{name}_bias"))
