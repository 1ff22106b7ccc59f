"""Where a step's layers come from, whatever tier they lie in."""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple, Protocol

import torch

from sl_serve.weights.layout import ExpertWeights, LayerWeights


class Fetched(NamedTuple):
    """Experts, ready to be computed with."""

    weights: ExpertWeights
    memory: Sequence[torch.Tensor]  # that they are read from


class WeightSource(Protocol):
    def begin(self, is_routed: bool) -> None:
        """Before a step's first layer. `is_routed`: it will need few of each layer's experts."""

    def acquire(self) -> LayerWeights:
        """The next layer but for its experts, ready to be computed with."""

    def experts(self, layer: int, chosen: Sequence[int]) -> Fetched:
        """Of an acquired layer, these at least. Valid until more are asked for, or the layer is
        released."""

    def advance(self, part: int, n_parts: int) -> None:
        """Called before each of the layer's n_parts cells: queue that cell's share of what comes
        next."""

    def release(self) -> None:
        """The layer acquired first, of those not released, has been computed with for this step."""

    def buffer(self) -> torch.Tensor:
        """The memory that the layer acquired last is read from."""

    def restart(self) -> None:
        """The step was given up, and nothing computes any more: the layers it did not come to pass
        by without being computed with, and the next one is the first."""

    @property
    def n_bytes_moved(self) -> int:
        """Bytes so far: of layers acquired, what came whether or not it was needed, and of experts
        asked for, those that were not there already."""
