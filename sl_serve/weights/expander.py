"""Layers that are stored in blocks, made into plain ones on the device: once per layer and step."""

from __future__ import annotations

from collections.abc import Sequence

import torch

from sl_serve.device import Device
from sl_serve.ops import Ops
from sl_serve.weights.layout import ExpertWeights, LayerLayout, LayerWeights


class Expander:
    """A layer in the compute dtype, which all sub-batches of a step read; or two in turns, where a
    layer is begun before the last one has ended.

    Order. They are written and read on the compute stream alone, a layer after the other: no event
    is needed around them, and the stored bytes are free again as soon as they have been expanded.
    """

    def __init__(
        self, device: Device, ops: Ops, stored: LayerLayout, n_layers_in_use: int = 1
    ) -> None:
        self._stored, self._layout = stored, stored.expanded
        layout = self._layout
        self._buffers = [device.empty(layout.image_bytes) for _ in range(n_layers_in_use)]
        # By buffer and layer: layers may differ.
        self._views: dict[tuple[int, int], LayerWeights] = {}
        self._experts: dict[tuple[int, int], ExpertWeights] = {}
        self._buffer_of: dict[int, int] = {}  # by layer
        self._expanded: list[set[int]] = [set() for _ in self._buffers]  # experts in each
        self._device, self._ops = device, ops
        self._n_expanded = 0

    @property
    def buffer(self) -> torch.Tensor:
        """Of the layer expanded last."""
        return self._buffers[(self._n_expanded - 1) % len(self._buffers)]

    def expand(self, weights: LayerWeights, image: torch.Tensor, layer: int = 0) -> LayerWeights:
        """All of the layer but its experts. `weights` lie in `image`. The result is valid as long
        as the layer is in use."""
        index = self._n_expanded % len(self._buffers)
        self._n_expanded += 1
        self._buffer_of[layer], self._expanded[index] = index, set()
        key = (index, layer)
        if key not in self._views:
            self._views[key] = self._layout.views(self._buffers[index], layer)
            self._experts[key] = self._layout.experts(self._buffers[index], layer)
        views = self._views[key]
        self._expand(weights, views)
        n_bytes = image.numel() + self._layout.dense_bytes(layer)
        self._device.computed(0.0, (image,), "expansion", n_bytes)
        return views

    def expand_experts(
        self,
        layer: int,
        chosen: Sequence[int],
        stored: ExpertWeights,
        memory: Sequence[torch.Tensor],
    ) -> tuple[ExpertWeights, Sequence[torch.Tensor]]:
        """Of a layer in use, these at least, each expanded once; and the memory they lie in then.
        `stored`: as they are, in `memory`."""
        index = self._buffer_of[layer]
        views, done = self._experts[index, layer], self._expanded[index]
        new = [e for e in chosen if e not in done]
        for expert in new:
            self._expand(stored[expert], views[expert])
        done.update(new)
        n_bytes = sum(x.experts_bytes(layer, new) for x in (self._stored, self._layout))
        self._device.computed(0.0, memory, "expansion", n_bytes)
        return views, (self._buffers[index],)

    def _expand(self, weights: LayerWeights, views: LayerWeights) -> None:
        for name, out in views.items():
            self._ops.expand(weights[name], out)
