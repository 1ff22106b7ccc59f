"""Disks that are full or read-only, a locked database, a clock that jumps: a clean error, and work
that goes on once the cause is gone."""

from __future__ import annotations

import errno
import sqlite3
import time
from collections.abc import Iterator
from contextlib import closing, contextmanager
from dataclasses import replace
from pathlib import Path
from typing import Any

import httpx
import pytest

from server.batch import clerk, database, feeder
from server.batch.clock import steady_clock
from server.batch.database import Database, StoreError
from server.batch.files import Upload
from server.batch.service import BatchService, check_folder
from server.context import ServerContext
from sl_serve.errors import UserError
from tests.batch.jobs import COMPLETIONS, SETTINGS, Jobs, jsonl, line, wait_for
from tests.server.conftest import LiveServer
from tests.server.fake_engine import FakeEngine


@pytest.fixture(autouse=True)
def _short_pauses(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(feeder, "RETRY_S", 0.05)
    monkeypatch.setattr(clerk, "RETRY_S", 0.05)
    monkeypatch.setattr(database, "BUSY_S", 0.05)


@contextmanager
def locked(folder: Path) -> Iterator[None]:
    """Another program holds the database's write lock."""
    with closing(sqlite3.connect(folder / "jobs.sqlite", isolation_level=None)) as other:
        other.execute("BEGIN IMMEDIATE")
        yield
        other.execute("ROLLBACK")


def post(live: LiveServer, data: bytes) -> httpx.Response:
    files = {"file": ("in.jsonl", data)}
    return httpx.post(live.url + "/v1/files", files=files, data={"purpose": "batch"})


def assert_error(answer: httpx.Response, status: int, code: str) -> None:
    assert answer.status_code == status, answer.text
    error = answer.json()["error"]
    assert error["code"] == code
    assert error.keys() == {"message", "type", "param", "code"}
    assert error["type"] == "server_error"
    assert "/" not in error["message"]  # no path of ours


def test_a_full_disk_is_507_and_uploads_work_again_after_it(
    live: LiveServer, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def full(*_: object) -> None:
        raise OSError(errno.ENOSPC, "No space left on device")

    with monkeypatch.context() as patched:
        patched.setattr("server.batch.files.os.fsync", full)
        assert_error(post(live, b"x"), 507, "insufficient_storage")
    assert list((tmp_path / "jobs" / "files").iterdir()) == []
    assert post(live, b"x").status_code == 200


def test_a_real_full_disk(live: LiveServer, monkeypatch: pytest.MonkeyPatch) -> None:
    """/dev/full takes no byte."""
    inner = Upload.__init__

    def on_full_device(self: Upload, path: Path, *args: Any) -> None:
        inner(self, path, *args)
        self._file.close()
        self._file = open("/dev/full", "wb")  # noqa: SIM115

    with monkeypatch.context() as patched:
        patched.setattr(Upload, "__init__", on_full_device)
        assert_error(post(live, b"x" * 300_000), 507, "insufficient_storage")
    assert post(live, b"x").status_code == 200


def test_the_quota_is_507_until_files_are_deleted(engine: FakeEngine, tmp_path: Path) -> None:
    settings = replace(SETTINGS, jobs_dir=tmp_path, jobs_quota_bytes=1000)
    with LiveServer(engine, settings) as live:
        first = post(live, b"x" * 700)
        assert first.status_code == 200
        assert_error(post(live, b"x" * 400), 507, "insufficient_storage")
        assert httpx.delete(f"{live.url}/v1/files/{first.json()['id']}").is_success
        assert post(live, b"x" * 400).status_code == 200


def test_a_locked_database_is_500_and_the_job_goes_on_after_it(
    engine: FakeEngine, live: LiveServer, tmp_path: Path
) -> None:
    engine.gate.clear()
    file_id = post(live, jsonl(line(f"{i}") for i in range(50))).json()["id"]
    body = {"input_file_id": file_id, "endpoint": COMPLETIONS, "completion_window": "24h"}
    batch = httpx.post(live.url + "/v1/batches", json=body).json()
    wait_for(lambda: engine.active)
    url = f"{live.url}/v1/batches/{batch['id']}"
    with locked(tmp_path / "jobs"):
        engine.gate.set()
        assert engine.wait_idle()  # answers are there, and cannot be committed
        time.sleep(0.2)
        assert_error(httpx.post(f"{url}/cancel"), 500, "internal_error")
        assert httpx.get(url).json()["request_counts"]["completed"] == 0
    wait_for(lambda: httpx.get(url).json()["status"] == "completed")
    counts = httpx.get(url).json()["request_counts"]
    assert counts == {"total": 50, "completed": 50, "failed": 0}
    assert len(engine.submitted) == 50  # no answer was thrown away


def test_a_disk_that_fills_while_files_are_written_out(
    jobs: Jobs, engine: FakeEngine, monkeypatch: pytest.MonkeyPatch
) -> None:
    engine.gate.clear()
    batch = jobs.create(jsonl([line("a"), line("b")]))
    wait_for(lambda: len(engine.active) == 2)
    folder = jobs.folder / "files"
    tries = []

    def full(path: Path) -> None:
        tries.append(path)
        raise OSError(errno.ENOSPC, "No space left on device")

    with monkeypatch.context() as patched:
        patched.setattr("server.batch.files.sync_folder", full)
        engine.gate.set()
        wait_for(lambda: len(tries) >= 3)
        assert jobs.get(batch).status == "finalizing"
    ended = jobs.reach(batch, "completed")
    assert list(jobs.read(ended.output_file_id)) == ["a", "b"]
    wait_for(lambda: len(list(folder.iterdir())) == 2)  # nothing is left of the tries


def test_an_input_that_cannot_be_read_for_a_while(jobs: Jobs, engine: FakeEngine) -> None:
    engine.gate.clear()
    file = jobs.upload(jsonl([line("a")]))
    path = jobs.service.files.path(file.id)
    aside = path.with_suffix(".aside")
    path.rename(aside)
    batch = jobs.create(b"", input_file_id=file.id)
    other = jobs.create(jsonl([line("b")]))
    time.sleep(0.2)
    assert jobs.get(batch).status == "validating"
    aside.rename(path)
    engine.gate.set()
    jobs.reach(other, "completed")
    jobs.reach(batch, "completed")


def test_an_input_that_is_cut_off_holds_up_its_own_batch_alone(
    jobs: Jobs, engine: FakeEngine
) -> None:
    engine.max_rows = 1
    batch = jobs.create(jsonl(line(f"{i}") for i in range(30)))
    wait_for(lambda: jobs.get(batch).completed)
    path = jobs.service.files.path(batch.input_file_id)
    whole = path.read_bytes()
    path.write_bytes(b"")
    other = jobs.reach(jobs.create(jsonl([line("b")])), "completed")
    assert other.failed == 0
    path.write_bytes(whole)
    ended = jobs.reach(batch, "completed")
    assert (ended.completed, ended.failed) == (30, 0)


def test_the_date_may_jump(monkeypatch: pytest.MonkeyPatch) -> None:
    clock = steady_clock()
    before = clock()
    monkeypatch.setattr(time, "time", lambda: 0.0)
    assert before <= clock() < before + 60


def test_folders_that_cannot_be_used_are_a_users_error(engine: FakeEngine, tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    with pytest.raises(UserError, match="cannot be written to"):
        check_folder(tmp_path / "file")
    check_folder(tmp_path / "jobs")
    with Jobs(engine, tmp_path / "jobs"), pytest.raises(UserError, match="another process"):
        check_folder(tmp_path / "jobs")
    check_folder(tmp_path / "jobs")
    with closing(sqlite3.connect(tmp_path / "jobs" / "jobs.sqlite")) as other:
        other.execute("PRAGMA user_version = 99")
    with pytest.raises(UserError, match="version 99"):
        BatchService(ServerContext(engine, SETTINGS), tmp_path / "jobs")
    (tmp_path / "jobs" / "jobs.sqlite").write_bytes(b"no database at all" * 100)
    with pytest.raises(UserError, match="cannot be used"):
        check_folder(tmp_path / "jobs")


def test_a_transaction_that_fails_leaves_nothing(tmp_path: Path) -> None:
    row = (
        "INSERT INTO files (id, filename, purpose, n_bytes, sha256, created_at) "
        "VALUES ('a', '', '', 0, '', 0)"
    )

    def insert_twice(store: Database) -> None:
        with store.transaction() as tx:
            tx.execute(row)
            tx.execute(row)

    with closing(Database(tmp_path / "d")) as store:
        with pytest.raises(StoreError, match="UNIQUE"):
            insert_twice(store)
        assert store.rows("SELECT * FROM files") == []
        with store.transaction() as tx:
            tx.execute(row)
        assert len(store.rows("SELECT * FROM files")) == 1


def test_what_has_expired_is_tidied_up(engine: FakeEngine, tmp_path: Path) -> None:
    now_s = 1e9
    with Jobs(engine, tmp_path, clock=lambda: now_s) as jobs:
        batch = jobs.reach(jobs.create(jsonl([line("a")])), "completed")
        engine.gate.clear()
        running = jobs.create(jsonl([line("a")]), window_s=10**9)
        wait_for(lambda: engine.active)
        now_s += 31 * 24 * 3600
        jobs.service.files.delete_expired()
        jobs.service.batches.delete_old()
        records, _ = jobs.service.files.page(10, None, True, None)
        assert [record.id for record in records] == [running.input_file_id]
        assert [b.id for b in jobs.service.batches.page(10, None)[0]] == [running.id]
        (row,) = jobs.service._database.rows("SELECT count(*) AS n FROM results")
        assert row["n"] == 0
        assert not jobs.service.files.path(batch.input_file_id).exists()
