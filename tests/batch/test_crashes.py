"""Processes that die at any moment: no line is lost, doubled or torn, nor blamed wrongly."""

from __future__ import annotations

import json
import random
import signal
import sqlite3
import subprocess
import sys
from pathlib import Path
from typing import Any

from server.batch.feeder import MAX_ATTEMPTS, ROWS_IN_FLIGHT
from server.batch.translate import line_seed
from tests.batch.jobs import Jobs, jsonl, line, wait_for
from tests.batch.run_file_with_fake import MAX_ROWS
from tests.server.fake_engine import FakeEngine, expected_output
from tests.server.test_completions import text_of

ROOT = Path(__file__).parents[2]
IN_FLIGHT = ROWS_IN_FLIGHT * MAX_ROWS


class Run:
    """The same run, life after life."""

    def __init__(self, folder: Path, entries: list[dict[str, Any]], kind: str = "sound") -> None:
        self.source, self.output = folder / "in.jsonl", folder / "out.jsonl"
        self.source.write_bytes(jsonl(entries))
        self._arguments = [str(self.source), str(self.output), "0.01", kind]
        self.recovered: list[int] = []

    def live(self, kill_after: int | None = None) -> int:
        """Until its end, or SIGKILL once so many lines have ended; the exit code."""
        command = [sys.executable, "-m", "tests.batch.run_file_with_fake", *self._arguments]
        pipe = subprocess.PIPE
        with subprocess.Popen(command, cwd=ROOT, stdout=pipe, stderr=pipe, text=True) as process:
            assert process.stdout is not None and process.stderr is not None
            for said in process.stdout:
                if kill_after is not None and said != "ready\n" and int(said) >= kill_after:
                    process.kill()
            log = process.stderr.read()
        for entry in map(json.loads, log.splitlines()):
            if entry["event"] == "batch_lines_recovered":
                self.recovered.append(entry["lines"])
        return process.returncode

    def read(self) -> list[dict[str, Any]]:
        return [json.loads(entry) for entry in self.output.read_bytes().splitlines()]


def test_three_kills_and_every_line_once(tmp_path: Path) -> None:
    """A small version of `scripts/prove kills`."""
    rng = random.Random(0)
    names = [f"line {i}" for i in range(60)]
    run = Run(tmp_path, [line(name) for name in names])
    done = 0
    for _ in range(3):
        assert run.live(kill_after=done) == -signal.SIGKILL
        done += rng.randrange(1, 20)
        assert not run.output.exists()
    assert run.live() == 0
    entries = run.read()
    assert [entry["custom_id"] for entry in entries] == names
    for entry in entries:
        expected = expected_output(entry["custom_id"], 4, line_seed(3, entry["custom_id"]))
        assert entry["response"]["body"]["choices"][0]["text"] == text_of(expected)
    assert all(n <= IN_FLIGHT for n in run.recovered)
    assert not tmp_path.joinpath("out.jsonl.run").exists()


def test_a_line_that_kills_the_process_is_found_and_no_other_is_blamed(tmp_path: Path) -> None:
    poison = {"model": "toy", "prompt": "poison", "max_tokens": 4}
    entries = [*(line(f"line {i}") for i in range(20)), line("poor", poison)]
    run = Run(tmp_path, entries, "poison")
    for _ in range(20):
        code = run.live()
        if code != -signal.SIGKILL:
            break
    assert code == 1
    assert len(run.read()) == 20
    (error,) = map(json.loads, (tmp_path / "out.errors.jsonl").read_bytes().splitlines())
    assert (error["custom_id"], error["error"]["code"]) == ("poor", "engine_crash")


def test_what_ran_is_queued_again_and_answers_are_kept(engine: FakeEngine, tmp_path: Path) -> None:
    """The first owner is cut off without a chance to put anything right."""
    folder = tmp_path / "jobs"
    endless = {"model": "toy", "prompt": "z", "max_tokens": 400}
    with Jobs(engine, folder) as first:
        batch = first.create(jsonl([line("short"), *(line(f"{i}", endless) for i in range(3))]))
        wait_for(lambda: first.get(batch).completed == 1)
        engine.gate.clear()
        copy = tmp_path / "copy"
        copy_folder(folder, copy)
    engine.gate.set()
    with Jobs(engine, copy) as second:
        ended = second.reach(batch, "completed")
        assert (ended.completed, ended.failed) == (4, 0)
        assert len(second.read(ended.output_file_id)) == 4


def copy_folder(source: Path, target: Path) -> None:
    """As it lies on the disk at one moment."""
    (target / "files").mkdir(parents=True)
    with sqlite3.connect(source / "jobs.sqlite") as database:
        database.execute("VACUUM INTO ?", (str(target / "jobs.sqlite"),))
    database.close()
    for path in (source / "files").iterdir():
        (target / "files" / path.name).write_bytes(path.read_bytes())


def test_a_stop_puts_lines_back_without_blame(engine: FakeEngine, tmp_path: Path) -> None:
    """More often than a line may fail: stops are nobody's fault."""
    endless = {"model": "toy", "prompt": "z", "max_tokens": 3000}
    with Jobs(engine, tmp_path) as jobs:
        batch = jobs.create(jsonl(line(f"{i}", endless) for i in range(5)))
        wait_for(lambda: len(engine.active) == 5)
    for _ in range(MAX_ATTEMPTS + 1):
        with Jobs(engine, tmp_path) as jobs:
            wait_for(lambda: len(engine.active) == 5)
            assert jobs.get(batch).status == "in_progress"
        assert engine.active == {}
    with sqlite3.connect(tmp_path / "jobs.sqlite") as database:
        states = database.execute("SELECT DISTINCT state, attempts FROM lines").fetchall()
    database.close()
    assert states == [(0, 0)]


def test_a_finished_line_is_committed_by_a_stop(engine: FakeEngine, tmp_path: Path) -> None:
    with Jobs(engine, tmp_path) as jobs:
        engine.gate.clear()
        batch = jobs.create(jsonl(line(f"{i}") for i in range(10)))
        wait_for(lambda: len(engine.active) == 10)
        engine.step_s = 0.05
        engine.gate.set()
        wait_for(lambda: engine.n_steps >= 3)
    with Jobs(engine, tmp_path) as jobs:
        assert jobs.reach(batch, "completed").completed == 10


def test_finalizing_is_done_again_from_its_beginning(engine: FakeEngine, tmp_path: Path) -> None:
    with Jobs(engine, tmp_path) as jobs:
        batch = jobs.reach(jobs.create(jsonl([line("a"), line("b")])), "completed")
    with sqlite3.connect(tmp_path / "jobs.sqlite") as database:  # as before the last transaction
        database.execute("DELETE FROM files WHERE id = ?", (batch.output_file_id,))
        database.execute("UPDATE batches SET status = 'finalizing', output_file_id = NULL")
    database.close()
    (tmp_path / "files" / "torn.part").write_bytes(b'{"id')
    with Jobs(engine, tmp_path) as jobs:
        ended = jobs.reach(batch, "completed")
        assert list(jobs.read(ended.output_file_id)) == ["a", "b"]
        wait_for(lambda: len(list((tmp_path / "files").iterdir())) == 2)  # input and output


def test_checking_is_done_again_from_its_beginning(engine: FakeEngine, tmp_path: Path) -> None:
    engine.tokenizer.encode_s = 0.002
    with Jobs(engine, tmp_path) as jobs:
        batch = jobs.create(jsonl(line(f"{i}") for i in range(1200)))
        wait_for(lambda: list(jobs.service.lines.without_result(batch)))  # the first group
    engine.tokenizer.encode_s = 0.0
    with Jobs(engine, tmp_path) as jobs:
        assert jobs.get(batch).status == "validating"
        jobs.reach(batch, "in_progress")
        assert jobs.get(batch).total == 1200
        jobs.service.cancel(batch.id)


def test_a_dead_engine_leaves_the_job_for_the_next_process(tmp_path: Path) -> None:
    dying = FakeEngine()
    dying.gate.clear()
    with Jobs(dying, tmp_path) as jobs:
        batch = jobs.create(jsonl(line(f"{i}") for i in range(5)))
        wait_for(lambda: len(dying.active) == 5)
        dying.die("the bus fell asleep")
        assert dying.wait_idle()
        assert jobs.get(batch).status == "in_progress"
    dying.close()
    engine = FakeEngine()
    with Jobs(engine, tmp_path) as jobs:
        assert jobs.reach(batch, "completed").completed == 5
    engine.close()


def test_attempts_count_only_where_the_owner_ended_nothing(
    engine: FakeEngine, tmp_path: Path
) -> None:
    engine.gate.clear()
    with Jobs(engine, tmp_path / "jobs") as jobs:
        batch = jobs.create(jsonl(line(f"{i}") for i in range(3)))
        wait_for(lambda: len(engine.active) == 3)
        for n_results in (0, 5):
            copy = tmp_path / f"copy {n_results}"
            copy_folder(tmp_path / "jobs", copy)
            with sqlite3.connect(copy / "jobs.sqlite") as database:
                database.execute("UPDATE owner SET n_results = ?", (n_results,))
            database.close()
            with Jobs(FakeEngine(stuck=True), copy) as next_jobs:
                wait_for(lambda j=next_jobs: len(j.engine.active) == 3)
                rows = next_jobs.service._database.rows("SELECT attempts FROM lines")
                assert [row["attempts"] for row in rows] == [1 if n_results else 2] * 3
                next_jobs.engine.stuck = False
        jobs.service.cancel(batch.id)
