"""Steps that fail: for want of memory they are repeated smaller and no token changes; rows that
give no numbers end alone; anything else ends the engine."""

from __future__ import annotations

import random
import sys
import time
from collections.abc import Callable, Iterator, Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any, NamedTuple

import pytest
import torch

from sl_serve import stored_model
from sl_serve.config import EngineConfig
from sl_serve.core import FinishReason, Request, SamplingParams, StepPlan
from sl_serve.device import SimDevice
from sl_serve.device.out_of_memory import is_out_of_memory
from sl_serve.kv.formats import KV_FORMATS
from sl_serve.kv.host_attention import HostAttention
from sl_serve.kv.layout import KVSpec
from sl_serve.kv.pool import Slab
from sl_serve.kv.resident import TieredKV
from sl_serve.kv.windows import WindowedKV
from sl_serve.loader import Parts
from sl_serve.plan.fit import plan_memory
from sl_serve.plan.memory import MemoryPlan
from sl_serve.sched import step_limit
from sl_serve.sched.packer import pack
from sl_serve.sched.residents import Residents
from sl_serve.sched.step_limit import GOOD_STEPS, StepLimit
from sl_serve.stats import EngineState
from sl_serve.weights import head
from tests.engine.running import (
    GREEDY,
    Answers,
    config,
    engine,
    one_by_one,
    random_prompts,
    requests_for,
    run,
    steps_of,
)

pytestmark = pytest.mark.usefixtures("one_thread")

PROMPTS = random_prompts(6, longest=40, seed=11)
SHORT = replace(GREEDY, max_tokens=12)


class Machine(NamedTuple):
    """`planned`: what its memory plan is told, as tiny models fit anywhere."""

    simulated: bool = False
    planned: Mapping[str, int] = {}
    changes: Mapping[str, Any] = {}


MACHINES = {
    "in place": Machine(),
    "layers and vocabulary on disk": Machine(
        planned={"n_disk_layers": 2, "embedding_on_disk": True, "head_on_disk": True}
    ),
    "windows": Machine(True),
    "windows, hidden states swapped": Machine(True, {"hidden_bytes": 1}),
    "windows, layers on disk": Machine(True, {"n_disk_layers": 3, "head_on_disk": True}),
    "KV on the device too": Machine(True, {"n_device_chunks": 8}, {"kv_memory_bytes": 160_000}),
    "attention on the host": Machine(True, changes={"attention": "host"}),
    "attention on both": Machine(
        True, {"n_device_chunks": 8}, {"attention": "host", "kv_memory_bytes": 160_000}
    ),
}


@pytest.fixture(params=MACHINES)
def machine(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> Machine:
    machine = MACHINES[request.param]

    def plan(*args: object) -> MemoryPlan:
        return replace(plan_memory(*args), **machine.planned)  # type: ignore[arg-type]

    monkeypatch.setattr(stored_model, "plan_memory", plan)
    monkeypatch.setattr(head, "PIECE_BYTES", 8192)  # a few of them
    return machine


@pytest.fixture(scope="module")
def folder(tiny: tuple[Path, object]) -> Path:
    return tiny[0]


@pytest.fixture(scope="module")
def expected(folder: Path) -> list[list[int]]:
    return [tokens[:12] for tokens in one_by_one(folder, PROMPTS)]


def settings_of(machine: Machine, look_ahead: int = 1) -> EngineConfig:
    scheduling = config(max_rows=6, n_sub_batches=2, look_ahead=look_ahead, prefill_chunk_tokens=48)
    return replace(scheduling, **machine.changes)


def device_of(machine: Machine) -> SimDevice | None:
    return SimDevice() if machine.simulated else None


class Shortage:
    """Calls of `owner.name` raise MemoryError where `lacks`, given their arguments, says so."""

    def __init__(self, owner: object, name: str, lacks: Callable[..., bool]) -> None:
        self.n_raised = 0
        inner = getattr(owner, name)

        def guarded(*args: Any) -> Any:
            if lacks(*args):
                self.n_raised += 1
                raise MemoryError("of the test's making")
            return inner(*args)

        setattr(owner, name, guarded)


@pytest.mark.parametrize("look_ahead", [0, 1])
def test_sub_batches_that_do_not_fit_are_made_smaller(
    folder: Path, expected: list[list[int]], machine: Machine, look_ahead: int
) -> None:
    """There is memory for sub-batches of three tokens, which shows in the last layer alone."""
    found: list[Shortage] = []

    def install(parts: Parts) -> None:
        def lacks(cell: int, q: torch.Tensor, *_: object) -> bool:
            return cell >= 2 * 2 and len(q) > 3

        found.append(Shortage(parts.sweep.attention, "start", lacks))

    with engine(folder, settings_of(machine, look_ahead), device_of(machine), install) as running:
        assert run(running, PROMPTS, SHORT) == expected
        assert running.snapshot().n_short_of_memory == found[0].n_raised > 3
        assert running.snapshot().state is EngineState.RUNNING


class Chaos:
    """Memory runs short anywhere, at random; never in a step of one token."""

    def __init__(self, parts: Parts, seed: int, share: float) -> None:
        self._rng, self._share, self._n_tokens = random.Random(seed), share, 0
        self._watch_size(parts)
        sweep = parts.sweep
        points = [
            (sweep.attention, "begin"),
            (sweep.attention, "start"),
            (sweep.attention, "finish"),
            (sweep.weights, "buffer"),
            (sweep, "_embed"),
            (sweep.ops, "logits"),
            (parts.head, "_sample"),
        ]
        kv = getattr(sweep.attention, "_kv", None)
        windows = kv._windows if isinstance(kv, TieredKV) else kv
        if isinstance(windows, WindowedKV):
            points.append((windows._host, "scatter"))
        self.shortages = [Shortage(owner, name, self._lacks) for owner, name in points]

    def _watch_size(self, parts: Parts) -> None:
        inner = parts.sweep.run

        def watched(plan: StepPlan, slabs: Mapping[int, Slab]) -> list[torch.Tensor]:
            self._n_tokens = plan.n_tokens
            return inner(plan, slabs)

        parts.sweep.run = watched  # type: ignore[method-assign]

    def _lacks(self, *_: object) -> bool:
        return self._n_tokens > 1 and self._rng.random() < self._share


@pytest.mark.parametrize("seed", range(2))
def test_wherever_memory_runs_short_tokens_are_the_same(
    folder: Path,
    expected: list[list[int]],
    machine: Machine,
    seed: int,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(step_limit, "GOOD_STEPS", 1)  # large steps are tried again at once
    found: list[Chaos] = []
    settings = settings_of(machine)
    with engine(
        folder, settings, device_of(machine), lambda p: found.append(Chaos(p, seed, 0.02))
    ) as running:
        assert run(running, PROMPTS, SHORT) == expected
        n_raised = sum(s.n_raised for s in found[0].shortages)
        assert running.snapshot().n_short_of_memory == n_raised > 5


def test_drawn_tokens_do_not_depend_on_repeated_steps(folder: Path) -> None:
    drawing = SamplingParams(max_tokens=12, temperature=1.0, seed=5, ignore_eos=True, logprobs=2)
    with engine(folder, config(max_rows=6)) as running:
        expected = run(running, PROMPTS, drawing)
    with engine(folder, config(max_rows=6), change=lambda p: Chaos(p, 3, 0.05) and None) as running:
        assert run(running, PROMPTS, drawing) == expected
        assert running.snapshot().n_short_of_memory > 0


def test_steps_grow_again(folder: Path) -> None:
    """Memory is short for a while only."""
    is_short = [True]

    def install(parts: Parts) -> None:
        Shortage(parts.sweep.attention, "start", lambda _, q, *__: is_short[0] and len(q) > 2)

    with engine(folder, config(max_rows=6), change=install) as running:
        steps = steps_of(running)
        running.on_step(lambda _: is_short.__setitem__(0, len(steps) < 30))
        run(running, [[1, 2]] * 6, replace(GREEDY, max_tokens=120))
    rows = [s.n_rows for s in steps]
    assert max(rows[:30]) <= 2
    assert rows[3 * GOOD_STEPS + 8] == 6


def test_a_request_too_large_alone_ends_and_the_others_go_on(folder: Path) -> None:
    """No memory for positions from 20 on: no split helps."""

    def install(parts: Parts) -> None:
        inner = parts.sweep.run

        def guarded(plan: StepPlan, slabs: Mapping[int, Slab]) -> list[torch.Tensor]:
            if any(w.stop > 20 for s in plan.sub_batches for w in s.rows):
                raise torch.OutOfMemoryError("of the test's making")
            return inner(plan, slabs)

        parts.sweep.run = guarded  # type: ignore[method-assign]

    prompts = [[1, 2, 3], [4] * 30, [5, 6], [7] * 25]
    with engine(folder, config(max_rows=4), change=install) as running:
        requests, answers = requests_for(prompts, SHORT)
        running.submit(requests)
        tokens = answers.wait()
        assert [ending(answers, i) for i in (0, 2)] == [FinishReason.LENGTH] * 2
        for i in (1, 3):
            assert ending(answers, i) is FinishReason.ERROR
            assert str(answers.news[i][-1].error).startswith("memory ran short for it alone: Out")
        assert running.snapshot().state is EngineState.RUNNING
        assert running.drain(10) and running.snapshot().kv_used_bytes == 0
    whole = one_by_one(folder, [prompts[0], prompts[2]])
    assert [tokens[0], tokens[2]] == [t[:12] for t in whole]


def ending(answers: Answers, i: int) -> FinishReason | None:
    return answers.news[i][-1].finish_reason


def test_a_row_without_numbers_ends_alone(
    folder: Path, expected: list[list[int]], machine: Machine
) -> None:
    """Hidden states of one request become NaN in its fourth token."""

    def install(parts: Parts) -> None:
        inner = parts.sweep.run

        def poisoned(plan: StepPlan, slabs: Mapping[int, Slab]) -> Iterator[torch.Tensor]:
            for sub_batch, states in zip(plan.sub_batches, inner(plan, slabs), strict=True):
                first = 0
                for work in sub_batch.rows:
                    if len(work.request.output_ids) == 3 and work.request.request_id == "r2":
                        states[first : first + work.n_new] = torch.nan
                    first += work.n_new
                yield states

        parts.sweep.run = poisoned  # type: ignore[method-assign]

    with engine(folder, settings_of(machine), device_of(machine), install) as running:
        requests, answers = requests_for(PROMPTS, SHORT)
        running.submit(requests)
        tokens = answers.wait()
        assert running.snapshot().state is EngineState.RUNNING
    assert "NonFiniteLogitsError" in str(answers.news[2][-1].error)
    assert tokens == [t[:3] if i == 2 else t for i, t in enumerate(expected)]


@pytest.mark.parametrize("failing_restart", [False, True])
def test_what_is_not_understood_ends_the_engine(folder: Path, failing_restart: bool) -> None:
    """Also a failure while the step's remains are cleared away."""

    def install(parts: Parts) -> None:
        def fail(*_: object) -> None:
            raise OSError("the link is gone")

        if failing_restart:
            Shortage(parts.sweep.attention, "start", lambda *_: True)
            parts.sweep.weights.restart = fail  # type: ignore[method-assign]
        else:
            parts.sweep.attention.start = fail  # type: ignore[method-assign]

    with engine(folder, config(max_rows=4), change=install) as running:
        requests, answers = requests_for(PROMPTS[:3], SHORT)
        running.submit(requests)
        answers.wait()
        assert {news[-1].error for news in answers.news} == {"OSError: the link is gone"}
        assert running.snapshot().state is EngineState.DEAD


@pytest.mark.parametrize(
    ("error", "expected"),
    [
        (MemoryError(), True),
        (torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2 GiB"), True),
        (RuntimeError("CUDA error: out of memory"), True),
        (RuntimeError("CUDA error: CUBLAS_STATUS_ALLOC_FAILED when calling `cublasCreate`"), True),
        (RuntimeError("CUDA error: an illegal memory access was encountered"), False),
        (ValueError("DefaultCPUAllocator: can't allocate memory"), False),
        (OSError(12, "Cannot allocate memory"), False),
    ],
)
def test_kinds_of_shortage(error: Exception, expected: bool) -> None:
    assert is_out_of_memory(error) is expected


def test_what_torch_says_when_the_host_is_full() -> None:
    with pytest.raises(RuntimeError) as caught:
        torch.empty(1 << 60, dtype=torch.uint8)
    assert is_out_of_memory(caught.value)


def test_limit_falls_and_rises() -> None:
    limit = StepLimit()
    limit.passed()
    assert limit.tokens == sys.maxsize
    limit.halve(100)
    limit.halve(50)
    assert limit.tokens == 25
    seen = []
    for _ in range(2 * GOOD_STEPS):
        limit.passed()
        seen.append(limit.tokens)
    assert seen[: GOOD_STEPS - 1] == [25] * (GOOD_STEPS - 1)
    assert seen[GOOD_STEPS - 1 : -1] == [50] * GOOD_STEPS
    assert seen[-1] == sys.maxsize  # steps of a hundred may be tried again
    limit.halve(2)
    limit.lift()
    assert limit.tokens == sys.maxsize


@pytest.mark.parametrize("max_tokens", [1, 2, 5, 17, 1000])
def test_the_packer_keeps_the_limit_and_prefers_the_oldest(max_tokens: int) -> None:
    spec = KVSpec(1, 1, 1, KV_FORMATS["float32"], chunk_tokens=16, order="position")
    residents = Residents(spec, n_chunks=100, max_rows=8, max_slab_width=4)
    for i in range(6):
        request = Request(str(i), [0] * 9, SamplingParams(), lambda _: None, sequence_no=i)
        request.n_cached = 8 if i % 2 else 0  # every other one decodes
        assert residents.admit(request, 12)
    plan = pack(residents, 20, 2, 1 << 30, max_tokens)
    works = {w.request.request_id: w.n_new for s in plan.sub_batches for w in s.rows}
    unlimited = [("0", 9), ("1", 1), ("2", 9), ("3", 1), ("4", 2), ("5", 1)]
    room, expected = max_tokens, {}
    for request_id, n in unlimited:
        if min(n, room):
            expected[request_id] = min(n, room)
            room -= min(n, room)
    assert works == expected


@pytest.mark.parametrize("attention", ["device", "host"])
def test_nothing_of_a_failed_step_is_under_way(
    folder: Path, attention: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """When the layers begin anew: no copy, no cell beside the device, and one time on all streams,
    which orders what comes after everything before."""
    device, checked = SimDevice(), []
    attend = HostAttention._attend

    def slowly(self: HostAttention, *args: object) -> None:
        time.sleep(0.02)
        attend(self, *args)  # type: ignore[arg-type]

    def install(parts: Parts) -> None:
        jobs: list[object] = []
        Shortage(parts.sweep.attention, "start", lambda cell, q, *_: cell == 3 and len(q) > 2)
        begin_anew, finish = parts.sweep.weights.restart, parts.sweep.attention.restart

        def remember() -> None:
            jobs[:] = [job.done for job in getattr(parts.sweep.attention, "_jobs", {}).values()]
            finish()

        def check() -> None:
            queues = device._queues.values()
            assert not any(q.pending for q in queues)
            assert len({q.time_s for q in queues}) == 1
            assert all(job.done() for job in jobs)  # type: ignore[attr-defined]
            checked.append(len(jobs))
            begin_anew()

        parts.sweep.attention.restart = remember  # type: ignore[method-assign]
        parts.sweep.weights.restart = check  # type: ignore[method-assign]

    monkeypatch.setattr(HostAttention, "_attend", slowly)
    settings = settings_of(Machine(True, changes={"attention": attention}))
    with engine(folder, settings, device, install) as running:
        run(running, PROMPTS, replace(GREEDY, max_tokens=3))
        assert running.snapshot().state is EngineState.RUNNING
    assert checked
    assert attention == "device" or any(checked)
