"""Tensors of one number, which a GGUF file has among its settings: a list with one per layer."""

from __future__ import annotations

from collections.abc import Collection, Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import torch

from sl_serve.errors import CheckpointError, ModelError
from sl_serve.weights.fields import shown
from sl_serve.weights.formats import Format, plain
from sl_serve.weights.gguf_dialect import GgufDialect
from sl_serve.weights.layout import source_name
from sl_serve.weights.wrapped import WrappedCheckpoint

if TYPE_CHECKING:
    from sl_serve.weights.checkpoint import Checkpoint  # which opens these

_ONE_PER_CENT = 0.01  # constants were rounded to bfloat16 on their way


def with_numbers(checkpoint: Checkpoint, numbers: Mapping[str, float]) -> Checkpoint:
    """`checkpoint` itself where there are none."""
    return WithNumbers(checkpoint, numbers) if numbers else checkpoint


class WithNumbers(WrappedCheckpoint):
    def __init__(self, inner: Checkpoint, numbers: Mapping[str, float]) -> None:
        super().__init__(inner)
        self._numbers = numbers
        self._names = {*inner.names(), *numbers}

    def names(self) -> Collection[str]:
        return self._names

    def shape(self, name: str) -> tuple[int, ...]:
        return (1,) if name in self._numbers else super().shape(name)

    def format(self, name: str) -> Format:
        return plain(torch.float32) if name in self._numbers else super().format(name)

    def read(self, name: str) -> torch.Tensor:
        number = self._numbers.get(name)
        return super().read(name) if number is None else torch.tensor([number])


def layer_numbers(
    dialect: GgufDialect, settings: Mapping[str, Any], n_layers: int, path: Path
) -> dict[str, float]:
    """Tensor -> what it is. Raises ModelError for constants that are others than the family's,
    CheckpointError for a list of another length."""
    for key, value in dialect.constants.items():
        given = settings.get(key, value)
        is_number = isinstance(given, np.ndarray | float)
        if not is_number or not np.allclose(given, value, rtol=_ONE_PER_CENT, atol=0):
            raise ModelError(f"{path}: {key} {shown(given)} is not supported (only {value})")
    return {
        source_name(template, layer): number
        for template, key in dialect.numbers.items()
        for layer, number in enumerate(_list(settings, key, n_layers, path))
    }


def _list(settings: Mapping[str, Any], key: str, n_layers: int, path: Path) -> list[float]:
    values = settings.get(key)
    if not isinstance(values, np.ndarray) or values.dtype != np.float32 or len(values) != n_layers:
        raise CheckpointError(f"{path}: {key} must be {n_layers} numbers, not {shown(values)}")
    numbers: list[float] = values.tolist()
    return numbers
