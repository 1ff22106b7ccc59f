"""The engine thread: admission, endings, failures, draining; nothing left behind."""

from __future__ import annotations

import threading
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from transformers import LlamaForCausalLM

from sl_serve.config import EngineConfig, QueueConfig, SchedulerConfig
from sl_serve.core import FinishReason, Request, SamplingParams, TokenOut
from sl_serve.engine import Engine
from sl_serve.errors import EngineClosedError, EngineDeadError, QueueFullError, RequestError
from sl_serve.loader import Parts
from sl_serve.stats import EngineState
from tests.engine.running import GREEDY, Answers, config, engine, requests_for, run, steps_of

LONG = replace(GREEDY, max_tokens=200)
PROMPT = [10, 20, 30, 40]


@pytest.fixture(scope="module")
def folder(tiny: tuple[Path, LlamaForCausalLM]) -> Path:
    return tiny[0]


class Gate:
    """Holds the sweep at the beginning of each step until it is opened."""

    def __init__(self) -> None:
        self.opened = threading.Event()
        self.reached = threading.Event()

    def install(self, parts: Parts) -> None:
        inner = parts.sweep.run

        def gated(*args: object) -> list[torch.Tensor]:
            self.reached.set()
            assert self.opened.wait(30)
            return inner(*args)  # type: ignore[arg-type]

        parts.sweep.run = gated  # type: ignore[assignment, method-assign]


def failing(after_steps: int) -> Callable[[Parts], None]:
    def install(parts: Parts) -> None:
        inner, calls = parts.sweep.run, iter(range(10**9))

        def run_or_fail(*args: object) -> list[torch.Tensor]:
            if next(calls) >= after_steps:
                raise RuntimeError("the bus fell asleep")
            return inner(*args)  # type: ignore[arg-type]

        parts.sweep.run = run_or_fail  # type: ignore[assignment, method-assign]

    return install


def last(answers: Answers, i: int) -> TokenOut:
    return answers.news[i][-1]


@pytest.mark.parametrize(
    ("prompt", "sampling", "message"),
    [
        ([], GREEDY, "the prompt is empty; it needs at least one token"),
        ([1, 272], GREEDY, "'prompt' has the token id 272; the vocabulary has ids 0 to 271"),
        ([1, -1], GREEDY, "'prompt' has the token id -1; the vocabulary has ids 0 to 271"),
        ([1], replace(GREEDY, min_tokens=1, stop_token_ids=(272,)), "'stop_token_ids' has the"),
        ([1], replace(GREEDY, logit_bias={272: 1.0}), "'logit_bias' has the token id 272"),
        ([1], replace(GREEDY, top_k=-1, temperature=1), "'top_k' is -1"),
        ([1] * 256, GREEDY, "the prompt has 256 tokens, the context 256; shorten the prompt"),
        ([1] * 257, replace(GREEDY, max_tokens=0), "the prompt has 257 tokens, the context 256"),
    ],
)
def test_impossible_requests_are_refused(
    folder: Path, prompt: list[int], sampling: SamplingParams, message: str
) -> None:
    with engine(folder, config()) as running:
        requests, _ = requests_for([PROMPT, prompt], sampling)
        with pytest.raises(RequestError, match=message):
            running.submit(requests)
        assert running.snapshot().n_running == running.snapshot().n_waiting == 0


def test_a_prompt_that_fills_the_context_can_be_looked_at(folder: Path) -> None:
    looking = SamplingParams(max_tokens=0, temperature=0, prompt_logprobs=0)
    with engine(folder, config(prefill_chunk_tokens=100)) as running:
        requests, answers = requests_for([[7] * 256], looking)
        running.submit(requests)
        assert answers.wait() == [[]]
    out = last(answers, 0)
    assert out.finish_reason is FinishReason.LENGTH
    assert out.prompt_logprobs is not None and len(out.prompt_logprobs) == 256


def test_output_ends_with_the_context(folder: Path) -> None:
    unlimited = replace(GREEDY, max_tokens=None)
    with engine(folder, config()) as running:
        tokens = run(running, [[5] * 250], unlimited)
    assert len(tokens[0]) == 6


def test_an_id_in_use_is_refused(folder: Path) -> None:
    gate = Gate()
    with engine(folder, config(), change=gate.install) as running:
        requests, answers = requests_for([PROMPT], GREEDY)
        running.submit(requests)
        again, _ = requests_for([PROMPT], GREEDY)
        with pytest.raises(RequestError, match="is in use"):
            running.submit(again)
        gate.opened.set()
        answers.wait()


def test_a_full_queue_refuses_with_a_delay(folder: Path) -> None:
    gate = Gate()
    settings = replace(config(max_rows=1), queue=QueueConfig(max_requests=3))
    with engine(folder, settings, change=gate.install) as running:
        requests, answers = requests_for([PROMPT] * 4, GREEDY)
        running.submit(requests[:1])
        assert gate.reached.wait(30)  # it runs; the other three wait
        running.submit(requests[1:])
        more, _ = requests_for([PROMPT], GREEDY, tag="more")
        with pytest.raises(QueueFullError, match="3 of 3 requests") as caught:
            running.submit(more)
        assert 1 <= caught.value.retry_after_s <= 120
        gate.opened.set()
        assert len(answers.wait()) == 4


def test_abort_frees_the_row_within_a_step(folder: Path) -> None:
    gate = Gate()
    with engine(folder, config(max_rows=1), change=gate.install) as running:
        requests, answers = requests_for([PROMPT] * 2, LONG)
        running.submit(requests)
        assert gate.reached.wait(30)
        steps = steps_of(running)
        for request in requests:  # one runs, one waits
            running.abort(request.request_id)
        running.abort("nobody")
        gate.opened.set()
        answers.wait()
        assert [last(answers, i).finish_reason for i in (0, 1)] == [FinishReason.ABORT] * 2
        assert len(steps) <= 1
        assert running.snapshot().kv_used_bytes == 0


def test_a_receiver_that_fails_ends_its_own_request_only(folder: Path) -> None:
    def explode(_: TokenOut) -> None:
        raise ValueError("nobody listens")

    with engine(folder, config()) as running:
        bad = Request("bad", PROMPT, GREEDY, explode)
        requests, answers = requests_for([PROMPT], GREEDY)
        running.submit([bad, *requests])
        assert len(answers.wait()[0]) == 24
        assert running.snapshot().state is EngineState.RUNNING


@pytest.mark.parametrize("after_steps", [0, 3])
def test_a_failing_step_reaches_every_request(folder: Path, after_steps: int) -> None:
    with engine(folder, config(max_rows=2), change=failing(after_steps)) as running:
        requests, answers = requests_for([PROMPT] * 5, LONG)
        running.submit(requests)
        answers.wait()
        for i in range(5):
            assert last(answers, i).finish_reason is FinishReason.ERROR
            assert last(answers, i).error == "RuntimeError: the bus fell asleep"
        assert running.snapshot().state is EngineState.DEAD
        later, _ = requests_for([PROMPT], GREEDY, tag="later")
        with pytest.raises(EngineDeadError, match="the bus fell asleep"):
            running.submit(later)


def test_who_hears_of_the_end_may_use_the_id_again(folder: Path) -> None:
    """An abort that came too late is not the next request's."""
    with engine(folder, config()) as running:
        second, answers = requests_for([PROMPT], replace(GREEDY, max_tokens=3))
        used_bytes: list[int] = []

        def hear(out: TokenOut) -> None:
            running.abort(out.request_id)
            if out.finish_reason is not None:
                used_bytes.append(running.snapshot().kv_used_bytes)
                running.submit(second)

        sampling = replace(GREEDY, max_tokens=1)
        running.submit([Request(second[0].request_id, PROMPT, sampling, hear)])
        assert [len(ids) for ids in answers.wait()] == [3]
    assert used_bytes == [0]


def test_drain_waits_until_the_last_news_is_heard(folder: Path) -> None:
    told, heard = threading.Event(), threading.Event()

    def hear(out: TokenOut) -> None:
        told.set()
        assert heard.wait(30)

    with engine(folder, config()) as running:
        running.submit([Request("slow", PROMPT, replace(GREEDY, max_tokens=1), hear)])
        assert told.wait(30)
        assert not running.drain(0.05)
        heard.set()
        assert running.drain(30)


def test_drain_finishes_what_runs_and_refuses_the_rest(folder: Path) -> None:
    with engine(folder, config()) as running:
        requests, answers = requests_for([PROMPT] * 3, LONG)
        running.submit(requests)
        assert running.drain(60)
        assert [len(t) for t in answers.wait()] == [200] * 3
        later, _ = requests_for([PROMPT], GREEDY, tag="later")
        with pytest.raises(EngineClosedError):
            running.submit(later)


def test_drain_gives_up_in_time_and_close_ends_the_rest(folder: Path) -> None:
    gate = Gate()
    with engine(folder, config(max_rows=1), change=gate.install) as running:
        requests, answers = requests_for([PROMPT] * 2, LONG)
        running.submit(requests)
        assert gate.reached.wait(30)
        assert not running.drain(0.05)
        threading.Timer(0.05, gate.opened.set).start()
        running.close()
        answers.wait()
        assert last(answers, 0).error == "the server is shutting down"
        assert last(answers, 1).finish_reason is FinishReason.ERROR


def test_priority_overtakes(folder: Path) -> None:
    gate = Gate()
    ended: list[str] = []
    with engine(folder, config(max_rows=1), change=gate.install) as running:
        requests, answers = requests_for([PROMPT] * 4, replace(GREEDY, max_tokens=2))
        for request in requests:
            inner = request.on_output
            request.on_output = lambda out, inner=inner: (
                ended.append(out.request_id) if out.finish_reason else None,
                inner(out),
            )[-1]
        requests[3].priority = -1
        running.submit(requests[:1])
        assert gate.reached.wait(30)
        running.submit(requests[1:])
        gate.opened.set()
        answers.wait()
    assert ended == ["r0", "r3", "r1", "r2"]


def test_a_seed_is_drawn_where_none_is_given(folder: Path) -> None:
    free = SamplingParams(max_tokens=20, temperature=1.5, ignore_eos=True)
    with engine(folder, config()) as running:
        first, second = run(running, [PROMPT, PROMPT], free)
    assert first != second


def test_snapshot_counts(folder: Path) -> None:
    with engine(folder, config()) as running:
        run(running, [PROMPT] * 3, replace(GREEDY, max_tokens=5))
        assert running.drain(10)
        snapshot = running.snapshot()
    assert snapshot.prompt_tokens_total == 12
    assert snapshot.generated_tokens_total == 15
    assert snapshot.n_steps == 5
    assert snapshot.weight_bytes_total == 5 * running.plan.weights_bytes
    assert snapshot.since_progress_s == 0.0


def test_one_turn_at_a_time_under_a_crowd(folder: Path) -> None:
    """Many threads submit and abort at once; every request ends exactly once."""
    settings = EngineConfig(
        kv_memory_bytes=1 << 20,
        scheduler=SchedulerConfig(max_rows=8, prefill_chunk_tokens=32),
    )
    groups: list[Answers] = []
    with engine(folder, settings) as running:

        def client(n: int) -> None:
            requests, answers = requests_for([PROMPT * (1 + n)] * 8, LONG, tag=f"{n}-")
            groups.append(answers)
            running.submit(requests)
            for request in requests[::2]:
                running.abort(request.request_id)

        threads = [threading.Thread(target=client, args=(n,)) for n in range(6)]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
        for answers in groups:
            answers.wait()
        assert_idle(running)
    endings = [[o for o in news if o.finish_reason] for a in groups for news in a.news]
    assert len(endings) == 48
    assert all(len(e) == 1 for e in endings)


def assert_idle(running: Engine) -> None:
    assert running.drain(10)
    snapshot = running.snapshot()
    assert (snapshot.n_running, snapshot.n_waiting, snapshot.kv_used_bytes) == (0, 0, 0)


def test_a_row_that_outgrows_its_slab_moves_to_a_narrower_one(
    folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Without max_tokens the width is a guess; here one that the whole pool cannot make good."""
    unlimited = replace(GREEDY, max_tokens=None)
    with engine(folder, config()) as running:
        expected = run(running, [PROMPT], unlimited)
    monkeypatch.setattr("sl_serve.engine.TYPICAL_OUTPUT_TOKENS", 8)
    small = replace(config(max_rows=8), kv_memory_bytes=800_000)
    with engine(folder, small) as running:
        assert running.plan.max_model_len == 256
        assert run(running, [PROMPT], unlimited) == expected
        assert running.snapshot().n_parked_total > 0
