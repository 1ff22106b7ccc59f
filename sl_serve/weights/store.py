"""Where layers are when no step needs them: host memory, or files below it."""

from __future__ import annotations

from collections.abc import Iterable, Mapping

import torch

from sl_serve.weights.disk import DiskRing, Done
from sl_serve.weights.layout import LayerLayout


class LayerStore:
    """Layers 0 to n - 1, acquired in that order, over and over. Owns all images."""

    def __init__(
        self,
        layout: LayerLayout,
        host_images: Mapping[int, torch.Tensor],
        disk: DiskRing | None = None,
        n_disk_layers: int = 0,
    ) -> None:
        """`host_images`: layer -> its bytes; the others are on `disk`."""
        self.layout = layout
        self.host_images = host_images
        self.n_layers = len(host_images) + n_disk_layers
        self._disk = disk

    def begin(self, is_routed: bool) -> None:
        """A step begins. `is_routed`: of layers on disk, experts will be fetched."""
        if self._disk is not None:
            self._disk.begin(is_routed)

    def acquire(self, layer: int) -> torch.Tensor:
        """The layer's bytes, in a routed step but for its experts; valid until released. Raises
        WeightReadError."""
        image = self.host_images.get(layer)
        if image is not None:
            return image
        assert self._disk is not None
        return self._disk.acquire(layer)

    def fetch(self, layer: int, experts: Iterable[int]) -> None:
        """Of an acquired layer, bring these. Raises WeightReadError."""
        if layer not in self.host_images:
            assert self._disk is not None
            self._disk.fetch(layer, experts)

    def release(self, layer: int, done: Done | None = None) -> None:
        """The layer is no longer read, or not once `done` has returned."""
        if layer not in self.host_images:
            assert self._disk is not None
            self._disk.release(done)

    @property
    def n_disk_bytes_read(self) -> int:
        return self._disk.n_bytes_read if self._disk else 0

    def close(self) -> None:
        if self._disk:
            self._disk.close()
