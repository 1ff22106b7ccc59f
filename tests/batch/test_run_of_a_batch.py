"""A batch from its file to its files: states, answers, cancelling, expiring, trying again."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from server.batch.batches import BatchConflictError
from server.batch.feeder import ROWS_IN_FLIGHT
from server.batch.lines import LineResult
from server.batch.translate import line_seed
from sl_serve.core import BACKGROUND_PRIORITY
from sl_serve.errors import RequestError
from sl_serve.stats import EngineState
from tests.batch.jobs import CHAT, HOUR_S, Jobs, jsonl, line, wait_for
from tests.server.fake_engine import FakeEngine, expected_output
from tests.server.test_completions import text_of


def test_every_line_gets_the_answer_it_would_get_alone(jobs: Jobs) -> None:
    names = [f"line {i}" * (1 + i % 3) for i in range(40)]
    batch = jobs.reach(jobs.create(jsonl(map(line, names))), "completed")
    assert (batch.total, batch.completed, batch.failed) == (40, 40, 0)
    assert batch.error_file_id is None
    answers = jobs.read(batch.output_file_id)
    assert list(answers) == names  # in the order of the input
    for name, entry in answers.items():
        seed = line_seed(7, name)
        (choice,) = entry["response"]["body"]["choices"]
        assert choice["text"] == text_of(expected_output(name, 4, seed=seed))
        assert entry["response"]["status_code"] == 200
        assert entry["error"] is None
    assert batch.output_tokens == 160
    assert batch.input_tokens == sum(1 + len(name) for name in names)


def test_chat_lines_with_several_choices_and_seeds_of_their_own(jobs: Jobs) -> None:
    body = {
        "model": "toy",
        "messages": [{"role": "user", "content": "hi"}],
        "max_tokens": 3,
        "n": 2,
        "seed": 5,
    }
    data = jsonl([line("a", body, url=CHAT)])
    batch = jobs.reach(jobs.create(data, endpoint=CHAT), "completed")
    answer = jobs.read(batch.output_file_id)["a"]["response"]["body"]
    assert answer["object"] == "chat.completion"
    assert [choice["message"]["content"] for choice in answer["choices"]] == [
        text_of(expected_output(list(b"[user]hi[assistant]"), 3, seed=5 + i)) for i in range(2)
    ]
    assert answer["usage"]["completion_tokens"] == 6


def test_seeds_differ_by_line_and_by_batch() -> None:
    seeds = {line_seed(batch, name) for batch in (1, 2) for name in ("a", "b", "1:a")}
    assert len(seeds) == 6
    assert all(0 <= seed < 2**63 for seed in seeds)


def test_few_lines_are_in_flight_and_all_wait_behind_chats(jobs: Jobs, engine: FakeEngine) -> None:
    engine.gate.clear()
    batch = jobs.create(jsonl(line(str(i)) for i in range(100)))
    jobs.reach(batch, "in_progress")
    wait_for(lambda: len(engine.active) == ROWS_IN_FLIGHT * engine.max_rows)
    assert {r.priority for r in engine.active.values()} == {BACKGROUND_PRIORITY}
    most = 0

    def count() -> bool:
        nonlocal most
        most = max(most, len(engine.active))
        return jobs.get(batch).is_finished

    engine.gate.set()
    wait_for(count)
    assert most <= ROWS_IN_FLIGHT * engine.max_rows
    assert jobs.get(batch).completed == 100


def test_the_longest_prompts_go_first(jobs: Jobs, engine: FakeEngine) -> None:
    names = ["b" * 5, "c" * 50, "d" * 20, "e" * 35]
    jobs.reach(jobs.create(jsonl(map(line, names))), "completed")
    lengths = [request.n_prompt for request in engine.submitted]
    assert lengths == sorted(lengths, reverse=True)


def test_several_jobs_take_turns(jobs: Jobs, engine: FakeEngine) -> None:
    engine.gate.clear()
    first = jobs.create(jsonl(line(f"first {i}") for i in range(200)))
    wait_for(lambda: len(engine.active) == ROWS_IN_FLIGHT * engine.max_rows)
    second = jobs.create(jsonl(line(f"second {i}") for i in range(40)))
    jobs.reach(second, "in_progress")
    engine.gate.set()
    jobs.reach(second, "completed")
    assert jobs.get(first).completed < 160
    jobs.reach(first, "completed")


def test_cancelling_keeps_what_has_ended(jobs: Jobs, engine: FakeEngine) -> None:
    short = [line(f"short {i}") for i in range(8)]
    endless = {"model": "toy", "prompt": "z", "max_tokens": 4000}
    batch = jobs.create(jsonl([*short, *(line(f"long {i}", endless) for i in range(90))]))
    wait_for(lambda: jobs.get(batch).completed == 8)
    assert jobs.service.cancel(batch.id).status in ("cancelling", "cancelled")
    ended = jobs.reach(batch, "cancelled")
    assert jobs.service.cancel(batch.id).status == "cancelled"
    assert (ended.total, ended.completed, ended.failed) == (98, 8, 90)
    assert ended.cancelling_at is not None and ended.cancelled_at is not None
    assert set(jobs.read(ended.output_file_id)) == {entry["custom_id"] for entry in short}
    errors = jobs.read(ended.error_file_id)
    assert len(errors) == 90
    assert {entry["error"]["code"] for entry in errors.values()} == {"batch_cancelled"}
    assert all(entry["response"] is None for entry in errors.values())
    assert engine.wait_idle()


def test_a_batch_that_has_ended_cannot_be_cancelled(jobs: Jobs) -> None:
    batch = jobs.reach(jobs.create(jsonl([line("a")])), "completed")
    with pytest.raises(BatchConflictError, match="is completed"):
        jobs.service.cancel(batch.id)


def test_cancelling_while_the_file_is_checked(jobs: Jobs, engine: FakeEngine) -> None:
    engine.tokenizer.encode_s = 0.01
    batch = jobs.create(jsonl(line(str(i)) for i in range(30)))
    assert jobs.service.cancel(batch.id).status == "cancelling"
    ended = jobs.reach(batch, "cancelled")
    assert (ended.total, ended.output_file_id, ended.error_file_id) == (0, None, None)
    assert engine.submitted == []


def test_expiry_keeps_what_has_ended_and_retry_does_the_rest(
    engine: FakeEngine, tmp_path: Path
) -> None:
    now_s = 1e9
    with Jobs(engine, tmp_path, clock=lambda: now_s) as jobs:
        jobs.reach(jobs.create(jsonl([line("warm")])), "completed")
        engine.gate.clear()
        batch = jobs.create(jsonl(line(f"line {i}") for i in range(50)))
        wait_for(lambda: engine.active)
        assert jobs.get(batch).expires_at == now_s + HOUR_S
        now_s += HOUR_S
        ended = jobs.reach(batch, "expired")
        assert ended.expired_at == now_s
        assert (ended.completed, ended.failed) == (0, 50)
        errors = jobs.read(ended.error_file_id)
        assert {entry["error"]["code"] for entry in errors.values()} == {"batch_expired"}
        engine.gate.set()
        assert jobs.service.retry(batch.id, HOUR_S).status == "in_progress"
        ended = jobs.reach(batch, "completed")
        assert (ended.total, ended.completed, ended.failed) == (50, 50, 0)
        assert len(jobs.read(ended.output_file_id)) == 50
        assert ended.expired_at is None
        with pytest.raises(BatchConflictError, match="with 0 failed"):
            jobs.service.retry(batch.id, HOUR_S)


def test_retry_runs_the_failed_lines_alone(jobs: Jobs, engine: FakeEngine) -> None:
    endless = {"model": "toy", "prompt": "z", "max_tokens": 4000}
    batch = jobs.create(jsonl([line("good"), line("endless", endless)]))
    wait_for(lambda: jobs.get(batch).completed == 1)
    jobs.service.cancel(batch.id)
    jobs.reach(batch, "cancelled")
    n_before = len(engine.submitted)
    jobs.service.retry(batch.id, HOUR_S)
    wait_for(lambda: len(engine.submitted) > n_before)
    jobs.service.cancel(batch.id)
    ended = jobs.reach(batch, "cancelled")
    assert [r.prompt_ids for r in engine.submitted[n_before:]] == [[256, ord("z")]]
    assert (ended.completed, ended.failed) == (1, 1)


def test_a_line_that_the_engine_fails_is_tried_again_and_then_given_up(
    jobs: Jobs, engine: FakeEngine
) -> None:
    engine.gate.clear()
    batch = jobs.create(jsonl([line("poor")]))
    for n_tries in (1, 2, 3):
        wait_for(lambda n=n_tries: len(engine.submitted) == n and engine.active)
        engine.fail("the bus fell asleep")
    ended = jobs.reach(batch, "completed")
    assert len(engine.submitted) == 3
    assert (ended.completed, ended.failed) == (0, 1)
    (entry,) = jobs.read(ended.error_file_id).values()
    assert entry["error"]["code"] == "engine_crash"


def test_a_line_that_no_longer_fits_has_the_error_of_an_online_request(
    jobs: Jobs, engine: FakeEngine
) -> None:
    engine.state = EngineState.DRAINING  # the file is checked, no line is run
    batch = jobs.create(jsonl([line("short"), line("x" * 50)]))
    jobs.reach(batch, "in_progress")
    engine.max_model_len = 20
    engine.state = EngineState.RUNNING
    ended = jobs.reach(batch, "completed")
    assert (ended.completed, ended.failed) == (1, 1)
    (entry,) = jobs.read(ended.error_file_id).values()
    assert entry["error"] is None
    assert entry["response"]["status_code"] == 400
    assert entry["response"]["body"]["error"]["code"] == "context_length_exceeded"


def test_the_same_key_is_the_same_batch(jobs: Jobs) -> None:
    file = jobs.upload(jsonl([line("a")])).id
    first = jobs.create(b"", input_file_id=file, idempotency_key="k")
    again = jobs.create(b"", input_file_id=file, idempotency_key="k")
    other = jobs.create(b"", input_file_id=file, idempotency_key="l")
    assert again.id == first.id != other.id
    with pytest.raises(BatchConflictError, match="another request"):
        jobs.create(b"", input_file_id=file, idempotency_key="k", seed=8)


def test_a_file_is_kept_while_a_batch_reads_it(jobs: Jobs, engine: FakeEngine) -> None:
    engine.gate.clear()
    batch = jobs.create(jsonl([line("a")]))
    with pytest.raises(RequestError, match="is the input of batch"):
        jobs.service.files.delete(batch.input_file_id)
    engine.gate.set()
    jobs.reach(batch, "completed")
    path = jobs.service.files.path(batch.input_file_id)
    assert path.exists()
    jobs.service.files.delete(batch.input_file_id)
    assert not path.exists()


def test_progress_has_rate_and_end(engine: FakeEngine, tmp_path: Path) -> None:
    now_s = 1e9
    with Jobs(engine, tmp_path, clock=lambda: now_s) as jobs:
        endless = {"model": "toy", "prompt": "z", "max_tokens": 4000}
        batch = jobs.create(jsonl([line("short"), line("long", endless)]))
        wait_for(lambda: jobs.get(batch).completed == 1)
        now_s += 10
        progress: dict[str, Any] = jobs.service.describe(jobs.get(batch))["progress"]
        tokens = 1 + len("short") + 4
        assert progress == {
            "lines": 1,
            "total": 2,
            "tokens": tokens,
            "tokens_per_second": tokens / 10,
            "expected_at": 1e9 + 20,
        }
        jobs.service.cancel(batch.id)


def test_results_are_there_while_the_batch_runs(jobs: Jobs) -> None:
    endless = {"model": "toy", "prompt": "z", "max_tokens": 4000}
    batch = jobs.create(jsonl([line("a"), line("b"), line("long", endless)]))
    wait_for(lambda: jobs.get(batch).completed == 2)
    rows = jobs.service.lines.results_after(batch, 0)
    assert {json.loads(row["body"])["custom_id"] for row in rows} == {"a", "b"}
    assert jobs.service.lines.results_after(batch, rows[-1]["seq"]) == []
    jobs.service.cancel(batch.id)


def test_the_first_result_of_a_line_stands(jobs: Jobs) -> None:
    batch = jobs.reach(jobs.create(jsonl([line("a"), line("b")])), "completed")
    (row, _) = jobs.service.lines.results_after(batch, 0)
    late = LineResult(batch.seq, 1, False, b'{"late": true}\n', 5, 5)
    jobs.service.lines.turn([late, late], (), (), {})
    assert jobs.service.lines.results_after(batch, 0)[0]["body"] == row["body"]
    assert jobs.get(batch) == batch
