from __future__ import annotations

import sys
import threading
import time
from collections.abc import Iterator, Sequence

import pytest

from sl_serve.config import QueueConfig
from sl_serve.core import BACKGROUND_PRIORITY, Request, SamplingParams
from sl_serve.errors import QueueFullError, RequestError
from sl_serve.sched.queue import WaitingQueue


def ask(name: str, n_prompt: int = 1, max_tokens: int | None = 0, priority: int = 0) -> Request:
    params = SamplingParams(max_tokens=max_tokens)
    return Request(name, [0] * n_prompt, params, on_output=lambda _: None, priority=priority)


def queue_of(requests: Sequence[Request], **limits: int) -> WaitingQueue:
    queue = WaitingQueue(QueueConfig(**limits))
    queue.push(requests, retry_after_s=1)
    return queue


def names_in_order(queue: WaitingQueue) -> list[str]:
    names = []
    while (request := queue.peek()) is not None:
        queue.pop(request)
        names.append(request.request_id)
    return names


class SlowRequest(Request):
    """Lets other threads run whenever its tokens are counted."""

    @property
    def n_prompt(self) -> int:
        time.sleep(1e-5)
        return len(self.prompt_ids)


@pytest.fixture
def eager_switching() -> Iterator[None]:
    """Threads take turns every few microseconds, so that a race shows."""
    interval_s = sys.getswitchinterval()
    sys.setswitchinterval(1e-6)
    yield
    sys.setswitchinterval(interval_s)


def test_lower_priority_numbers_come_first_then_arrival() -> None:
    requests = [ask("late", priority=5), ask("a"), ask("soon", priority=-1), ask("b"), ask("c")]
    assert names_in_order(queue_of(requests)) == ["soon", "a", "b", "c", "late"]


def test_arrival_order_holds_over_several_pushes() -> None:
    queue = queue_of([ask("a"), ask("b")])
    queue.push([ask("c")], retry_after_s=1)
    queue.push([ask("d"), ask("e", priority=-1)], retry_after_s=1)
    assert names_in_order(queue) == ["e", "a", "b", "c", "d"]


def test_peek_leaves_the_request_in_its_place() -> None:
    queue = queue_of([ask("a"), ask("b")])
    assert queue.peek() is queue.peek()
    assert len(queue) == 2


def test_peek_of_an_empty_queue_is_none() -> None:
    assert WaitingQueue(QueueConfig()).peek() is None


def test_pop_takes_a_request_out_of_the_middle() -> None:
    requests = [ask(name) for name in "abcdefgh"]
    queue = queue_of(requests)
    for middle in (3, 5, 0):
        queue.pop(requests[middle])
    assert names_in_order(queue) == ["b", "c", "e", "g", "h"]


def test_push_back_returns_a_request_to_its_old_place() -> None:
    requests = [ask("a"), ask("b"), ask("c")]
    queue = queue_of(requests)
    queue.pop(requests[0])
    queue.pop(requests[1])
    queue.push([ask("d")], retry_after_s=1)
    queue.push_back([requests[1], requests[0]])
    assert names_in_order(queue) == ["a", "b", "c", "d"]


def test_push_back_is_never_refused() -> None:
    requests = [ask("a", n_prompt=4), ask("b", n_prompt=4)]
    queue = queue_of(requests, max_requests=2, max_tokens=8)
    queue.pop(requests[0])
    queue.push([ask("c", n_prompt=4)], retry_after_s=1)
    queue.push_back([requests[0]])
    assert (len(queue), queue.n_tokens) == (3, 12)


def test_tokens_waiting_are_prompts_and_requested_outputs() -> None:
    queue = queue_of([ask("a", 3, max_tokens=10), ask("b", 5, max_tokens=None)])
    assert queue.n_tokens == 3 + 10 + 5


def test_tokens_waiting_return_to_zero() -> None:
    requests = [ask(str(i), n_prompt=i + 1, max_tokens=i) for i in range(6)]
    queue = queue_of(requests)
    queue.pop(requests[2])
    queue.push_back([requests[2]])
    assert len(names_in_order(queue)) == 6
    assert queue.n_tokens == 0


def test_the_background_is_not_counted_among_the_requests() -> None:
    queue = queue_of([ask("a"), ask("line", priority=BACKGROUND_PRIORITY), ask("b")])
    assert (len(queue), queue.n_requests) == (3, 2)


def test_drain_empties_the_queue_and_returns_all() -> None:
    requests = [ask("a", 3), ask("b", 4)]
    queue = queue_of(requests)
    assert sorted(r.request_id for r in queue.drain()) == ["a", "b"]
    assert (len(queue), queue.n_tokens, queue.peek()) == (0, 0, None)


def test_exactly_the_limits_fit() -> None:
    queue = queue_of([ask("a", 6), ask("b", 2, max_tokens=2)], max_requests=2, max_tokens=10)
    assert (len(queue), queue.n_tokens) == (2, 10)


@pytest.mark.parametrize(
    ("limits", "numbers"),
    [
        ({"max_requests": 3, "max_tokens": 100}, ["2 of 3 requests", "9 of 100 tokens"]),
        ({"max_requests": 100, "max_tokens": 12}, ["2 of 100 requests", "9 of 12 tokens"]),
    ],
)
def test_past_a_limit_the_refusal_has_the_numbers(
    limits: dict[str, int], numbers: list[str]
) -> None:
    queue = queue_of([ask("a", 4), ask("b", 5)], **limits)
    with pytest.raises(QueueFullError) as refusal:
        queue.push([ask("c", 2), ask("d", 1, max_tokens=3)], retry_after_s=7)
    assert refusal.value.retry_after_s == 7
    for part in [*numbers, "2 more with 6 tokens"]:
        assert part in str(refusal.value)


@pytest.mark.parametrize(
    ("limits", "numbers"),
    [
        ({"max_requests": 2}, ["3 choices", "2 requests"]),
        ({"max_tokens": 11}, ["12 tokens", "11 tokens"]),
    ],
)
def test_what_an_empty_queue_could_not_hold_is_the_requests_own_mistake(
    limits: dict[str, int], numbers: list[str]
) -> None:
    queue = WaitingQueue(QueueConfig(**limits))
    with pytest.raises(RequestError) as refusal:
        queue.push([ask("a", 3), ask("b", 3), ask("c", 3, max_tokens=3)], retry_after_s=1)
    for part in numbers:
        assert part in str(refusal.value)
    assert (len(queue), queue.n_tokens) == (0, 0)


def test_a_refused_push_adds_none_of_its_requests() -> None:
    queue = queue_of([ask("a")], max_requests=3)
    with pytest.raises(QueueFullError):
        queue.push([ask("b"), ask("c"), ask("d")], retry_after_s=1)
    queue.push([ask("e")], retry_after_s=1)
    assert names_in_order(queue) == ["a", "e"]


@pytest.mark.parametrize(
    "limits", [{"max_requests": 40}, {"max_requests": 10_000, "max_tokens": 80}]
)
@pytest.mark.usefixtures("eager_switching")
def test_a_burst_from_many_threads_fills_the_queue_to_its_limit_and_no_further(
    limits: dict[str, int],
) -> None:
    queue = WaitingQueue(QueueConfig(**limits))
    start = threading.Barrier(8)
    accepted: list[Request] = []

    def burst(thread: int) -> None:
        start.wait()
        for i in range(25):
            params = SamplingParams(max_tokens=0)
            request = SlowRequest(f"{thread}-{i}", [0, 0], params, on_output=lambda _: None)
            try:
                queue.push([request], retry_after_s=1)
            except QueueFullError:
                continue
            accepted.append(request)

    threads = [threading.Thread(target=burst, args=(i,)) for i in range(8)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert (len(accepted), len(queue), queue.n_tokens) == (40, 40, 80)
    assert sorted(r.sequence_no for r in accepted) == list(range(40))
