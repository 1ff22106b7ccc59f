"""Background requests (lines of batch jobs): behind the queue's limits, and first to give way."""

from __future__ import annotations

import threading
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from transformers import LlamaForCausalLM

from sl_serve.config import QueueConfig
from sl_serve.core import BACKGROUND_PRIORITY, Request, SamplingParams
from sl_serve.errors import QueueFullError
from sl_serve.loader import Parts
from sl_serve.sched.packer import pack
from sl_serve.sched.queue import WaitingQueue
from tests.engine.running import (
    GREEDY,
    Answers,
    config,
    engine,
    one_by_one,
    random_prompts,
    requests_for,
    steps_of,
)
from tests.engine.test_residents import ask, residents_of

pytestmark = pytest.mark.usefixtures("one_thread")

MOST_STEPS = 2  # of waiting for a first token: the one that runs, and the one that reads the prompt


@pytest.fixture(scope="module")
def folder(tiny: tuple[Path, LlamaForCausalLM]) -> Path:
    return tiny[0]


def background(prompts: list[list[int]], tag: str = "b") -> tuple[list[Request], Answers]:
    requests, answers = requests_for(prompts, replace(GREEDY, max_tokens=24), tag=tag)
    for request in requests:
        request.priority = BACKGROUND_PRIORITY
    return requests, answers


class Steps:
    """Lets the engine make its steps one by one."""

    def __init__(self) -> None:
        self._next = threading.Semaphore(0)
        self.begun = threading.Semaphore(0)
        self.free = False

    def install(self, parts: Parts) -> None:
        inner = parts.sweep.run

        def stepwise(*args: object) -> list[torch.Tensor]:
            self.begun.release()
            if not self.free:
                assert self._next.acquire(timeout=30)
            return inner(*args)  # type: ignore[arg-type]

        parts.sweep.run = stepwise  # type: ignore[assignment, method-assign]

    def wait_begun(self) -> None:
        """A step has begun and waits for `one`."""
        assert self.begun.acquire(timeout=30)

    def one(self) -> None:
        self._next.release()

    def all(self) -> None:
        self.free = True
        self._next.release()


@pytest.mark.parametrize("n_rows", [1, 4])
def test_an_interactive_request_starts_at_the_next_boundary_and_others_lose_nothing(
    folder: Path, n_rows: int
) -> None:
    prompts = random_prompts(10)
    expected = one_by_one(folder, prompts)
    steps = Steps()
    with engine(folder, config(max_rows=n_rows), change=steps.install) as running:
        seen = steps_of(running)
        lines, answers = background(prompts)
        running.submit(lines)
        for _ in range(5):
            steps.wait_begun()
            steps.one()
        steps.wait_begun()  # a step of background rows runs: the request has just missed it
        (asked,), heard = requests_for([prompts[0]], GREEDY, tag="chat")
        running.submit([asked])
        for _ in range(MOST_STEPS):
            steps.one()
            steps.wait_begun()
        assert heard.news[0]
        steps.all()
        assert heard.wait() == [expected[0]]
        assert answers.wait() == expected
        assert running.snapshot().n_parked_total == 0  # a row waited, and kept what it had
    assert max(step.n_rows for step in seen) == n_rows


def test_interactive_requests_do_not_push_each_other_aside(folder: Path) -> None:
    prompts = random_prompts(6)
    with engine(folder, config(max_rows=2)) as running:
        requests, answers = requests_for(prompts, GREEDY)
        for i, request in enumerate(requests):
            request.priority = -i
        running.submit(requests)
        answers.wait()
        assert running.snapshot().n_parked_total == 0


def test_background_rows_do_not_push_each_other_aside() -> None:
    residents = residents_of(max_rows=1)
    running = ask(0, 4, priority=BACKGROUND_PRIORITY + 1)
    assert residents.admit(running, 20)
    assert residents.give_way(ask(1, 4, priority=BACKGROUND_PRIORITY + 1)) is None
    assert residents.give_way(ask(2, 4, priority=BACKGROUND_PRIORITY)) is running


def test_the_youngest_background_row_gives_way() -> None:
    residents = residents_of()
    rows = [ask(0, 4), *(ask(i, 4, priority=BACKGROUND_PRIORITY) for i in (1, 2, 3)), ask(4, 4)]
    for row in rows:
        assert residents.admit(row, 20)
        row.n_cached = 4
    gone = residents.give_way(ask(9, 4))
    assert gone is rows[3]
    assert gone not in residents and gone.n_cached == 0
    assert [residents.give_way(ask(9, 4)) for _ in range(3)] == [rows[2], rows[1], None]
    residents.check_integrity()


def test_a_full_house_has_room_for_interactive_rows_and_steps_stay_as_wide() -> None:
    residents = residents_of(max_rows=2)
    lines = [ask(i, 4, priority=BACKGROUND_PRIORITY) for i in (0, 1, 2)]
    asked = [ask(i, 4) for i in (3, 4, 5)]
    assert [residents.admit(line, 20) for line in lines] == [True, True, False]
    for came, taking_part in ((asked[0], [asked[0], lines[0]]), (asked[1], asked[:2])):
        assert residents.admit(came, 20)
        (sub_batch,) = pack(residents, 100, 1, 100).sub_batches
        assert {work.request.request_id for work in sub_batch.rows} == {
            request.request_id for request in taking_part
        }
    assert not residents.admit(asked[2], 20)
    assert all(line in residents for line in lines[:2])
    residents.check_integrity()


def test_background_requests_neither_meet_the_limits_nor_use_them_up() -> None:
    queue = WaitingQueue(QueueConfig(max_requests=2, max_tokens=100))
    sampling = SamplingParams(max_tokens=40)
    lines = [Request(str(i), [0] * 50, sampling, print, BACKGROUND_PRIORITY) for i in range(50)]
    queue.push(lines, 1)
    asked = [Request(f"chat {i}", [0] * 5, sampling, print) for i in range(3)]
    queue.push(asked[:2], 1)
    assert (len(queue), queue.n_tokens) == (52, 90)
    with pytest.raises(QueueFullError, match="holds 2 of 2 requests and 90 of 100 tokens"):
        queue.push(asked[2:], 1)
    queue.push([Request("late", [0] * 50, sampling, print, BACKGROUND_PRIORITY)], 1)
    assert queue.peek() is asked[0]
    queue.pop(asked[0])
    queue.pop(lines[7])
    assert queue.n_tokens == 45
    queue.push(asked[2:], 1)
    queue.drain()
    queue.push(asked[:2], 1)
    assert (len(queue), queue.n_tokens) == (2, 90)


def test_background_rows_finish_under_a_stream_of_interactive_ones(folder: Path) -> None:
    """Short of KV memory: they are parked again and again, and say what they would have said
    alone."""
    prompts = random_prompts(12, seed=3)
    expected = one_by_one(folder, prompts)
    settings = replace(config(max_rows=12), kv_memory_bytes=400_000)
    gate = Steps()
    with engine(folder, settings, change=gate.install) as running:
        steps = steps_of(running)
        lines, answers = background(prompts)
        running.submit(lines)
        gate.wait_begun()  # all memory is theirs
        asked, heard = requests_for([prompts[0]], GREEDY, tag="first")
        running.submit(asked)
        gate.all()
        for i in range(8):
            asked, heard = requests_for([prompts[i]], GREEDY, tag=f"chat{i}")
            running.submit(asked)
            assert heard.wait() == [expected[i]]
        assert answers.wait() == expected
        assert running.snapshot().n_parked_total > 0
    assert max(step.n_rows for step in steps) < 12
