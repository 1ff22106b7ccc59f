"""Layers that stay on the device beside those that stream through the ring."""

from __future__ import annotations

import pytest
import torch

from sl_serve.device import CpuDevice, Stream
from sl_serve.weights.host import host_images
from sl_serve.weights.store import LayerStore
from sl_serve.weights.streamer import (
    InPlaceWeights,
    StreamedWeights,
    load_resident,
    weight_source,
)
from tests.engine.test_streamer import (
    LAYOUT,
    LOOK_AHEADS,
    N_LAYERS,
    Cell,
    RecordingDevice,
    host_weights,
    right_bytes,
    sweep,
)

RESIDENT = [set(), {0}, {4}, {1, 3}, {0, 1, 4}, {0, 1, 2, 3}, {0, 1, 2, 3, 4}]
every_set = pytest.mark.parametrize("resident", RESIDENT, ids=str)
every_look_ahead = pytest.mark.parametrize("look_ahead", LOOK_AHEADS)


def source_with(resident: set[int], look_ahead: int) -> tuple[StreamedWeights, RecordingDevice]:
    device, every = RecordingDevice(), host_weights().host_images
    streamed = [i for i in range(N_LAYERS) if i not in resident]
    images = host_images(LAYOUT, streamed)
    for layer in streamed:
        images[layer].copy_(every[layer])
    on_device = load_resident(
        device, LAYOUT, sorted(resident), lambda layer, image: image.copy_(every[layer])
    )
    device.copied_bytes.clear()
    source = weight_source(device, LayerStore(LAYOUT, images), look_ahead, on_device)
    assert isinstance(source, StreamedWeights)
    return source, device


def swept(resident: set[int], look_ahead: int) -> tuple[list[Cell], StreamedWeights, list[int]]:
    source, device = source_with(resident, look_ahead)
    return sweep(source, device, (2, 3, 1)), source, device.copied_bytes


@every_set
@every_look_ahead
def test_every_cell_reads_the_bytes_of_its_layer(resident: set[int], look_ahead: int) -> None:
    cells, _, _ = swept(resident, look_ahead)
    assert len(cells) == N_LAYERS * 6
    assert all(right_bytes(cell, host_weights()) for cell in cells)


@every_set
@every_look_ahead
def test_only_the_others_move(resident: set[int], look_ahead: int) -> None:
    _, source, copied_bytes = swept(resident, look_ahead)
    assert source.n_bytes_moved == 3 * (N_LAYERS - len(resident)) * LAYOUT.image_bytes
    assert sum(copied_bytes) == source.n_bytes_moved + source.n_bytes_ahead


@every_set
@every_look_ahead
def test_residents_take_the_place_of_no_slot(resident: set[int], look_ahead: int) -> None:
    _, device = source_with(resident, look_ahead)
    n_slots = look_ahead + 1 if len(resident) < N_LAYERS else 0
    assert device.allocated_bytes == [LAYOUT.image_bytes] * (len(resident) + n_slots)


@pytest.mark.parametrize("look_ahead", LOOK_AHEADS[1:])
def test_a_copy_is_spread_over_the_residents_before_it(look_ahead: int) -> None:
    """Layers 0 and 2 stream: 4 cells of layers 0 and 1, then 6 cells of layers 2, 3 and 4."""
    source, device = source_with({1, 3, 4}, look_ahead)
    cells = sweep(source, device, (2, 2, 2))
    for cell in cells[2 * N_LAYERS :]:
        n_cells = 4 if cell.unit % N_LAYERS < 2 else 6
        assert len(cell.queued_bytes) == 1
        assert abs(cell.queued_bytes[0] - LAYOUT.image_bytes / n_cells) <= 1


def test_residents_alone_never_wait_and_never_copy() -> None:
    source, device = source_with({0, 1, 2, 3, 4}, 1)
    device.stall_s()
    sweep(source, device, (2, 2))
    assert device.copied_bytes == [] and device.stall_s() == 0.0


def test_each_resident_is_loaded_once_through_one_host_image() -> None:
    device = RecordingDevice()
    seen: list[tuple[int, int]] = []

    def load(layer: int, image: torch.Tensor) -> None:
        seen.append((layer, image.data_ptr()))
        image.fill_(layer)

    images = load_resident(device, LAYOUT, [3, 1], load)
    assert [layer for layer, _ in seen] == [3, 1]
    assert len({address for _, address in seen}) == 1
    assert all((images[i] == i).all() for i in (1, 3))
    assert device.record(Stream.LOAD).n_copies == 2


def test_where_host_memory_is_device_memory_nothing_is_resident() -> None:
    assert isinstance(weight_source(CpuDevice(), host_weights(), 1, {}), InPlaceWeights)
