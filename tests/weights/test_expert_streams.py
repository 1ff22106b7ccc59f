"""Experts that are fetched: no order of copies kept by luck (as in test_streamer.py), and the cache
of those that were asked for."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import pytest
import torch

from sl_serve.device import SimDevice, Stream
from sl_serve.device.sim import HardwareProfile, SlotReuseError
from sl_serve.ops import TorchOps
from sl_serve.weights.expander import Expander
from sl_serve.weights.expert_cache import ExpertCache
from sl_serve.weights.host import host_images
from sl_serve.weights.layout import LayerLayout
from sl_serve.weights.source import Fetched
from sl_serve.weights.store import LayerStore
from sl_serve.weights.streamer import StreamedWeights
from tests.weights.expert_layouts import LAYOUT, N_LAYERS, every_layout

PROFILE = HardwareProfile("test", 1e5, 1e5, 1.0, 1e6)


def store_of(layout: LayerLayout) -> LayerStore:
    images = host_images(layout, range(N_LAYERS))
    for layer, image in images.items():
        for e, weights in [(-1, layout.views(image, layer)), *layout.experts(image, layer).items()]:
            for weight in weights.values():
                if isinstance(weight, torch.Tensor):
                    weight.fill_(100 * layer + e)
                else:
                    weight.parts[0].data.fill_(layer + e)
    return LayerStore(layout, images)


def sweep(
    source: StreamedWeights, device: SimDevice, kinds: Sequence[bool]
) -> list[tuple[int, int, torch.Tensor]]:
    """(layer, expert, its bias) of what was read; of each layer two experts of five, asked for by
    two cells that share one."""
    seen = []
    for n, routed in enumerate(kinds):
        source.begin(routed)
        for layer in range(N_LAYERS):
            source.acquire()
            for part in range(2):
                source.advance(part, 2)
                device.computed(2.0, (source.buffer(),))
            for chosen in ([n % 4, 4], [4, (n + 2) % 4]) if layer % 2 else ():
                fetched = source.experts(layer, chosen)
                seen += [(layer, e, fetched.weights[e]["bias"].clone()) for e in chosen]
                device.computed(3.0, fetched.memory)
            source.release()
    return seen


KINDS = [True, True, False, True, False, False, True]


def fault(
    layout: LayerLayout,
    look_ahead: int,
    kind: type[StreamedWeights] = StreamedWeights,
    resident: Sequence[int] = (),
    n_cached: int = 0,
) -> str:
    device, host = SimDevice(PROFILE), store_of(layout)
    on_device = {i: host.host_images[i] for i in resident}
    streamed = {i: m for i, m in host.host_images.items() if i not in on_device}
    expander = None if layout is LAYOUT else Expander(device, TorchOps(torch.float32), layout)
    cache_bytes = n_cached * layout.expert_bytes
    source = kind(
        device,
        LayerStore(layout, streamed),
        look_ahead,
        on_device,
        expander,
        cache_bytes=cache_bytes,
    )
    try:
        seen = sweep(source, device, KINDS)
    except SlotReuseError:
        return "reused"
    assert device.n_bytes_down == source.n_bytes_moved + source.n_bytes_ahead
    source._cache.check_integrity()
    for layer, expert, bias in seen:
        if bias.isnan().any():
            return "poisoned"
        if not (bias == 100 * layer + expert).all():
            return "wrong"
    return ""


every_case = pytest.mark.parametrize("look_ahead", [0, 1, 2, 3])


@every_case
@every_layout
@pytest.mark.parametrize("resident", [(), (1,), (0, 3), range(N_LAYERS)], ids=str)
@pytest.mark.parametrize("n_cached", [0, 1, 3, 30])
def test_every_expert_that_is_read_is_there(
    layout: LayerLayout, look_ahead: int, resident: Sequence[int], n_cached: int
) -> None:
    assert fault(layout, look_ahead, resident=resident, n_cached=n_cached) == ""


class ForgetsToWait(StreamedWeights):
    """For the experts that it fetches."""

    def _fetch(self, layer: int, slot: int, chosen: Sequence[int]) -> Fetched:
        wait = self._device.wait

        def only_load(stream: Stream, event: Any) -> None:
            if stream is Stream.LOAD:
                wait(stream, event)

        self._device.wait = only_load  # type: ignore[method-assign]
        try:
            return super()._fetch(layer, slot, chosen)
        finally:
            self._device.wait = wait  # type: ignore[method-assign]


class FetchesTooEarly(StreamedWeights):
    """Before the computation that has the slot."""

    def _fetch(self, layer: int, slot: int, chosen: Sequence[int]) -> Fetched:
        wait = self._device.wait
        self._device.wait = lambda stream, event: (  # type: ignore[method-assign]
            None if stream is Stream.LOAD else wait(stream, event)
        )
        try:
            return super()._fetch(layer, slot, chosen)
        finally:
            self._device.wait = wait  # type: ignore[method-assign]


class MakesUpForNothing(StreamedWeights):
    def _make_up_for(self, layer: int, slot: int) -> None:
        n_bytes = max(self._arrived[slot].n_bytes, self._unit_bytes(self._unit))
        self._arrived[slot] = self._arrived[slot]._replace(n_bytes=n_bytes)


@every_case
@every_layout
@pytest.mark.parametrize("n_cached", [0, 2])
def test_faults_are_noticed(layout: LayerLayout, look_ahead: int, n_cached: int) -> None:
    assert fault(layout, look_ahead, ForgetsToWait, n_cached=n_cached) != ""
    assert fault(layout, look_ahead, FetchesTooEarly, n_cached=n_cached) == "reused"


@pytest.mark.parametrize("look_ahead", [2, 3])  # the first layer has no experts
@every_layout
def test_a_part_that_is_not_made_up_for_is_noticed(layout: LayerLayout, look_ahead: int) -> None:
    with pytest.raises(AssertionError):
        assert fault(layout, look_ahead, MakesUpForNothing) == ""


def test_the_cache_gives_up_what_was_not_needed_for_longest() -> None:
    cache = ExpertCache(SimDevice(), LAYOUT, 3 * LAYOUT.expert_bytes + 1)
    memory = {}
    for expert in (0, 1, 2):
        taken = cache.take(1, expert, [])
        assert taken is not None
        memory[expert] = taken.memory.data_ptr()
    found = cache.find(1, 0)
    assert found is not None and found.memory.data_ptr() == memory[0]
    taken = cache.take(3, 0, [0])
    assert taken is not None and taken.memory.data_ptr() == memory[1]
    assert cache.find(1, 1) is None and cache.find(1, 2) is not None
    # (1, 0) is the oldest now, and to be kept.
    taken = cache.take(1, 4, [0, 4])
    assert taken is not None and taken.memory.data_ptr() == memory[1]
    assert cache.take(1, 1, [0, 1, 2, 4]) is None
    cache.check_integrity()


def test_views_of_a_cached_expert_are_its_own() -> None:
    cache = ExpertCache(SimDevice(), LAYOUT, LAYOUT.expert_bytes)
    image = torch.randint(0, 100, (LAYOUT.image_bytes,), dtype=torch.uint8)
    taken = cache.take(3, 2, [])
    assert taken is not None
    taken.memory.copy_(image[LAYOUT.expert_range(3, 2)])
    expected = LAYOUT.experts(image, 3)[2]
    assert taken.weights.keys() == expected.keys()
    assert all(torch.equal(taken.weights[name], expected[name]) for name in expected)


def test_what_the_cache_has_does_not_cross_again() -> None:
    moved = []
    for n_cached in (0, 30):
        device = SimDevice(PROFILE)
        size = n_cached * LAYOUT.expert_bytes
        source = StreamedWeights(device, store_of(LAYOUT), 0, cache_bytes=size)
        sweep(source, device, [True] * 10)
        moved.append(source.n_bytes_moved)
    dense = 10 * sum(LAYOUT.dense_bytes(i) for i in range(N_LAYERS))
    # Of two layers five experts; three in a step.
    assert moved[1] == dense + 2 * 5 * LAYOUT.expert_bytes
    assert moved[0] == dense + 10 * 2 * 3 * LAYOUT.expert_bytes
