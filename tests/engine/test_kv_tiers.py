"""KV on the device beside KV on the host: who sits where, and the same tokens."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from functools import cache
from pathlib import Path

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from sl_serve import stored_model
from sl_serve.core import Request, RowWork, SamplingParams, StepPlan, SubBatchPlan
from sl_serve.device import SimDevice
from sl_serve.kv.formats import KV_FORMATS
from sl_serve.kv.layout import FULL_SLAB_CHUNKS, KVSpec
from sl_serve.kv.pool import RunPool, Slab
from sl_serve.kv.resident import ResidentKV
from sl_serve.loader import Parts
from sl_serve.ops.device_ops import DeviceOps
from sl_serve.plan.fit import plan_memory
from sl_serve.plan.memory import MemoryPlan
from sl_serve.sched.packer import pack
from sl_serve.sched.residents import Residents
from tests.engine.running import config, engine, one_by_one, random_prompts, run, steps_of
from tests.engine.test_residents import (
    CHUNK_TOKENS,
    MAX_WIDTH,
    N_REQUESTS,
    SIMULATED_CHUNKS,
    SPEC,
    Simulation,
    ask,
    grow,
)

FEW = settings(derandomize=True, max_examples=100, deadline=None)
DEVICE_CHUNKS, MOST_CHUNKS = 9, 16  # of a host slab: the longest request, alone, needs so many


@FEW
@given(st.lists(st.tuples(st.integers(0, 3), st.integers(0, 5)), max_size=40))
def test_runs_are_side_by_side_and_refused_only_where_there_is_none(
    moves: list[tuple[int, int]],
) -> None:
    pool, held = RunPool(12), [[], [], [], []]  # type: tuple[RunPool, list[list[int]]]
    for slab, n in moves:
        free = [c for c in range(12) if not any(c in h for h in held)]
        if n == 0:
            while held[slab]:
                pool.give(held[slab].pop())
        elif pool.fits(held[slab], n):
            pool.grow(held[slab], n)
            assert set(held[slab][-n:]) <= set(free)
        else:
            starts = [held[slab][-1] + 1] if held[slab] else range(12)
            assert not any({*range(i, i + n)} <= set(free) for i in starts)
        for chunks in held:
            assert chunks == list(range(chunks[0], chunks[0] + len(chunks))) if chunks else True
        pool.check_integrity(c for h in held for c in h)
        assert pool.n_free == 12 - sum(map(len, held))


class Watched(Simulation):
    """Notes who was where."""

    def check(self) -> None:
        super().check()
        for slab in self.residents.slabs.values():
            self.seen.add(slab.on_device)
            if slab.on_device:
                first = slab.chunks[0]
                assert slab.chunks == list(range(first, first + len(slab.chunks)))
            else:
                assert len(slab.chunks) <= MOST_CHUNKS
        plan = pack(self.residents, 40, 3, MAX_WIDTH + 40)
        check_sub_batches(self.residents, plan)

    @property
    def seen(self) -> set[bool]:
        return self.__dict__.setdefault("_seen", set())


def check_sub_batches(residents: Residents, plan: StepPlan) -> None:
    slabs = residents.slabs
    for sub_batch in plan.sub_batches:
        used = {w.slab for w in sub_batch.rows}
        assert len({slabs[i].on_device for i in used}) == 1
        if not slabs[next(iter(used))].on_device:
            assert sum(len(slabs[i].chunks) for i in used) <= residents.max_sub_batch_chunks
    of_slab = [{w.slab for w in s.rows} for s in plan.sub_batches]
    assert sum(map(len, of_slab)) == len(set().union(*of_slab)), "a slab is in one sub-batch"


@cache
def simulated(seed: int) -> Watched:
    residents = Residents(SPEC, SIMULATED_CHUNKS, 12, MAX_WIDTH, DEVICE_CHUNKS, MOST_CHUNKS)
    simulation = Watched(seed, residents)
    simulation.run(N_REQUESTS, max_turns=5000)
    return simulation


@pytest.mark.parametrize("seed", range(5))
def test_requests_come_and_go_on_both_tiers(seed: int) -> None:
    found = simulated(seed)
    assert found.n_ended == N_REQUESTS
    assert found.seen == {False, True}
    assert found.n_parked > 10 and found.n_refused > 10
    assert found.short == found.changed_by_refusal == found.mixed_slabs == []
    residents = found.residents
    assert (len(residents), residents.slabs, residents.used_bytes) == (0, {}, 0)
    assert residents.device_pool.n_free == DEVICE_CHUNKS


def test_rows_on_the_device_get_all_the_room_they_are_expected_to_need() -> None:
    residents = Residents(SPEC, 20, 8, 1, n_device_chunks=6)
    first, second = ask(0, 10), ask(1, 10)
    assert residents.admit(first, 4 * CHUNK_TOKENS) and residents.admit(second, 4 * CHUNK_TOKENS)
    slabs = [residents.place(r).slab for r in (first, second)]
    assert [s.on_device for s in slabs] == [True, False], "two chunks are left there, four needed"
    assert slabs[0].capacity_tokens == 4 * CHUNK_TOKENS > slabs[1].capacity_tokens


def test_a_row_that_outgrows_the_device_is_parked_and_goes_to_the_host() -> None:
    residents = Residents(SPEC, 20, 8, 1, n_device_chunks=2)
    request = ask(0, CHUNK_TOKENS)
    assert residents.admit(request, 2 * CHUNK_TOKENS)
    grow(request, CHUNK_TOKENS)
    assert residents.make_room() == []
    grow(request)
    assert residents.make_room() == [request] and request.n_cached == 0
    assert residents.admit(request, 4 * CHUNK_TOKENS)
    assert not residents.place(request).slab.on_device


def test_a_slab_of_the_host_grows_no_further_than_a_window() -> None:
    residents = Residents(SPEC, 40, 8, MAX_WIDTH, max_sub_batch_chunks=5)
    request = ask(0, 4)
    assert residents.admit(request, CHUNK_TOKENS)  # four positions a chunk
    grow(request, 5 * CHUNK_TOKENS // MAX_WIDTH - 4)
    assert residents.make_room() == []
    grow(request)
    assert residents.make_room() == [request]


PROMPTS = random_prompts(7, longest=40, seed=5)


@pytest.fixture(scope="module")
def expected(folder: Path) -> list[list[int]]:
    return one_by_one(folder, PROMPTS)


@pytest.fixture
def on_device(monkeypatch: pytest.MonkeyPatch) -> Callable[[int], None]:
    def force(n_chunks: int) -> None:
        def planned(*args: object) -> MemoryPlan:
            plan = plan_memory(*args)  # type: ignore[arg-type]
            return replace(plan, n_device_chunks=n_chunks)

        monkeypatch.setattr(stored_model, "plan_memory", planned)

    return force


@pytest.mark.parametrize(("n_sub_batches", "look_ahead"), [(1, 1), (2, 0), (2, 3), (5, 1)])
@pytest.mark.parametrize("share", [0.3, 10.0], ids=["some rows", "all rows"])
def test_tokens_are_those_of_every_row_on_the_host(
    folder: Path,
    expected: list[list[int]],
    on_device: Callable[[int], None],
    share: float,
    n_sub_batches: int,
    look_ahead: int,
) -> None:
    scheduling = config(
        max_rows=7, n_sub_batches=n_sub_batches, look_ahead=look_ahead, prefill_chunk_tokens=48
    )
    settings = replace(scheduling, kv_memory_bytes=160_000)  # chunks of 16 tokens
    found: list[Parts] = []
    on_device(0)
    with engine(folder, settings, SimDevice(), found.append) as running:
        steps = steps_of(running)
        assert run(running, PROMPTS) == expected
        through_windows = sum(s.kv_down_bytes for s in steps)
        chunk_tokens = found[0].plan.kv.chunk_tokens
    needed = sum(-(-(len(p) + 24) // chunk_tokens) for p in PROMPTS)
    on_device(max(FULL_SLAB_CHUNKS, int(share * needed)))
    tiers: set[bool] = set()
    with engine(folder, settings, SimDevice(), found.append) as running:
        residents = found[1].residents
        steps = steps_of(running)
        running.on_step(lambda _: tiers.update(s.on_device for s in residents.slabs.values()))
        assert run(running, PROMPTS) == expected
    down = sum(s.kv_down_bytes for s in steps)
    if share < 1:
        assert tiers == {False, True} and 0 < down < through_windows
    else:
        assert tiers == {True} and down == 0 == sum(s.kv_up_bytes for s in steps)


def test_a_row_that_takes_no_part_keeps_what_it_has() -> None:
    """Between two rows that decode, shorter than it: what a window would zero is its own here."""
    width, n_heads, head_dim = 4, 2, 8
    spec = KVSpec(1, n_heads, head_dim, KV_FORMATS["float32"], 64, "position")
    device = SimDevice()
    ops = DeviceOps(device, torch.float32)
    kv = ResidentKV(device, ops, spec, 2)
    slabs = {0: Slab(0, width, spec.positions(width), on_device=True, chunks=[0, 1])}
    random = torch.Generator().manual_seed(2)

    def step(*works: tuple[int, int, int]) -> None:
        request = Request("r", [], SamplingParams(), print)
        plan = SubBatchPlan(tuple(RowWork(request, 0, *work, True) for work in works))
        k, v = torch.randn(2, plan.n_tokens, n_heads, head_dim, generator=random)
        ops.append(kv.region(0), kv.table(plan, slabs), k, v)

    step((0, 0, 2), (1, 0, 10), (2, 0, 5))  # row, start, new tokens
    lines = kv.memory.view(torch.float32).view(-1, 2, width, n_heads, head_dim)
    before = lines[:10, :, 1].clone()
    step((0, 2, 1), (2, 5, 1))
    assert torch.equal(lines[:10, :, 1], before)
    assert before.ne(0).all() and lines[:3, :, 0].ne(0).all() and lines[:6, :, 2].ne(0).all()
