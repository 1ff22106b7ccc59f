"""Layers that are stored in blocks, made into plain ones on the device: once per layer and step."""

from __future__ import annotations

import torch

from sl_serve.device import Device
from sl_serve.ops import Ops
from sl_serve.weights.layout import LayerLayout, LayerWeights


class Expander:
    """One layer in the compute dtype, which all sub-batches of a step read.

    Order. It is written and read on the compute stream alone, a layer after the other: no event
    is needed around it, and the stored bytes are free again as soon as they have been expanded.
    """

    def __init__(self, device: Device, ops: Ops, stored: LayerLayout) -> None:
        layout = stored.expanded
        self.buffer = device.empty(layout.image_bytes)
        self._views: LayerWeights = layout.views(self.buffer, 0)
        self._device, self._ops = device, ops

    def expand(self, weights: LayerWeights, image: torch.Tensor) -> LayerWeights:
        """`weights` lie in `image`. The result is valid until the next call."""
        for name, out in self._views.items():
            self._ops.expand(weights[name], out)
        n_bytes = image.numel() + self.buffer.numel()
        self._device.computed(0.0, (image,), "expansion", n_bytes)
        return self._views
