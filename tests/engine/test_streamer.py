from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import pytest
import torch

from sl_serve.device import CpuDevice, SimDevice, Stream
from sl_serve.device.sim import HardwareProfile, SlotReuseError
from sl_serve.weights.host import host_images
from sl_serve.weights.in_place import InPlaceWeights
from sl_serve.weights.layout import LayerLayout, LayerWeights, Param
from sl_serve.weights.source import WeightSource
from sl_serve.weights.store import LayerStore
from sl_serve.weights.streamer import StreamedWeights, weight_source

N_LAYERS = 5
LAYOUT = LayerLayout(
    [Param("matrix", (9, 11), ("m",), (11,)), Param("vector", (70,), ("v",), (70,))], torch.float32
)
LOOK_AHEADS = [0, 1, 2, 3]
CELLS_OF_STEPS = [(1, 1, 1), (2, 2, 2, 2), (7, 7, 7), (3, 1, 5, 2), (1, 8, 1)]
every_case = pytest.mark.parametrize("look_ahead", LOOK_AHEADS)
every_cell_count = pytest.mark.parametrize("cells", CELLS_OF_STEPS, ids=str)

# A layer crosses in one second; a cell of CELL_FLOPS computes for two.
PROFILE = HardwareProfile("test", LAYOUT.image_bytes, LAYOUT.image_bytes, 1.0)
CELL_FLOPS = 2.0


class RecordingDevice(SimDevice):
    """Keeps the sizes of all copies and buffers."""

    def __init__(self) -> None:
        super().__init__(PROFILE)
        self.copied_bytes: list[int] = []
        self.allocated_bytes: list[int] = []

    def copy(self, stream: Stream, dst: torch.Tensor, src: torch.Tensor, name: str = "") -> None:
        self.copied_bytes.append(dst.numel())
        super().copy(stream, dst, src, name)

    def empty(self, n_bytes: int) -> torch.Tensor:
        self.allocated_bytes.append(n_bytes)
        return super().empty(n_bytes)


class Cell(NamedTuple):
    unit: int
    n_cells: int
    seen: LayerWeights  # copies of what the cell's arithmetic read
    queued_bytes: list[int]  # copies issued by the cell's `advance`


def host_weights() -> LayerStore:
    images = host_images(LAYOUT, range(N_LAYERS))
    random = torch.Generator().manual_seed(5)
    for image in images.values():
        for view in LAYOUT.views(image, 0).values():
            view.normal_(generator=random)
    return LayerStore(LAYOUT, images)


def sweep(
    source: WeightSource, device: RecordingDevice, cells_of_steps: Sequence[int]
) -> list[Cell]:
    """What the step's double loop does with a source, without the model."""
    cells = []
    for step, n_cells in enumerate(cells_of_steps):
        for layer in range(N_LAYERS):
            weights = source.acquire()
            for part in range(n_cells):
                n_copies = len(device.copied_bytes)
                source.advance(part, n_cells)
                seen = {name: tensor.clone() for name, tensor in weights.items()}
                queued = device.copied_bytes[n_copies:]
                cells.append(Cell(step * N_LAYERS + layer, n_cells, seen, queued))
                device.computed(CELL_FLOPS, (source.buffer(),))
            source.release()
    return cells


def streamed(
    look_ahead: int, source_class: type[StreamedWeights] = StreamedWeights
) -> tuple[StreamedWeights, RecordingDevice]:
    device = RecordingDevice()
    return source_class(device, host_weights(), look_ahead), device


def right_bytes(cell: Cell, host: LayerStore) -> bool:
    expected = LAYOUT.views(host.host_images[cell.unit % N_LAYERS], 0)
    return all(torch.equal(seen, expected[name]) for name, seen in cell.seen.items())


@every_case
@every_cell_count
def test_every_cell_reads_the_bytes_of_its_layer(look_ahead: int, cells: tuple[int, ...]) -> None:
    source, device = streamed(look_ahead)
    found = sweep(source, device, cells)
    assert len(found) == N_LAYERS * sum(cells)
    assert all(right_bytes(cell, host_weights()) for cell in found)


@every_case
@every_cell_count
def test_each_layer_is_counted_once_per_step(look_ahead: int, cells: tuple[int, ...]) -> None:
    source, device = streamed(look_ahead)
    sweep(source, device, cells)
    assert source.n_bytes_moved == len(cells) * N_LAYERS * LAYOUT.image_bytes


@every_case
@every_cell_count
def test_copies_issued_are_those_counted_and_those_ahead(
    look_ahead: int, cells: tuple[int, ...]
) -> None:
    source, device = streamed(look_ahead)
    sweep(source, device, cells)
    assert sum(device.copied_bytes) == source.n_bytes_moved + source.n_bytes_ahead
    assert source.n_bytes_ahead == look_ahead * LAYOUT.image_bytes


@every_case
def test_bytes_ahead_are_right_in_the_middle_of_a_layer(look_ahead: int) -> None:
    source, device = streamed(look_ahead)
    source.acquire()
    for part in range(5):
        source.advance(part, 5)
        assert sum(device.copied_bytes) == source.n_bytes_moved + source.n_bytes_ahead


@every_case
@every_cell_count
def test_memory_is_one_slot_more_than_the_look_ahead(
    look_ahead: int, cells: tuple[int, ...]
) -> None:
    source, device = streamed(look_ahead)
    sweep(source, device, cells)
    assert device.allocated_bytes == [LAYOUT.image_bytes] * (look_ahead + 1)


@pytest.mark.parametrize("look_ahead", LOOK_AHEADS[1:])
@every_cell_count
def test_with_look_ahead_each_cell_queues_its_share_of_a_layer(
    look_ahead: int, cells: tuple[int, ...]
) -> None:
    source, device = streamed(look_ahead)
    for cell in sweep(source, device, cells):
        if cell.unit > 0:  # the first unit also fills the ring
            assert len(cell.queued_bytes) == 1
            assert abs(cell.queued_bytes[0] - LAYOUT.image_bytes / cell.n_cells) <= 1


def test_without_look_ahead_nothing_is_queued_before_it_is_acquired() -> None:
    source, device = streamed(0)
    assert all(cell.queued_bytes == [] for cell in sweep(source, device, (2, 3)))


def test_the_serial_twin_takes_the_sum_of_copies_and_arithmetic() -> None:
    source, device = streamed(0)
    sweep(source, device, (2, 2))
    assert device.time_s == pytest.approx(2 * N_LAYERS * (1.0 + 2 * CELL_FLOPS))
    assert device.stall_s() == pytest.approx(2 * N_LAYERS * 1.0)


@pytest.mark.parametrize("look_ahead", LOOK_AHEADS[1:])
def test_look_ahead_hides_the_copies_behind_longer_arithmetic(look_ahead: int) -> None:
    source, device = streamed(look_ahead)
    sweep(source, device, (2, 2))
    assert device.time_s == pytest.approx(1.0 + 2 * N_LAYERS * 2 * CELL_FLOPS)
    assert device.stall_s() == pytest.approx(1.0)  # the very first layer


class OneSlotTooFew(StreamedWeights):
    def __init__(self, device: SimDevice, host: LayerStore, look_ahead: int) -> None:
        super().__init__(device, host, look_ahead)
        for per_slot in (self._slots, self._views, self._released, self._loaded):
            per_slot.pop()


class ForgetsLoaded(StreamedWeights):
    def acquire(self) -> LayerWeights:
        self._unit += 1
        self._layer = self._unit % N_LAYERS
        self._queue_until(self._unit + 1, 0)
        return self._views[self._slot(self._unit)][self._layer]


class ForgetsReleased(StreamedWeights):
    def release(self) -> None:
        pass


def fault(source_class: type[StreamedWeights], look_ahead: int, cells: Sequence[int]) -> str:
    """How the simulated device shows that a source breaks the order; empty when it does not."""
    source, device = streamed(look_ahead, source_class)
    try:
        found = sweep(source, device, cells)
    except SlotReuseError:
        return "reused"
    poisoned = any(t.isnan().any() for cell in found for t in cell.seen.values())
    return "poisoned" if poisoned else ""


@every_case
@every_cell_count
def test_the_order_that_is_kept_shows_no_fault(look_ahead: int, cells: tuple[int, ...]) -> None:
    assert fault(StreamedWeights, look_ahead, cells) == ""


@pytest.mark.parametrize("look_ahead", LOOK_AHEADS[1:])
@every_cell_count
def test_a_ring_that_is_one_slot_too_small_is_noticed(
    look_ahead: int, cells: tuple[int, ...]
) -> None:
    assert fault(OneSlotTooFew, look_ahead, cells) != ""


@every_case
@every_cell_count
def test_a_forgotten_wait_for_loaded_is_noticed(look_ahead: int, cells: tuple[int, ...]) -> None:
    assert fault(ForgetsLoaded, look_ahead, cells) != ""


@every_case
@every_cell_count
def test_a_forgotten_released_is_noticed(look_ahead: int, cells: tuple[int, ...]) -> None:
    assert fault(ForgetsReleased, look_ahead, cells) == "reused"


def test_where_host_memory_is_device_memory_layers_are_used_where_they_lie() -> None:
    host = host_weights()
    source = weight_source(CpuDevice(), host, look_ahead=2)
    assert isinstance(source, InPlaceWeights)
    for unit in range(2 * N_LAYERS):
        image = host.host_images[unit % N_LAYERS]
        assert source.acquire()["matrix"].data_ptr() == image.data_ptr()
        source.advance(0, 1)
        assert source.buffer().data_ptr() == image.data_ptr()
        source.release()
        assert source.n_bytes_moved == (unit + 1) * LAYOUT.image_bytes


def test_a_device_with_memory_of_its_own_gets_the_ring() -> None:
    source = weight_source(SimDevice(), host_weights(), look_ahead=2)
    assert isinstance(source, StreamedWeights)
    assert source.look_ahead == 2
