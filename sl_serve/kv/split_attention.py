"""Sub-batches whose KV stays on the device, attended to there, beside those of the host."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import NamedTuple

import torch

from sl_serve.core import SubBatchPlan
from sl_serve.kv.attention import Attention
from sl_serve.kv.pool import Slab
from sl_serve.ops import CAUSAL, Scoring


class _Place(NamedTuple):
    """A sub-batch among those of its kind."""

    attention: Attention
    number: int
    n_of_kind: int


class SplitAttention:
    """Each kind counts its own cells only."""

    def __init__(self, on_device: Attention, on_host: Attention) -> None:
        self._on_device, self._on_host = on_device, on_host
        self._places: list[_Place] = []

    @property
    def n_bytes_down(self) -> int:
        return self._on_device.n_bytes_down + self._on_host.n_bytes_down

    @property
    def n_bytes_up(self) -> int:
        return self._on_device.n_bytes_up + self._on_host.n_bytes_up

    def begin(self, sub_batches: Sequence[SubBatchPlan], slabs: Mapping[int, Slab]) -> list[bool]:
        stays = [slabs[s.rows[0].slab].on_device for s in sub_batches]
        is_beside = [False] * len(stays)
        self._places = [_Place(self._on_device, 0, 0)] * len(stays)
        for attention, kind in ((self._on_device, True), (self._on_host, False)):
            of_kind = [i for i, on_device in enumerate(stays) if on_device is kind]
            beside = attention.begin([sub_batches[i] for i in of_kind], slabs)
            for number, (i, b) in enumerate(zip(of_kind, beside, strict=True)):
                self._places[i] = _Place(attention, number, len(of_kind))
                is_beside[i] = b
        return is_beside

    def start(
        self,
        cell: int,
        q: torch.Tensor,
        k: torch.Tensor,
        v: torch.Tensor,
        scoring: Scoring = CAUSAL,
    ) -> None:
        attention, own_cell = self._own(cell)
        attention.start(own_cell, q, k, v, scoring)

    def finish(self, cell: int) -> torch.Tensor:
        attention, own_cell = self._own(cell)
        return attention.finish(own_cell)

    def restart(self) -> None:
        self._on_device.restart()
        self._on_host.restart()

    def close(self) -> None:
        self._on_device.close()
        self._on_host.close()

    def _own(self, cell: int) -> tuple[Attention, int]:
        layer, sub_batch = divmod(cell, len(self._places))
        place = self._places[sub_batch]
        return place.attention, layer * place.n_of_kind + place.number
