"""Attention by the processor beside a simulated device: the same tokens, bytes as planned, and
no order kept by luck."""

from __future__ import annotations

import threading
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import pytest
import torch

from sl_serve import stored_model
from sl_serve.config import EngineConfig
from sl_serve.core import Request, RowWork, SamplingParams, SubBatchPlan
from sl_serve.device import Event, HostWork, SimDevice, Stream
from sl_serve.kv.formats import KV_FORMATS
from sl_serve.kv.host import HostKV
from sl_serve.kv.host_attention import HostAttention
from sl_serve.kv.layout import KVSpec
from sl_serve.kv.pool import Slab
from sl_serve.loader import Parts
from sl_serve.ops import TorchOps
from sl_serve.plan.fit import plan_memory
from sl_serve.plan.memory import MemoryPlan
from tests.engine.running import (
    GREEDY,
    config,
    engine,
    one_by_one,
    random_prompts,
    requests_for,
    run,
    steps_of,
)
from tests.models import write_tiny_llama

PROMPTS = random_prompts(7, longest=40, seed=5)


@pytest.fixture(scope="module")
def expected(folder: Path) -> list[list[int]]:
    """On the processor alone."""
    return one_by_one(folder, PROMPTS)


def attending(**scheduler: int) -> EngineConfig:
    return replace(config(**scheduler), attention="host")


@pytest.mark.parametrize("look_ahead", [0, 1, 3])
@pytest.mark.parametrize("n_sub_batches", [1, 2, 5])
@pytest.mark.parametrize("native", [True, False])
def test_tokens_are_the_same(
    folder: Path, expected: list[list[int]], n_sub_batches: int, look_ahead: int, native: bool
) -> None:
    scheduling = attending(
        max_rows=7, n_sub_batches=n_sub_batches, look_ahead=look_ahead, prefill_chunk_tokens=24
    )
    found: list[Parts] = []
    settings = replace(scheduling, native=native)
    with engine(folder, settings, SimDevice(), found.append) as running:
        steps = steps_of(running)
        assert run(running, PROMPTS) == expected
    assert isinstance(found[0].sweep.attention, HostAttention)
    assert max(s.n_sub_batches for s in steps) == n_sub_batches


@pytest.fixture
def planned(monkeypatch: pytest.MonkeyPatch) -> Callable[..., None]:
    def change(**fields: int) -> None:
        def plan(*args: object) -> MemoryPlan:
            return replace(plan_memory(*args), **fields)  # type: ignore[arg-type]

        monkeypatch.setattr(stored_model, "plan_memory", plan)

    return change


@pytest.mark.parametrize("n_sub_batches", [1, 3])
@pytest.mark.parametrize("look_ahead", [0, 1])
def test_tokens_with_some_rows_on_the_device(
    folder: Path,
    expected: list[list[int]],
    planned: Callable[..., None],
    look_ahead: int,
    n_sub_batches: int,
) -> None:
    planned(n_device_chunks=8)
    scheduling = attending(
        max_rows=7, n_sub_batches=n_sub_batches, look_ahead=look_ahead, prefill_chunk_tokens=48
    )
    settings = replace(scheduling, kv_memory_bytes=160_000)  # chunks of 16 tokens
    tiers: set[bool] = set()
    found: list[Parts] = []
    with engine(folder, settings, SimDevice(), found.append) as running:
        residents = found[0].residents
        running.on_step(lambda _: tiers.update(s.on_device for s in residents.slabs.values()))
        assert run(running, PROMPTS) == expected
    assert tiers == {False, True}


@pytest.mark.parametrize("look_ahead", [0, 1])
def test_tokens_with_layers_on_disk(
    folder: Path, expected: list[list[int]], planned: Callable[..., None], look_ahead: int
) -> None:
    planned(n_disk_layers=2)
    settings = attending(max_rows=7, n_sub_batches=3, look_ahead=look_ahead)
    with engine(folder, settings, SimDevice()) as running:
        assert run(running, PROMPTS) == expected


@pytest.mark.parametrize("look_ahead", [0, 1, 3])
@pytest.mark.parametrize("n_sub_batches", [1, 2, 5])
def test_queries_and_new_kv_go_up_and_results_come_down(
    folder: Path, n_sub_batches: int, look_ahead: int
) -> None:
    """Counted by hand; no KV crosses."""
    n_prompt, n_output, n_rows = 20, 6, 10
    device, found = SimDevice(), list[Parts]()
    settings = attending(
        max_rows=n_rows,
        n_sub_batches=n_sub_batches,
        look_ahead=look_ahead,
        prefill_chunk_tokens=n_rows * n_prompt,
    )
    with engine(folder, settings, device, found.append) as running:
        steps = steps_of(running)
        sampling = replace(GREEDY, max_tokens=n_output)
        run(running, [[i] * n_prompt for i in range(n_rows)], sampling)
    model, plan = found[0].sweep.config, found[0].plan
    assert len(steps) == n_output
    for i, step in enumerate(steps):
        n_tokens = n_rows * (n_prompt if i == 0 else 1)
        out_bytes = n_tokens * model.n_layers * model.q_size * 4
        new_kv_bytes = n_tokens * model.n_layers * 2 * model.kv_size * 4
        assert step.weight_bytes == plan.weights_bytes
        assert step.kv_down_bytes == out_bytes
        assert step.kv_up_bytes == out_bytes + new_kv_bytes
    ahead = found[0].sweep.weights.n_bytes_ahead  # type: ignore[attr-defined]
    down = sum(s.weight_bytes + s.kv_down_bytes for s in steps) + ahead
    assert device.n_bytes_down == down
    assert device.n_bytes_up == sum(s.kv_up_bytes for s in steps)


class Memory(SimDevice):
    """Counts what is taken of it."""

    def __init__(self) -> None:
        super().__init__()
        self.device_bytes = self.host_bytes = 0

    def empty(self, n_bytes: int) -> torch.Tensor:
        self.device_bytes += n_bytes
        return super().empty(n_bytes)

    def host_empty(self, n_bytes: int) -> torch.Tensor:
        self.host_bytes += n_bytes
        return super().host_empty(n_bytes)


@pytest.mark.parametrize("look_ahead", [0, 1, 3])
def test_memory_is_taken_as_planned_and_not_in_a_step(folder: Path, look_ahead: int) -> None:
    device, found = Memory(), list[Parts]()
    settings = attending(max_rows=7, n_sub_batches=3, look_ahead=look_ahead)
    with engine(folder, settings, device, found.append) as running:
        plan = found[0].plan
        at_start = device.device_bytes, device.host_bytes
        run(running, PROMPTS)
        assert (device.device_bytes, device.host_bytes) == at_start
    assert plan.windows_bytes == 0
    device_staging = plan.staging_bytes - plan.staging_host_bytes
    assert device.device_bytes == plan.device_slots_bytes + device_staging


def test_a_device_with_a_ceiling_keeps_layers_and_rows(tmp_path: Path) -> None:
    write_tiny_llama(tmp_path, num_hidden_layers=6)
    expected = one_by_one(tmp_path, PROMPTS)
    scheduling = attending(max_rows=7, n_sub_batches=2, prefill_chunk_tokens=32)
    settings = replace(scheduling, kv_memory_bytes=160_000)
    n_device_layers, n_device_chunks = [], []
    for ceiling in (900_000, 1_000_000, 1_100_000, 2_000_000):
        device, found = Memory(), list[Parts]()
        limited = replace(settings, device_memory_bytes=ceiling)
        with engine(tmp_path, limited, device, found.append) as running:
            assert run(running, PROMPTS) == expected
        plan = found[0].plan
        assert device.device_bytes <= plan.device_bytes <= ceiling
        n_device_layers.append(plan.n_device_layers)
        n_device_chunks.append(plan.n_device_chunks)
    assert n_device_layers == sorted(n_device_layers)
    assert 0 < n_device_layers[0] < n_device_layers[-1] == 6
    assert n_device_chunks[0] == 0 < n_device_chunks[-1]


def errors_of(folder: Path, settings: EngineConfig, change: Callable[[Parts], None]) -> set[str]:
    with engine(folder, settings, SimDevice(), change) as running:
        requests, answers = requests_for(PROMPTS, GREEDY)
        running.submit(requests)
        answers.wait()
    return {str(news[-1].error) for news in answers.news}


class ForgetsArrival(SimDevice):
    """The worker does not wait for what it attends to."""

    def synchronize(self, event: Event) -> None:
        if not threading.current_thread().name.startswith("host-attention"):
            super().synchronize(event)


class ForgetsResult(SimDevice):
    """Compute does not wait for what comes down, but for weights."""

    def wait(self, stream: Stream, event: Event) -> None:
        if stream is Stream.COMPUTE and self.last_copy == "attention":
            return
        super().wait(stream, event)

    def copy(self, stream: Stream, dst: torch.Tensor, src: torch.Tensor, name: str = "") -> None:
        if stream is Stream.LOAD:
            self.last_copy = name
        super().copy(stream, dst, src, name)


@pytest.mark.parametrize("n_sub_batches", [1, 3])
@pytest.mark.parametrize("kind", [ForgetsArrival, ForgetsResult])
def test_a_forgotten_wait_is_noticed(
    folder: Path, kind: type[SimDevice], n_sub_batches: int
) -> None:
    settings = attending(max_rows=7, n_sub_batches=n_sub_batches)
    with engine(folder, settings, kind()) as running:
        requests, answers = requests_for(PROMPTS, GREEDY)
        running.submit(requests)
        answers.wait()
    assert all("NonFiniteLogitsError" in str(news[-1].error) for news in answers.news)


class ForgetsWorker(HostAttention):
    """Takes what lies there, done or not."""

    def finish(self, cell: int) -> torch.Tensor:
        index = cell % len(self._sub_batches)
        job = self._jobs[index]
        self._jobs[index] = job._replace(done=Done())  # type: ignore[arg-type]
        return super().finish(cell)


class Done:
    def result(self) -> HostWork:
        return HostWork(0.0, 0.0)


def test_results_that_are_not_awaited_are_noticed(
    folder: Path, expected: list[list[int]], monkeypatch: pytest.MonkeyPatch
) -> None:
    """The worker is held until the step has taken a result: then it cannot have been the right."""
    taken = threading.Event()
    attend = HostAttention._attend

    def late(self: HostAttention, *args: object) -> HostWork:
        taken.wait(5)
        return attend(self, *args)  # type: ignore[arg-type]

    def forget(parts: Parts) -> None:
        parts.sweep.attention.__class__ = ForgetsWorker

    monkeypatch.setattr(HostAttention, "_attend", late)
    found: list[Parts] = []

    def change(parts: Parts) -> None:
        forget(parts)
        found.append(parts)

    with engine(folder, attending(max_rows=7, n_sub_batches=2), SimDevice(), change) as running:
        running.on_step(lambda _: taken.set())
        requests, answers = requests_for(PROMPTS, GREEDY)
        running.submit(requests)
        tokens = answers.wait()
    assert tokens != expected


def test_what_the_worker_raises_ends_the_step(
    folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def fail(*_: object) -> torch.Tensor:
        raise ArithmeticError("the worker's own")

    monkeypatch.setattr(TorchOps, "attend", fail)
    settings = replace(attending(max_rows=7, n_sub_batches=2), native=False)
    found = errors_of(folder, settings, lambda _: None)
    assert found == {"ArithmeticError: the worker's own"}


def test_the_worker_ends_with_the_engine(folder: Path) -> None:
    with engine(folder, attending(max_rows=2), SimDevice()) as running:
        run(running, PROMPTS[:2])
        assert any(t.name.startswith("host-attention") for t in threading.enumerate())
    assert not any(t.name.startswith("host-attention") for t in threading.enumerate())


def test_where_the_processor_computes_everything_there_is_nothing_to_choose(
    folder: Path, expected: list[list[int]]
) -> None:
    found: list[Parts] = []
    with engine(folder, attending(max_rows=7), change=found.append) as running:
        assert run(running, PROMPTS) == expected
    assert not found[0].plan.host_attends


N_HEADS, N_KV_HEADS, HEAD_DIM, WIDTH = 4, 2, 16, 4


@pytest.mark.parametrize(
    ("dtype", "tolerance"),
    [(torch.float32, 1e-6), (torch.bfloat16, 2**-8), (torch.float16, 2**-11)],
)
def test_numbers_of_the_device_are_widened_and_the_results_rounded_once(
    dtype: torch.dtype, tolerance: float
) -> None:
    """Against float64 attention over all that was sent, two sub-batches of two rows, two layers."""
    spec = KVSpec(2, N_KV_HEADS, HEAD_DIM, KV_FORMATS["float32"], 16, "row")
    slabs = {i: Slab(i, WIDTH, 16 // WIDTH, chunks=[i, 2 + i]) for i in range(2)}
    host = HostKV(spec, 4)
    attention = HostAttention(SimDevice(), TorchOps(), host, dtype, N_HEADS, 30, is_beside=True)
    random = torch.Generator().manual_seed(1)
    request = Request("r", [], SamplingParams(), print)
    sent: dict[tuple[int, int], list[torch.Tensor]] = {}  # (cell, row) -> (n, 2, Hk, D) each
    n_cached = 0
    for n_new in (3, 1, 2):
        plans = [
            SubBatchPlan(tuple(RowWork(request, s, r, n_cached, n_new, True) for r in (0, 2)))
            for s in slabs
        ]
        assert attention.begin(plans, slabs) == [True, True]
        queries = {}
        for layer in range(2):
            for part in range(2):
                cell = 2 * layer + part
                q = torch.randn(2 * n_new, N_HEADS, HEAD_DIM, generator=random).to(dtype)
                kv = torch.randn(2 * n_new, 2, N_KV_HEADS, HEAD_DIM, generator=random).to(dtype)
                attention.start(cell, q, *kv.unbind(1))
                queries[cell] = q
                for row in range(2):
                    mine = kv[row * n_new : (row + 1) * n_new]
                    sent.setdefault((cell, row), []).append(mine)
            for part in range(2):
                cell = 2 * layer + part
                found = attention.finish(cell).view(2, n_new, -1)
                for row in range(2):
                    q = queries[cell][row * n_new : (row + 1) * n_new]
                    exact = attended_exactly(q, torch.cat(sent[cell, row]))
                    assert (found[row] - exact).abs().max() <= tolerance * exact.abs().max()
        n_cached += n_new
    attention.close()


def attended_exactly(q: torch.Tensor, kv: torch.Tensor) -> torch.Tensor:
    """q (M, Hq, D) are the last of the tokens of kv (N, 2, Hk, D); float64."""
    n, n_new = len(kv), len(q)
    k, v = kv.double().repeat_interleave(N_HEADS // N_KV_HEADS, dim=2).unbind(1)
    scores = torch.einsum("mhd,nhd->hmn", q.double(), k) / HEAD_DIM**0.5
    hidden = torch.arange(n) > torch.arange(n - n_new, n)[:, None]
    weights = scores.masked_fill(hidden, -torch.inf).softmax(-1)
    return torch.einsum("hmn,nhd->mhd", weights, v).reshape(n_new, -1)
