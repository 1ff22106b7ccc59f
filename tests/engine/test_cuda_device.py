"""CudaDevice's own logic, without a GPU: what is pinned, staged, ordered, said and given back."""

from __future__ import annotations

import logging
import mmap
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path

import pytest
import torch

from sl_serve.device import CudaDevice, HostWork, Stream, open_device
from sl_serve.errors import MemoryBudgetError, UserError
from tests.engine.fake_cuda import (
    SLOT_BYTES,
    FakeRuntime,
    FakeStream,
    LazyCudaDevice,
    fake_cuda,
)
from tests.engine.running import GREEDY, config, engine, random_prompts, run, steps_of
from tests.models import write_tiny_llama

CPU = torch.device("cpu")


@pytest.fixture
def runtime() -> FakeRuntime:
    return FakeRuntime()


@pytest.fixture
def device(runtime: FakeRuntime) -> Iterator[LazyCudaDevice]:
    with fake_cuda(runtime):
        yield LazyCudaDevice(CPU)


def numbers(n: int, seed: int = 0) -> torch.Tensor:
    random = torch.Generator().manual_seed(seed)
    return torch.randint(0, 256, (n,), dtype=torch.uint8, generator=random)


@pytest.mark.skipif(torch.cuda.is_available(), reason="needs a machine without a GPU")
def test_without_a_gpu_the_error_says_what_to_do(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.version, "cuda", None)
    with pytest.raises(UserError, match=r"built without CUDA; install one .* or use --device cpu"):
        open_device("cuda")
    monkeypatch.setattr(torch.version, "cuda", "12.8")
    with pytest.raises(UserError, match=r"nvidia-smi .* CUDA_VISIBLE_DEVICES"):
        open_device("cuda")


@pytest.mark.parametrize("n_bytes", [1, 4096, 5_000_001])
def test_host_memory_is_registered_in_its_exact_size(
    device: LazyCudaDevice, runtime: FakeRuntime, n_bytes: int
) -> None:
    buffer = device.host_empty(n_bytes)
    assert runtime.registered == {buffer.data_ptr(): n_bytes}
    assert buffer.data_ptr() % mmap.PAGESIZE == 0
    assert buffer.numel() == n_bytes


def test_closing_gives_every_registration_back(
    device: LazyCudaDevice, runtime: FakeRuntime
) -> None:
    for n_bytes in (10, 20, 30):
        device.host_empty(n_bytes)  # the device keeps it alive: nobody else does
    assert len(runtime.registered) == 3
    device.close()
    assert runtime.registered == {}


def test_closing_finishes_what_is_under_way(device: LazyCudaDevice) -> None:
    source, slot = device.host_empty(8), device.empty(8)
    source.fill_(7)
    device.copy(Stream.LOAD, slot, source)
    device.close()
    assert slot.tolist() == [7] * 8


def test_memory_that_cannot_be_registered_is_used_all_the_same(
    caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch
) -> None:
    runtime = FakeRuntime(limit_bytes=100)
    with fake_cuda(runtime), caplog.at_level(logging.WARNING):
        device = LazyCudaDevice(CPU)
        cleared: list[bool] = []
        monkeypatch.setattr(device._pinned, "_clear_error", lambda: cleared.append(True))
        small, large, larger = (device.host_empty(n) for n in (100, 3 << 30, 4 << 30))
    assert (small in device._pinned, large in device._pinned) == (True, False)
    assert large.numel() == 3 << 30 and larger.numel() == 4 << 30
    assert len(cleared) == runtime.n_refused == 2
    (warning,) = caplog.messages
    assert "3.0 GiB of host memory could not be page-locked (CUDA error 2)" in warning
    assert "ulimit -l unlimited" in warning and "half the link's rate" in warning


def test_the_error_of_a_refusal_is_cleared_by_a_launch_that_fails(
    device: LazyCudaDevice, monkeypatch: pytest.MonkeyPatch
) -> None:
    launched: list[float] = []

    def fill(tensor: torch.Tensor, value: float) -> torch.Tensor:
        launched.append(value)
        raise RuntimeError("CUDA error: out of memory")

    monkeypatch.setattr(torch.Tensor, "fill_", fill)
    device._clear_error()
    assert len(launched) == 1


def test_a_part_of_registered_memory_is_registered(device: LazyCudaDevice) -> None:
    buffer = device.host_empty(100)
    assert buffer[50:60] in device._pinned
    assert torch.empty(10, dtype=torch.uint8) not in device._pinned


SIZES = [1, SLOT_BYTES - 1, SLOT_BYTES, SLOT_BYTES + 1, 4 * SLOT_BYTES, 11 * SLOT_BYTES + 5]


@pytest.mark.parametrize("n_bytes", SIZES)
def test_ordinary_memory_is_copied_through_slots(device: LazyCudaDevice, n_bytes: int) -> None:
    source, slot = numbers(n_bytes), device.empty(n_bytes)
    expected = source.clone()
    device.copy(Stream.LOAD, slot, source)
    source.zero_()  # the caller's again at once
    device.wait(Stream.COMPUTE, device.record(Stream.LOAD))
    assert torch.equal(slot, expected)


def test_slots_of_several_copies_do_not_overwrite_each_other(device: LazyCudaDevice) -> None:
    sources = [numbers(3 * SLOT_BYTES + i, seed=i) for i in range(9)]
    targets = [device.empty(len(s)) for s in sources]
    for source, target in zip(sources, targets, strict=True):
        device.copy(Stream.LOAD, target, source)
    device.synchronize(device.record(Stream.LOAD))
    assert all(torch.equal(s, t) for s, t in zip(sources, targets, strict=True))


def test_registered_memory_is_read_by_the_copy_itself(device: LazyCudaDevice) -> None:
    source, slot = device.host_empty(10), device.empty(10)
    device.copy(Stream.LOAD, slot, source)
    source.fill_(9)  # before the copy runs
    device.wait(Stream.COMPUTE, device.record(Stream.LOAD))
    assert slot.tolist() == [9] * 10


def test_an_event_covers_what_was_queued_before_it(device: LazyCudaDevice) -> None:
    source = device.host_empty(2)
    source.fill_(5)
    first, second = torch.zeros(2, dtype=torch.uint8), torch.zeros(2, dtype=torch.uint8)
    device.copy(Stream.STORE, first, source)
    event = device.record(Stream.STORE)
    device.copy(Stream.STORE, second, source)
    device.wait(Stream.COMPUTE, event)
    assert (first.tolist(), second.tolist()) == ([5, 5], [0, 0])


@pytest.mark.parametrize(
    "tensor",
    [
        torch.arange(6).view(2, 3),
        torch.arange(60, dtype=torch.float32).view(6, 10).t(),
        torch.tensor([True, False]),
        torch.randn(400, dtype=torch.bfloat16),
        torch.empty(0, 4),
    ],
    ids=["int64", "transposed", "bool", "bfloat16", "empty"],
)
def test_an_upload_is_a_copy_of_its_own(device: LazyCudaDevice, tensor: torch.Tensor) -> None:
    expected = tensor.clone()
    changed = tensor.clone()
    uploaded = device.upload(changed)
    changed.zero_()
    assert uploaded.dtype == expected.dtype
    assert torch.equal(uploaded, expected)


def test_copies_run_on_their_own_stream(
    runtime: FakeRuntime, monkeypatch: pytest.MonkeyPatch
) -> None:
    entered: list[FakeStream] = []

    @contextmanager
    def stream(of: FakeStream) -> Iterator[None]:
        entered.append(of)
        yield

    with fake_cuda(runtime):
        monkeypatch.setattr(torch.cuda, "stream", stream)
        device = CudaDevice(CPU)
        source, target = device.host_empty(3), device.empty(3)
        source.fill_(4)
        for name in (Stream.LOAD, Stream.STORE):
            device.copy(name, target, source)
    assert entered == [device._streams[Stream.LOAD], device._streams[Stream.STORE]]
    assert target.tolist() == [4, 4, 4]


def test_lengths_that_differ_are_refused(device: LazyCudaDevice) -> None:
    with pytest.raises(AssertionError):
        device.copy(Stream.LOAD, device.empty(2), device.host_empty(1))


def test_too_little_gpu_memory_is_told_with_numbers(
    device: LazyCudaDevice, monkeypatch: pytest.MonkeyPatch
) -> None:
    def empty(*_: object, **__: object) -> torch.Tensor:
        raise torch.OutOfMemoryError

    monkeypatch.setattr(torch.cuda, "mem_get_info", lambda: (1 << 30, 24 << 30))
    monkeypatch.setattr(torch, "empty", empty)
    with pytest.raises(
        MemoryBudgetError, match=r"2\.0 GiB of GPU memory .* 1\.0 GiB of 24\.0 GiB are free; lower"
    ):
        device.empty(2 << 30)


def test_a_gpu_without_bfloat16_is_told_before_loading(
    device: LazyCudaDevice, monkeypatch: pytest.MonkeyPatch
) -> None:
    device.check_dtype(torch.bfloat16)
    monkeypatch.setattr(torch.cuda, "is_bf16_supported", lambda including_emulation: False)
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda: "Tesla T4")
    device.check_dtype(torch.float16)
    with pytest.raises(UserError, match=r"Tesla T4 has no bfloat16 .* --dtype float16"):
        device.check_dtype(torch.bfloat16)


def test_a_timeline_has_every_copy_and_computation(device: LazyCudaDevice) -> None:
    source, slot = device.host_empty(4), device.empty(4)
    device.copy(Stream.LOAD, slot, source, "before")
    device.start_timeline()
    device.copy(Stream.LOAD, slot, source, "weights")
    device.wait(Stream.COMPUTE, device.record(Stream.LOAD))
    device.computed(1.0, (slot,), "layer")
    device.copy(Stream.STORE, source, slot, "new KV")
    spans = device.take_timeline()
    assert [(s.stream, s.name) for s in spans] == [
        ("load", "weights"),
        ("compute", "layer"),
        ("store", "new KV"),
    ]
    assert all(0 < s.start_s < s.stop_s for s in spans)
    load, layer, _ = spans
    assert layer.start_s > load.stop_s  # it waited
    device.copy(Stream.LOAD, slot, source, "after")
    assert device.take_timeline() == []


def test_what_the_processor_did_is_counted_from_where_the_timeline_starts(
    device: LazyCudaDevice,
) -> None:
    began_s = time.perf_counter()
    device.start_timeline()
    started_s = time.perf_counter()
    after = device.record(Stream.STORE)
    work = HostWork(started_s + 1.0, started_s + 3.0)
    assert device.host_read(after, 10, work, "attention") is after
    device.computed(1.0, (), "layer")
    layer, host = device.take_timeline()
    assert (layer.name, host.stream, host.name) == ("layer", "host", "attention")
    assert host.stop_s - host.start_s == pytest.approx(2.0)
    assert 1.0 <= host.start_s <= 1.0 + started_s - began_s
    assert device.host_read(after, 10, work, "attention") is after  # not noted any more
    assert device.take_timeline() == []


def test_stalls_are_what_the_arithmetic_waited_since_they_were_asked_for(
    device: LazyCudaDevice,
) -> None:
    for _ in range(2):
        device.wait(Stream.COMPUTE, device.record(Stream.LOAD))
    device.wait(Stream.LOAD, device.record(Stream.COMPUTE))
    assert device.stall_s() == pytest.approx(2 * 1e-3)  # a millisecond between any two events
    assert device.stall_s() == 0.0


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("tiny")
    write_tiny_llama(folder)
    return folder


@pytest.mark.parametrize(
    ("limit_bytes", "look_ahead"),
    [(1 << 60, 2), (0, 1), (200_000, 0)],
    ids=["all-pinned", "none-pinned", "some-pinned"],
)
def test_an_engine_on_it_gives_the_same_tokens_as_the_processor(
    folder: Path,
    limit_bytes: int,
    look_ahead: int,
    caplog: pytest.LogCaptureFixture,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """Whatever part of host memory may be pinned, and with copies as late as they may be."""
    prompts, greedy = random_prompts(7, longest=50, seed=4), replace(GREEDY, max_tokens=8)
    with engine(folder, replace(config(max_rows=7), n_threads=1)) as running:
        expected = run(running, prompts, greedy)
    settings = config(max_rows=7, n_sub_batches=2, look_ahead=look_ahead, prefill_chunk_tokens=32)
    runtime = FakeRuntime(limit_bytes)
    with fake_cuda(runtime, slot_bytes=4096):
        device = LazyCudaDevice(CPU)
        monkeypatch.setattr(device, "_clear_error", lambda: None)
        with engine(folder, replace(settings, n_threads=1), device) as running:
            assert (runtime.n_refused == 0) == (limit_bytes == 1 << 60)
            assert run(running, prompts, greedy) == expected
    assert runtime.registered == {}
    assert len(caplog.messages) == (runtime.n_refused > 0)


@pytest.mark.parametrize("n_sub_batches", [1, 3])
def test_what_stays_on_it_does_not_cross(folder: Path, n_sub_batches: int) -> None:
    prompts, greedy = random_prompts(7, longest=50, seed=4), replace(GREEDY, max_tokens=8)
    with engine(folder, replace(config(max_rows=7), n_threads=1)) as running:
        expected = run(running, prompts, greedy)
    settings = config(max_rows=7, n_sub_batches=n_sub_batches, prefill_chunk_tokens=32)
    settings = replace(settings, n_threads=1, device_memory_bytes=1 << 30)
    with fake_cuda(FakeRuntime(), slot_bytes=4096):
        device = LazyCudaDevice(CPU)
        with engine(folder, settings, device) as running:
            steps = steps_of(running)
            assert run(running, prompts, greedy) == expected
    assert {(s.weight_bytes, s.kv_down_bytes, s.kv_up_bytes) for s in steps} == {(0, 0, 0)}
