"""Layers on their way to the device: acquired in order, step after step, each once per step.

Layers are numbered through all steps ("units": step * n_layers + layer), so the next one is
always the next number and the last layer of a step looks ahead to the first of the next.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from functools import partial
from typing import NamedTuple

import torch

from sl_serve.device import Device, Event, Stream
from sl_serve.host_memory import host_empty
from sl_serve.weights.expander import Expander
from sl_serve.weights.expert_cache import ExpertCache
from sl_serve.weights.in_place import InPlaceWeights
from sl_serve.weights.layout import LayerLayout, LayerWeights
from sl_serve.weights.source import Fetched, WeightSource
from sl_serve.weights.store import LayerStore


class StreamedWeights:
    """A ring of look_ahead + 1 device slots, or more, filled from a store, beside layers that stay
    on the device; units are counted without those.

    Order. Unit u lives in slot u mod n_slots. Its copy waits on the load stream for `released`
    of that slot, the event after the last computation that read unit u - n_slots; computation
    waits for `loaded`, the event after the copy's last share. While unit u computes, units up to
    u + look_ahead - 1 are queued whole and unit u + look_ahead, whose slot was freed by u - 1,
    follows in as many shares as there are cells until u + 1, resident layers included, so that KV
    copies queued between them never wait for a whole layer. With look_ahead 0 a unit is queued
    when it is acquired: the serial twin.

    A layer that is stored in blocks is expanded when it is acquired, and that is the last
    computation to read its slot: with look-ahead the slot is released there, before the layer's
    cells. Layers that stay on the device stay as stored too, and are expanded in every step: as
    many more of them fit, and a byte that crosses the link costs more than some read here.
    """

    def __init__(
        self,
        device: Device,
        store: LayerStore,
        look_ahead: int,
        resident: Mapping[int, torch.Tensor] | None = None,
        expander: Expander | None = None,
        n_slots: int | None = None,
        cache_bytes: int = 0,
    ) -> None:
        """`store` has the streamed layers, `resident` the images of the others; `expander` is
        needed if any of them is not plain. `n_slots`: one more where a layer is acquired before
        the last one is released. `cache_bytes`: for experts, beside all that."""
        self.look_ahead = look_ahead
        self._device = device
        self._store = store
        self._expander = expander
        self._layout = layout = store.layout
        self._resident = dict(resident or {})
        self._resident_views = {i: layout.views(m, i) for i, m in self._resident.items()}
        n_layers = store.n_layers + len(self._resident)
        self._streamed = [i for i in range(n_layers) if i not in self._resident]
        self._phases = [_phase(i, self._streamed, n_layers) for i in range(n_layers)]
        n_slots = (n_slots or look_ahead + 1) if self._streamed else 0
        self._slots = [device.empty(layout.image_bytes) for _ in range(n_slots)]
        # Any layer comes into any slot.
        self._views = [{i: layout.views(s, i) for i in self._streamed} for s in self._slots]
        self._experts = [{i: layout.experts(s, i) for i in self._streamed} for s in self._slots]
        self._resident_experts = {i: layout.experts(m, i) for i, m in self._resident.items()}
        self._arrived = [_Arrived(0, set()) for _ in self._slots]
        self._cache = ExpertCache(device, layout, cache_bytes)
        self._is_routed = False
        self._unit_of: dict[int, int] = {}  # of streamed layers that are in use
        self._released: list[Event | None] = [None] * n_slots
        self._loaded: list[Event | None] = [None] * n_slots
        self._layer = -1  # the acquired one
        self._unit = -1  # the last streamed one that was acquired
        self._filling = 0  # the unit whose copy is being queued
        self._filled_bytes = 0  # how much of it is
        self._image: torch.Tensor | None = None  # what it is copied from
        self._n_layers_acquired = 0
        self._n_layers_released = 0
        self._n_units_released = 0
        self.n_bytes_moved = 0

    def begin(self, is_routed: bool) -> None:
        self._is_routed = is_routed

    def acquire(self) -> LayerWeights:
        self._layer = layer = self._n_layers_acquired % len(self._phases)
        self._n_layers_acquired += 1
        if layer in self._resident:
            return self._ready(self._resident_views[layer], self._resident[layer])
        self._unit += 1
        self._unit_of[layer] = self._unit
        self._queue_until(self._unit + 1, 0)
        slot = self._slot(self._unit)
        self._make_up_for(layer, slot)
        self.n_bytes_moved += self._arrived[slot].n_bytes
        loaded = self._loaded[slot]
        assert loaded is not None
        self._device.wait(Stream.COMPUTE, loaded)
        weights = self._ready(self._views[slot][layer], self._slots[slot])
        if self._leaves_its_slot_at_once(layer):
            self._released[slot] = self._device.record(Stream.COMPUTE)
        return weights

    def experts(self, layer: int, chosen: Sequence[int]) -> Fetched:
        if layer in self._resident:
            stored = Fetched(self._resident_experts[layer], (self._resident[layer],))
        else:
            stored = self._fetch(layer, self._slot(self._unit_of[layer]), chosen)
        if self._layout.is_plain(layer):
            return stored
        assert self._expander is not None
        return Fetched(*self._expander.expand_experts(layer, chosen, *stored))

    def advance(self, part: int, n_parts: int) -> None:
        if self.look_ahead and self._streamed:
            n_before, n_layers = self._phases[self._layer]
            n_cells = n_before * n_parts + part + 1
            unit = self._unit + self.look_ahead
            share = self._unit_bytes(unit) * n_cells // (n_layers * n_parts)
            self._queue_until(unit, share)

    def release(self) -> None:
        layer = self._n_layers_released % len(self._phases)
        self._n_layers_released += 1
        if layer in self._resident:
            return
        self._unit_of.pop(layer, None)
        slot = self._slot(self._n_units_released)
        self._n_units_released += 1
        if not self._leaves_its_slot_at_once(layer):
            self._released[slot] = self._device.record(Stream.COMPUTE)

    def restart(self) -> None:
        while self._n_layers_released < self._n_layers_acquired:
            self.release()
        while self._n_layers_acquired % len(self._phases):
            self.acquire()
            self.advance(0, 1)
            self.release()

    def buffer(self) -> torch.Tensor:
        if self._expander is not None and not self._layout.is_plain(self._layer):
            return self._expander.buffer
        if self._layer in self._resident:
            return self._resident[self._layer]
        return self._slots[self._slot(self._unit)]

    @property
    def n_bytes_ahead(self) -> int:
        """Bytes queued beyond the acquired unit."""
        queued = range(self._unit + 1, self._filling)
        return sum(self._arrived[self._slot(u)].n_bytes for u in queued) + self._filled_bytes

    def _leaves_its_slot_at_once(self, layer: int) -> bool:
        """Not in the serial twin, where nothing is to come down beside the arithmetic, and not
        where experts are still to be expanded."""
        stays = self._layout.is_plain(layer) or self._layout.n_experts(layer) > 0
        return self.look_ahead > 0 and not stays

    def _ready(self, weights: LayerWeights, image: torch.Tensor) -> LayerWeights:
        """The acquired layer, which lies in `image`, in the compute dtype."""
        if self._layout.is_plain(self._layer):
            return weights
        assert self._expander is not None
        stored = image[: self._layout.dense_bytes(self._layer)]
        return self._expander.expand(weights, stored, self._layer)

    def _slot(self, unit: int) -> int:
        return unit % len(self._slots)

    def _unit_bytes(self, unit: int) -> int:
        """What of a unit is queued before it is acquired."""
        layer = self._streamed[unit % len(self._streamed)]
        if self._is_routed and layer in self._store.host_images:
            return self._layout.dense_bytes(layer)
        return self._layout.stored_bytes(layer)

    def _make_up_for(self, layer: int, slot: int) -> None:
        """Queue what of the acquired unit the step before did not expect to be needed."""
        arrived, n_bytes = self._arrived[slot].n_bytes, self._unit_bytes(self._unit)
        if arrived < n_bytes:
            rest = slice(arrived, n_bytes)
            image = self._store.host_images[layer]
            self._device.copy(Stream.LOAD, self._slots[slot][rest], image[rest], "weights")
            self._loaded[slot] = self._device.record(Stream.LOAD)
            self._arrived[slot] = _Arrived(n_bytes, set())

    def _fetch(self, layer: int, slot: int, chosen: Sequence[int]) -> Fetched:
        """Bring experts that are neither in the slot nor in the cache to one of them."""
        arrived = self._arrived[slot]
        weights = {}
        memory = [self._slots[slot]]
        missing = []
        for expert in chosen:
            stop = self._layout.expert_range(layer, expert).stop
            if stop <= arrived.n_bytes or expert in arrived.experts:
                weights[expert] = self._experts[slot][layer][expert]
            elif (cached := self._cache.find(layer, expert)) is not None:
                weights[expert] = cached.weights
                memory.append(cached.memory)
            else:
                missing.append(expert)
        if missing:
            self._device.wait(Stream.LOAD, self._device.record(Stream.COMPUTE))
            for expert in missing:
                weights[expert] = self._copy_expert(layer, slot, expert, chosen, memory)
            self._device.wait(Stream.COMPUTE, self._device.record(Stream.LOAD))
        return Fetched(weights, memory)

    def _copy_expert(
        self, layer: int, slot: int, expert: int, kept: Sequence[int], memory: list[torch.Tensor]
    ) -> LayerWeights:
        """To the cache, unless that is full of experts that are to be kept."""
        place = self._layout.expert_range(layer, expert)
        taken = self._cache.take(layer, expert, kept)
        if taken is None:
            to, weights = self._slots[slot][place], self._experts[slot][layer][expert]
            self._arrived[slot].experts.add(expert)
        else:
            to, weights = taken.memory[: place.stop - place.start], taken.weights
            memory.append(taken.memory)
        self._device.copy(Stream.LOAD, to, self._store.host_images[layer][place], "experts")
        self.n_bytes_moved += to.numel()
        return weights

    def _queue_until(self, unit: int, n_bytes: int) -> None:
        """Queue all units before `unit`, and the first n_bytes of it."""
        while self._filling < unit:
            self._queue_to(self._unit_bytes(self._filling))
        if self._filling == unit:
            self._queue_to(n_bytes)

    def _queue_to(self, end_bytes: int) -> None:
        """Bring the unit being filled to end_bytes; begin and finish it where that is due."""
        slot = self._slot(self._filling)
        layer = self._streamed[self._filling % len(self._streamed)]
        if end_bytes > self._filled_bytes:
            if self._filled_bytes == 0:
                self._image = self._store.acquire(layer)
                released = self._released[slot]
                if released is not None:
                    self._device.wait(Stream.LOAD, released)
            assert self._image is not None
            share = slice(self._filled_bytes, end_bytes)
            self._device.copy(Stream.LOAD, self._slots[slot][share], self._image[share], "weights")
            self._filled_bytes = end_bytes
        # More than that where a step of the other kind began it.
        if self._filled_bytes >= self._unit_bytes(self._filling):
            self._loaded[slot] = loaded = self._device.record(Stream.LOAD)
            self._store.release(layer, partial(self._device.synchronize, loaded))
            self._arrived[slot] = _Arrived(self._filled_bytes, set())
            self._filling += 1
            self._filled_bytes = 0


class _Arrived(NamedTuple):
    """What of a unit is in its slot, or on its way there."""

    n_bytes: int  # so many of its first ones
    experts: set[int]  # and these behind them


def _phase(layer: int, streamed: list[int], n_layers: int) -> tuple[int, int]:
    """Layers since the last streamed one, and from that to the next one, around the end."""
    if not streamed:
        return 0, n_layers
    last = max((i for i in streamed if i <= layer), default=streamed[-1] - n_layers)
    after = min((i for i in streamed if i > layer), default=streamed[0] + n_layers)
    return layer - last, after - last


def load_resident(
    device: Device,
    layout: LayerLayout,
    layers: Sequence[int],
    load: Callable[[int, torch.Tensor], None],
) -> dict[int, torch.Tensor]:
    """Bring layers to the device for good; `load` fills a host image with one of them.

    That image is ordinary memory: pinned memory would stay ours until the end.
    """
    images = {}
    host = host_empty(layout.image_bytes)
    for layer in layers:
        load(layer, host)
        images[layer] = device.empty(layout.image_bytes)
        device.copy(Stream.LOAD, images[layer], host, "weights")
        device.synchronize(device.record(Stream.LOAD))
    return images


def weight_source(
    device: Device,
    store: LayerStore,
    look_ahead: int,
    resident: Mapping[int, torch.Tensor] | None = None,
    expander: Expander | None = None,
    n_slots: int | None = None,
    cache_bytes: int = 0,
) -> WeightSource:
    """`resident`: images on the device of layers that `store` does not have. `expander`: for
    layers that a device gets as stored. `cache_bytes`: for experts on the device."""
    if device.in_place:
        return InPlaceWeights(store)
    return StreamedWeights(device, store, look_ahead, resident, expander, n_slots, cache_bytes)
