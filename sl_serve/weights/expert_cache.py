"""Experts that stay on the device because they were needed lately."""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Collection
from typing import NamedTuple

import torch

from sl_serve.device import Device
from sl_serve.weights.layout import LayerLayout, LayerWeights

Key = tuple[int, int]  # layer, expert


class CachedExpert(NamedTuple):
    memory: torch.Tensor
    weights: LayerWeights


class ExpertCache:
    """Places of one size, each with an expert of any layer; the one that was not needed for longest
    goes first.

    Order. Whoever fills a place waits for all computation queued so far, the last reader of what
    was there included.
    """

    def __init__(self, device: Device, layout: LayerLayout, n_bytes: int) -> None:
        """`n_bytes`: at most."""
        self._layout = layout
        place_bytes = layout.expert_bytes
        n_places = n_bytes // place_bytes if place_bytes else 0
        self._free = [device.empty(place_bytes) for _ in range(n_places)]
        self._held: OrderedDict[Key, CachedExpert] = OrderedDict()  # latest use last
        self._n_places = n_places

    def find(self, layer: int, expert: int) -> CachedExpert | None:
        """It counts as needed."""
        key = (layer, expert)
        if key not in self._held:
            return None
        self._held.move_to_end(key)
        return self._held[key]

    def take(self, layer: int, expert: int, kept: Collection[int]) -> CachedExpert | None:
        """A place for an expert that has none, to be filled; None where all are taken by others of
        the layer that are to be `kept`."""
        memory = self._free.pop() if self._free else self._take_back(layer, kept)
        if memory is None:
            return None
        taken = CachedExpert(memory, self._layout.expert_views(memory, layer, expert))
        self._held[layer, expert] = taken
        return taken

    def _take_back(self, layer: int, kept: Collection[int]) -> torch.Tensor | None:
        for held in self._held:
            if held[0] != layer or held[1] not in kept:
                return self._held.pop(held).memory
        return None

    def check_integrity(self) -> None:
        """Every place is free or has one expert."""
        addresses = {c.memory.data_ptr() for c in self._held.values()}
        addresses |= {m.data_ptr() for m in self._free}
        assert len(addresses) == self._n_places == len(self._held) + len(self._free)
