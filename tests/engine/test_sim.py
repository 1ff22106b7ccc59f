from __future__ import annotations

import pytest
import torch

from sl_serve.device import SimDevice, Stream
from sl_serve.device.sim import HardwareProfile, SlotReuseError

# 10 bytes/s down, 5 bytes/s up, 100 FLOP/s
SLOW = HardwareProfile("slow", 10.0, 5.0, 100.0)


def host(*values: int) -> torch.Tensor:
    return torch.tensor(values, dtype=torch.uint8)


def is_poison(memory: torch.Tensor) -> bool:
    return memory.tolist() == [0xFF] * len(memory)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16, torch.float64])
def test_fresh_memory_is_nan_in_every_float_format(dtype: torch.dtype) -> None:
    assert SimDevice().empty(64).view(dtype).isnan().all()


def test_a_queued_copy_poisons_its_destination_until_someone_waits() -> None:
    device = SimDevice()
    slot = host(1, 2, 3)
    device.copy(Stream.LOAD, slot, host(4, 5, 6))
    assert is_poison(slot)
    device.wait(Stream.COMPUTE, device.record(Stream.LOAD))
    assert slot.tolist() == [4, 5, 6]


def test_the_host_may_wait_too() -> None:
    device = SimDevice()
    slot = device.empty(2)
    device.copy(Stream.STORE, slot, host(7, 8))
    device.synchronize(device.record(Stream.STORE))
    assert slot.tolist() == [7, 8]


def test_a_wait_completes_the_copies_before_its_event_and_no_others() -> None:
    device = SimDevice()
    first, second, other = device.empty(1), device.empty(1), device.empty(1)
    device.copy(Stream.LOAD, first, host(1))
    event = device.record(Stream.LOAD)
    device.copy(Stream.LOAD, second, host(2))
    device.copy(Stream.STORE, other, host(3))
    device.wait(Stream.COMPUTE, event)
    assert first.tolist() == [1]
    assert is_poison(second) and is_poison(other)


def test_an_event_recorded_before_a_copy_does_not_complete_it() -> None:
    device = SimDevice()
    event = device.record(Stream.LOAD)
    slot = device.empty(1)
    device.copy(Stream.LOAD, slot, host(1))
    device.wait(Stream.COMPUTE, event)
    assert is_poison(slot)


def test_the_source_is_read_when_the_copy_is_waited_for() -> None:
    device = SimDevice()
    slot, source = device.empty(2), host(1, 2)
    device.copy(Stream.LOAD, slot, source)
    source[1] = 9  # too early: the copy has not read it
    device.wait(Stream.COMPUTE, device.record(Stream.LOAD))
    assert slot.tolist() == [1, 9]


def test_a_copy_is_done_once_and_later_writes_stay() -> None:
    device = SimDevice()
    slot = device.empty(1)
    device.copy(Stream.LOAD, slot, host(1))
    event = device.record(Stream.LOAD)
    device.wait(Stream.COMPUTE, event)
    slot[0] = 5
    device.wait(Stream.COMPUTE, event)
    assert slot.tolist() == [5]


def test_lengths_that_differ_are_refused() -> None:
    device = SimDevice()
    with pytest.raises(AssertionError):
        device.copy(Stream.LOAD, device.empty(2), host(1))


def test_the_clock_of_a_worked_example() -> None:
    device = SimDevice(SLOW)
    slot = device.empty(20)
    device.copy(Stream.LOAD, slot, torch.zeros(20, dtype=torch.uint8))  # load: 0 to 2 s
    loaded = device.record(Stream.LOAD)
    assert loaded.time_s == pytest.approx(2.0)
    device.computed(100, ())  # compute: 0 to 1 s, beside the copy
    device.wait(Stream.COMPUTE, loaded)  # compute waits from 1 to 2 s
    device.computed(300, (slot,))  # 2 to 5 s
    device.wait(Stream.STORE, device.record(Stream.COMPUTE))  # store starts at 5 s
    device.copy(Stream.STORE, torch.zeros(10, dtype=torch.uint8), slot[:10])  # 5 to 7 s
    device.copy(Stream.LOAD, device.empty(40), torch.zeros(40, dtype=torch.uint8))  # 2 to 6 s
    assert device.record(Stream.LOAD).time_s == pytest.approx(6.0)
    assert device.record(Stream.COMPUTE).time_s == pytest.approx(5.0)
    assert device.record(Stream.STORE).time_s == pytest.approx(7.0)
    assert device.time_s == pytest.approx(7.0)
    assert device.stall_s() == pytest.approx(1.0)


def test_stalls_add_up_until_they_are_asked_for() -> None:
    device = SimDevice(SLOW)
    for _ in range(2):
        device.copy(Stream.LOAD, device.empty(30), torch.zeros(30, dtype=torch.uint8))
        device.wait(Stream.COMPUTE, device.record(Stream.LOAD))
        device.computed(100, ())
    # The second copy, from 3 to 6 s, is waited for from 4 s on.
    assert device.stall_s() == pytest.approx(3.0 + 2.0)
    assert device.stall_s() == 0.0


def test_waiting_for_what_has_happened_is_no_stall() -> None:
    device = SimDevice(SLOW)
    device.copy(Stream.LOAD, device.empty(10), torch.zeros(10, dtype=torch.uint8))
    device.computed(500, ())
    device.wait(Stream.COMPUTE, device.record(Stream.LOAD))
    assert device.stall_s() == 0.0
    assert device.time_s == pytest.approx(5.0)


def test_copies_that_wait_for_the_arithmetic_are_no_stall() -> None:
    device = SimDevice(SLOW)
    device.computed(500, ())
    for stream in (Stream.LOAD, Stream.STORE):
        device.wait(stream, device.record(Stream.COMPUTE))
        assert device.record(stream).time_s == pytest.approx(5.0)
    assert device.stall_s() == 0.0


@pytest.mark.parametrize("part", [slice(0, 4), slice(6, 8)])
def test_a_copy_into_memory_that_is_still_read_is_an_error(part: slice) -> None:
    device = SimDevice(SLOW)
    slot = device.empty(8)
    device.computed(250, (slot,))
    with pytest.raises(SlotReuseError, match=r"starts at 0\.000000 s .* read until 2\.500000 s"):
        device.copy(Stream.LOAD, slot[part], torch.zeros_like(slot[part]))


def test_a_copy_that_waits_for_the_last_reader_is_none() -> None:
    device = SimDevice(SLOW)
    slot = device.empty(8)
    device.computed(250, (slot,))
    device.computed(250, ())  # reads something else
    device.wait(Stream.LOAD, device.record(Stream.COMPUTE))
    device.copy(Stream.LOAD, slot, torch.zeros_like(slot))
    assert device.record(Stream.LOAD).time_s == pytest.approx(5.8)


def test_a_wait_for_an_earlier_reader_does_not_do() -> None:
    device = SimDevice(SLOW)
    slot = device.empty(8)
    device.computed(100, (slot,))
    too_early = device.record(Stream.COMPUTE)
    device.computed(1, (slot,))
    device.wait(Stream.LOAD, too_early)
    with pytest.raises(SlotReuseError):
        device.copy(Stream.LOAD, slot, torch.zeros_like(slot))


def test_a_copy_into_another_buffer_need_not_wait() -> None:
    device = SimDevice(SLOW)
    slot, other = device.empty(8), device.empty(8)
    device.computed(250, (slot,))
    device.copy(Stream.LOAD, other, torch.zeros_like(other))
    assert device.record(Stream.LOAD).time_s == pytest.approx(0.8)
