"""Attention of the cells of a step: by the device that computes, or beside it by the processor."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Protocol

import torch

from sl_serve.core import SubBatchPlan
from sl_serve.kv.access import KVAccess
from sl_serve.kv.pool import Slab
from sl_serve.ops import CAUSAL, Ops, Scoring


class Attention(Protocol):
    """Between the halves of a cell: `start` after the first, `finish` before the second."""

    @property
    def n_bytes_down(self) -> int:
        """Of KV, or of what attention gave, that came to the device (or was read in place)."""

    @property
    def n_bytes_up(self) -> int:
        """Of queries and new K and V that went to the host (or were written in place)."""

    def begin(self, sub_batches: Sequence[SubBatchPlan], slabs: Mapping[int, Slab]) -> list[bool]:
        """Take in the step's sub-batches; their slabs have room for the new tokens. True for
        those that are attended to beside the device: other cells may run meanwhile."""

    def start(
        self,
        cell: int,
        q: torch.Tensor,
        k: torch.Tensor,
        v: torch.Tensor,
        scoring: Scoring = CAUSAL,
    ) -> None:
        """q (T, Hq, D), k and v (T, Hk, D) of the cell's new tokens; they may be overwritten as
        soon as this returns. Cells are started in order."""

    def finish(self, cell: int) -> torch.Tensor:
        """What attention gave, (T, Hq * D), for the compute stream. Of a cell whose sub-batch is
        attended to by the device, called before another is started."""

    def restart(self) -> None:
        """The step was given up: returns when nothing of it is attended to any more."""

    def close(self) -> None:
        """After the last step."""


class DeviceAttention:
    """Where the device computes: in place, in windows, or in KV that stays there."""

    def __init__(self, ops: Ops, kv: KVAccess) -> None:
        self._ops, self._kv = ops, kv
        self._attended: torch.Tensor | None = None

    @property
    def n_bytes_down(self) -> int:
        return self._kv.n_bytes_down

    @property
    def n_bytes_up(self) -> int:
        return self._kv.n_bytes_up

    def begin(self, sub_batches: Sequence[SubBatchPlan], slabs: Mapping[int, Slab]) -> list[bool]:
        self._kv.begin(sub_batches, slabs)
        return [False] * len(sub_batches)

    def start(
        self,
        cell: int,
        q: torch.Tensor,
        k: torch.Tensor,
        v: torch.Tensor,
        scoring: Scoring = CAUSAL,
    ) -> None:
        region, table = self._kv.open(cell)
        self._ops.append(region, table, k, v)
        self._attended = self._ops.attend(region, table, q, k.shape[1], scoring)
        self._kv.close(cell, k, v)

    def finish(self, cell: int) -> torch.Tensor:
        attended, self._attended = self._attended, None
        assert attended is not None
        return attended

    def restart(self) -> None:
        self._attended = None

    def close(self) -> None:
        pass
