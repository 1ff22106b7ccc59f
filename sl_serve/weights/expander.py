"""Layers that are stored in blocks, made into plain ones on the device: once per layer and step."""

from __future__ import annotations

import torch

from sl_serve.device import Device
from sl_serve.ops import Ops
from sl_serve.weights.layout import LayerLayout, LayerWeights


class Expander:
    """A layer in the compute dtype, which all sub-batches of a step read; or two in turns, where a
    layer is begun before the last one has ended.

    Order. They are written and read on the compute stream alone, a layer after the other: no event
    is needed around them, and the stored bytes are free again as soon as they have been expanded.
    """

    def __init__(
        self, device: Device, ops: Ops, stored: LayerLayout, n_layers_in_use: int = 1
    ) -> None:
        layout = stored.expanded
        self._buffers = [device.empty(layout.image_bytes) for _ in range(n_layers_in_use)]
        self._views: list[LayerWeights] = [layout.views(b, 0) for b in self._buffers]
        self._device, self._ops = device, ops
        self._n_expanded = 0

    @property
    def buffer(self) -> torch.Tensor:
        """Of the layer expanded last."""
        return self._buffers[(self._n_expanded - 1) % len(self._buffers)]

    def expand(self, weights: LayerWeights, image: torch.Tensor) -> LayerWeights:
        """`weights` lie in `image`. The result is valid as long as the layer is in use."""
        views = self._views[self._n_expanded % len(self._buffers)]
        self._n_expanded += 1
        for name, out in views.items():
            self._ops.expand(weights[name], out)
        n_bytes = image.numel() + self.buffer.numel()
        self._device.computed(0.0, (image,), "expansion", n_bytes)
        return views
