"""Layers on their way to the device: acquired in order, step after step, each once per step.

Layers are numbered through all steps ("units": step * n_layers + layer), so the next one is
always the next number and the last layer of a step looks ahead to the first of the next.
"""

from __future__ import annotations

from typing import Protocol

import torch

from sl_serve.device import Device, Event, Stream
from sl_serve.weights.host import HostWeights
from sl_serve.weights.layout import LayerWeights


class WeightSource(Protocol):
    layer_bytes: int

    def acquire(self) -> LayerWeights:
        """The next layer, ready to be computed with."""

    def advance(self, part: int, n_parts: int) -> None:
        """Called before each of the layer's n_parts cells: queue that cell's share of what comes
        next."""

    def release(self) -> None:
        """The acquired layer has been computed with for this step."""

    def buffer(self) -> torch.Tensor:
        """The memory of the acquired layer."""

    @property
    def n_bytes_moved(self) -> int:
        """Bytes of all layers acquired so far."""


class InPlaceWeights:
    """Layers used where they lie."""

    def __init__(self, host: HostWeights) -> None:
        self.layer_bytes = host.layout.image_bytes
        self._images: list[torch.Tensor] = host.images
        self._views = [host.layout.views(image) for image in host.images]
        self._n_acquired = 0

    def acquire(self) -> LayerWeights:
        self._n_acquired += 1
        return self._views[(self._n_acquired - 1) % len(self._views)]

    def advance(self, part: int, n_parts: int) -> None:
        pass

    def release(self) -> None:
        pass

    def buffer(self) -> torch.Tensor:
        return self._images[(self._n_acquired - 1) % len(self._images)]

    @property
    def n_bytes_moved(self) -> int:
        return self._n_acquired * self.layer_bytes


class StreamedWeights:
    """A ring of look_ahead + 1 device slots filled from the host images.

    Order. Unit u lives in slot u mod n_slots. Its copy waits on the load stream for `released`
    of that slot, the event after the last computation that read unit u - n_slots; computation
    waits for `loaded`, the event after the copy's last share. While unit u computes, units up to
    u + look_ahead - 1 are queued whole and unit u + look_ahead, whose slot was freed by u - 1,
    follows in as many shares as there are cells, so that KV copies queued between them never
    wait for a whole layer. With look_ahead 0 a unit is queued when it is acquired: the serial
    twin.
    """

    def __init__(self, device: Device, host: HostWeights, look_ahead: int) -> None:
        self.layer_bytes = host.layout.image_bytes
        self.look_ahead = look_ahead
        self._device = device
        self._images = host.images
        n_slots = look_ahead + 1
        self._slots = [device.empty(self.layer_bytes) for _ in range(n_slots)]
        self._views = [host.layout.views(slot) for slot in self._slots]
        self._released: list[Event | None] = [None] * n_slots
        self._loaded: list[Event | None] = [None] * n_slots
        self._unit = -1  # the acquired one
        self._filling = 0  # the unit whose copy is being queued
        self._filled_bytes = 0  # how much of it is

    def acquire(self) -> LayerWeights:
        self._unit += 1
        self._queue_until(self._unit + 1, 0)
        slot = self._slot(self._unit)
        loaded = self._loaded[slot]
        assert loaded is not None
        self._device.wait(Stream.COMPUTE, loaded)
        return self._views[slot]

    def advance(self, part: int, n_parts: int) -> None:
        if self.look_ahead:
            share = self.layer_bytes * (part + 1) // n_parts
            self._queue_until(self._unit + self.look_ahead, share)

    def release(self) -> None:
        self._released[self._slot(self._unit)] = self._device.record(Stream.COMPUTE)

    def buffer(self) -> torch.Tensor:
        return self._slots[self._slot(self._unit)]

    @property
    def n_bytes_moved(self) -> int:
        return (self._unit + 1) * self.layer_bytes

    @property
    def n_bytes_ahead(self) -> int:
        """Bytes queued beyond the acquired unit."""
        return (self._filling - self._unit - 1) * self.layer_bytes + self._filled_bytes

    def _slot(self, unit: int) -> int:
        return unit % len(self._slots)

    def _queue_until(self, unit: int, n_bytes: int) -> None:
        """Queue all units before `unit`, and the first n_bytes of it."""
        while self._filling < unit:
            self._queue_to(self.layer_bytes)
        if self._filling == unit:
            self._queue_to(n_bytes)

    def _queue_to(self, end_bytes: int) -> None:
        """Bring the unit being filled to end_bytes; begin and finish it where that is due."""
        if end_bytes <= self._filled_bytes:
            return
        slot = self._slot(self._filling)
        released = self._released[slot]
        if self._filled_bytes == 0 and released is not None:
            self._device.wait(Stream.LOAD, released)
        image = self._images[self._filling % len(self._images)]
        share = slice(self._filled_bytes, end_bytes)
        self._device.copy(Stream.LOAD, self._slots[slot][share], image[share])
        self._filled_bytes = end_bytes
        if end_bytes == self.layer_bytes:
            self._loaded[slot] = self._device.record(Stream.LOAD)
            self._filling += 1
            self._filled_bytes = 0


def weight_source(device: Device, host: HostWeights, look_ahead: int) -> WeightSource:
    return InPlaceWeights(host) if device.in_place else StreamedWeights(device, host, look_ahead)
