"""Layers that are computed with where they lie."""

from __future__ import annotations

from collections.abc import Sequence

import torch

from sl_serve.weights.layout import ExpertWeights, LayerWeights
from sl_serve.weights.source import Fetched
from sl_serve.weights.store import LayerStore


class InPlaceWeights:
    """Layers used where they lie: in host memory, or in the disk tier's ring."""

    def __init__(self, store: LayerStore) -> None:
        self._store = store
        # By address and layer: images are few, and so are slots.
        self._views: dict[tuple[int, int], LayerWeights] = {}
        self._experts: dict[tuple[int, int], ExpertWeights] = {}
        self._asked: set[int] = set()  # experts of the acquired layer
        self._image: torch.Tensor | None = None
        self._n_acquired = 0
        self._n_released = 0
        self.n_bytes_moved = 0

    def begin(self, is_routed: bool) -> None:
        self._store.begin(is_routed)

    def acquire(self) -> LayerWeights:
        layer = self._n_acquired % self._store.n_layers
        self._image = image = self._store.acquire(layer)
        self._n_acquired += 1
        self.n_bytes_moved += self._store.layout.dense_bytes(layer)
        self._asked = set()
        key = (image.data_ptr(), layer)
        if key not in self._views:
            self._views[key] = self._store.layout.views(image, layer)
            self._experts[key] = self._store.layout.experts(image, layer)
        return self._views[key]

    def experts(self, layer: int, chosen: Sequence[int]) -> Fetched:
        image, layout = self.buffer(), self._store.layout
        new = set(chosen) - self._asked
        self._asked |= new
        self._store.fetch(layer, new)
        self.n_bytes_moved += layout.experts_bytes(layer, new)
        return Fetched(self._experts[image.data_ptr(), layer], (image,))

    def advance(self, part: int, n_parts: int) -> None:
        pass

    def release(self) -> None:
        self._store.release(self._n_released % self._store.n_layers)
        self._n_released += 1

    def restart(self) -> None:
        if self._n_released < self._n_acquired:
            self.release()
        while self._n_acquired % self._store.n_layers:
            self.acquire()
            self.release()

    def buffer(self) -> torch.Tensor:
        assert self._image is not None
        return self._image
