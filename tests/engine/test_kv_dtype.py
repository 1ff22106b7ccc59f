"""Whole engines whose KV is stored in another format than is computed with."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import pytest

from sl_serve import stored_model
from sl_serve.config import EngineConfig, KVDTypeName
from sl_serve.device import SimDevice
from sl_serve.kv.formats import KV_FORMATS
from sl_serve.kv.windows import WindowedKV
from sl_serve.loader import Parts
from sl_serve.plan.fit import plan_memory
from sl_serve.plan.memory import MemoryPlan
from tests.engine.running import config, engine, random_prompts, run, steps_of

PROMPTS = random_prompts(7, longest=40, seed=5)
SHORT: tuple[KVDTypeName, ...] = ("bfloat16", "float16", "int8", "int4")
every_format = pytest.mark.parametrize("kv", SHORT)
Tokens = list[list[int]]


def stored_as(kv: KVDTypeName, **scheduler: int) -> EngineConfig:
    return replace(config(**scheduler), kv_dtype=kv)


@pytest.fixture(scope="module")
def alone(folder: Path) -> dict[KVDTypeName, Tokens]:
    """Every prompt by itself, on the plainest settings."""
    found = {}
    for kv in SHORT:
        with engine(folder, stored_as(kv, max_rows=1, look_ahead=0)) as running:
            found[kv] = [run(running, [prompt])[0] for prompt in PROMPTS]
    return found


@every_format
def test_tokens_do_not_depend_on_packing_nor_on_the_kernel(
    folder: Path, alone: dict[KVDTypeName, Tokens], kv: KVDTypeName
) -> None:
    for chunk, native in ((5, True), (48, False)):
        settings = replace(stored_as(kv, max_rows=7, prefill_chunk_tokens=chunk), native=native)
        with engine(folder, settings) as running:
            assert run(running, PROMPTS) == alone[kv]


@every_format
@pytest.mark.parametrize(("n_sub_batches", "look_ahead"), [(1, 1), (3, 0), (5, 3)])
def test_a_device_that_expands_gives_the_same_tokens(
    folder: Path,
    alone: dict[KVDTypeName, Tokens],
    kv: KVDTypeName,
    n_sub_batches: int,
    look_ahead: int,
) -> None:
    settings = stored_as(
        kv, max_rows=7, n_sub_batches=n_sub_batches, look_ahead=look_ahead, prefill_chunk_tokens=48
    )
    with engine(folder, settings, SimDevice()) as running:
        assert run(running, PROMPTS) == alone[kv]


@every_format
@pytest.mark.parametrize("n_chunks", [6, 400])
def test_rows_that_stay_on_the_device_give_the_same_tokens(
    folder: Path,
    alone: dict[KVDTypeName, Tokens],
    kv: KVDTypeName,
    n_chunks: int,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    def planned(*args: object) -> MemoryPlan:
        return replace(plan_memory(*args), n_device_chunks=n_chunks)  # type: ignore[arg-type]

    monkeypatch.setattr(stored_model, "plan_memory", planned)
    settings = stored_as(kv, max_rows=7, n_sub_batches=3, prefill_chunk_tokens=48)
    settings = replace(settings, kv_memory_bytes=120_000)
    tiers: set[bool] = set()
    found: list[Parts] = []
    with engine(folder, settings, SimDevice(), found.append) as running:
        slabs = found[0].residents.slabs
        running.on_step(lambda _: tiers.update(s.on_device for s in slabs.values()))
        assert run(running, PROMPTS) == alone[kv]
    assert True in tiers and (False in tiers) == (n_chunks == 6)


@every_format
def test_the_bytes_on_the_link_are_those_of_the_format(folder: Path, kv: KVDTypeName) -> None:
    def moved(name: KVDTypeName) -> list[tuple[int, int]]:
        parts: list[Parts] = []
        # Slabs of one row: how much of a prefix is sent does not depend on chunks.
        settings = stored_as(name, max_rows=1, prefill_chunk_tokens=16)
        with engine(folder, settings, SimDevice(), parts.append) as running:
            steps = steps_of(running)
            run(running, PROMPTS[:1])
        token_bytes = parts[0].plan.kv.token_bytes
        return [(s.kv_down_bytes // token_bytes, s.kv_up_bytes // token_bytes) for s in steps]

    tokens = moved(kv)
    assert tokens == moved("float32") and tokens[-1][1] == 1 and tokens[-1][0] > 16


@every_format
def test_a_prefix_that_is_expanded_too_early_is_noticed(
    folder: Path,
    alone: dict[KVDTypeName, Tokens],
    kv: KVDTypeName,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """A device whose compute stream does not wait for the load stream."""

    class Hasty(SimDevice):
        def wait(self, stream, event):  # type: ignore[no-untyped-def]
            if not self.is_hasty:
                super().wait(stream, event)

        is_hasty = False

    device, opened = Hasty(), WindowedKV.open

    def open_early(self: WindowedKV, cell: int):  # type: ignore[no-untyped-def]
        device.is_hasty = True
        try:
            return opened(self, cell)
        finally:
            device.is_hasty = False

    monkeypatch.setattr(WindowedKV, "open", open_early)
    with engine(folder, stored_as(kv, max_rows=7), device) as running:
        assert run(running, PROMPTS) != alone[kv]


@every_format
def test_a_plan_counts_what_a_device_takes(folder: Path, kv: KVDTypeName) -> None:
    """Windows in the format, one more as it is computed with, staging."""

    class Counting(SimDevice):
        n_bytes = 0

        def empty(self, n_bytes):  # type: ignore[no-untyped-def]
            self.n_bytes += n_bytes
            return super().empty(n_bytes)

    device, parts = Counting(), list[Parts]()
    with engine(folder, stored_as(kv, max_rows=4, n_sub_batches=2), device, parts.append):
        plan = parts[0].plan
    chunk_bytes = 2 * plan.kv.chunk_layer_bytes + plan.device_kv.chunk_layer_bytes
    assert plan.windows_bytes == plan.window_chunks * chunk_bytes
    staged = 2 * plan.max_sub_batch_tokens * plan.kv.token_layer_bytes
    assert plan.windows_bytes + staged + plan.device_slots_bytes <= device.n_bytes
    assert device.n_bytes <= plan.device_bytes
    lines = plan.kv.line_bytes / plan.device_kv.line_bytes
    assert lines == KV_FORMATS[kv].line_bytes(plan.kv.head_dim) / (4 * plan.kv.head_dim)
