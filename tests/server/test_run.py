"""Binding, signals and the end of the process."""

from __future__ import annotations

import json
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import contextmanager
from typing import Any

import httpx
import pytest

from server.run import bind
from sl_serve.errors import UserError
from tests.server.fake_engine import expected_output
from tests.server.test_completions import events, text_of

ROOT = __file__.rsplit("/tests/", 1)[0]
PATH = "/v1/completions"
LONG = {"prompt": "a", "max_tokens": 60, "seed": 1}  # 1.2 s of steps


class Process:
    def __init__(self, *arguments: str) -> None:
        command = [sys.executable, "-m", "tests.server.serve_fake", *arguments]
        self._process = subprocess.Popen(
            command, cwd=ROOT, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True
        )
        assert self._process.stdout is not None
        self.url = self._process.stdout.readline().strip()

    def signal(self, number: signal.Signals) -> None:
        self._process.send_signal(number)

    def wait_for(self, event: str) -> None:
        """Reads the log until it tells of it."""
        assert self._process.stderr is not None
        for line in self._process.stderr:
            if event in line:
                return
        pytest.fail(f"the log does not tell of {event}")

    def wait(self) -> tuple[int, str]:
        """Exit code and log."""
        _, log = self._process.communicate(timeout=60)
        return self._process.returncode, log

    def kill(self) -> None:
        if self._process.poll() is None:
            self._process.kill()
            self._process.communicate()


@contextmanager
def serving(*arguments: str) -> Iterator[Process]:
    process = Process(*arguments)
    try:
        yield process
    finally:
        process.kill()


@contextmanager
def posting(process: Process, *bodies: dict[str, Any]) -> Iterator[list[Future[httpx.Response]]]:
    """Requests under way, all with the engine."""
    with ThreadPoolExecutor(len(bodies)) as pool:
        url = process.url + PATH
        posts = [pool.submit(httpx.post, url, json=body, timeout=15) for body in bodies]
        deadline_s = time.monotonic() + 10
        while time.monotonic() < deadline_s:
            metrics = httpx.get(process.url + "/metrics").text
            if f"\nsl_serve_num_requests_running {len(bodies):.1f}\n" in metrics:
                break
        else:
            pytest.fail(metrics)
        yield posts


def test_drain_finishes_what_runs_and_refuses_the_rest() -> None:
    with (
        serving("30", "open", "json") as process,
        posting(process, LONG, LONG | {"stream": True}) as (whole, stream),
    ):
        process.signal(signal.SIGTERM)
        time.sleep(0.2)
        refused = httpx.post(process.url + PATH, json=LONG)
        assert refused.status_code == 503
        assert refused.json()["error"]["code"] == "shutting_down"
        assert 1 <= int(refused.headers["retry-after"]) <= 120
        assert httpx.get(process.url + "/ready").status_code == 503
        assert httpx.get(process.url + "/live").status_code == 200
        expected = text_of(expected_output("a", 60, seed=1))
        assert whole.result().json()["choices"][0]["text"] == expected
        pieces = [chunk["choices"][0]["text"] for chunk in events(stream.result().text)]
        assert "".join(pieces) == expected
        code, log = process.wait()
    assert code == 0, log
    lines = [json.loads(line) for line in log.splitlines()]
    assert lines[0]["event"] == f"ready on {process.url}"
    assert [line["event"] for line in lines].count("request") == 3
    assert any(line["event"] == "draining" for line in lines)
    assert not any(line["event"] == "drain_timeout" for line in lines)


@pytest.mark.parametrize("engine", ["held", "stuck"])
def test_drain_timeout_ends_streams_with_an_error_event(engine: str) -> None:
    with (
        serving("0.5", engine, "console") as process,
        posting(process, LONG, LONG | {"stream": True}) as (whole, stream),
    ):
        started_s = time.monotonic()
        process.signal(signal.SIGTERM)
        code, log = process.wait()
        assert 0.5 <= time.monotonic() - started_s < 5
        assert code == 0, log
        assert whole.result().status_code == 503
        assert whole.result().json()["error"]["code"] == "shutting_down"
        (chunk,) = events(stream.result().text)
        assert chunk["error"]["code"] == "shutting_down"
        assert "drain_timeout" in log


@pytest.mark.parametrize(
    ("first", "second", "expected"),
    [
        (signal.SIGINT, signal.SIGINT, 130),
        (signal.SIGTERM, signal.SIGTERM, 143),
        (signal.SIGTERM, signal.SIGINT, 130),
    ],
)
def test_a_second_signal_does_not_wait(
    first: signal.Signals, second: signal.Signals, expected: int
) -> None:
    with (
        serving("600", "stuck", "console") as process,
        posting(process, LONG | {"stream": True}),
    ):
        process.signal(first)
        process.wait_for("draining")
        process.signal(second)
        code, log = process.wait()  # within a fraction of the ten minutes
    assert code == expected, log
    assert "Traceback" not in log


def test_thirty_two_answers_end_and_nothing_is_left() -> None:
    """Half of them as streams; they only begin when the server is being stopped."""
    bodies = [LONG | {"seed": i, "stream": i % 2 == 1, "max_tokens": 8} for i in range(32)]
    with serving("30", "held", "json") as process, posting(process, *bodies) as answers:
        process.signal(signal.SIGTERM)
        process.wait_for("draining")
        process.signal(signal.SIGUSR2)
        for i, answer in enumerate(answers):
            assert answer.result().status_code == 200
            assert text_in(answer.result()) == text_of(expected_output("a", 8, seed=i))
        code, log = process.wait()
    assert code == 0, log
    assert '"drain_timeout"' not in log


def test_thirty_two_answers_that_do_not_end_are_told() -> None:
    bodies = [LONG | {"stream": i % 2 == 1} for i in range(32)]
    with serving("0.2", "stuck", "console") as process, posting(process, *bodies) as answers:
        process.signal(signal.SIGTERM)
        for i, answer in enumerate(answers):
            found = answer.result()
            error = events(found.text)[-1]["error"] if i % 2 else found.json()["error"]
            assert error["code"] == "shutting_down"
        code, log = process.wait()
    assert code == 0, log


def test_a_dead_engine_ends_the_process_after_all_have_heard() -> None:
    with (
        serving("30", "held", "console") as process,
        posting(process, LONG, LONG | {"stream": True}) as (whole, stream),
    ):
        process.signal(signal.SIGUSR1)
        assert whole.result().status_code == 500
        assert whole.result().json()["error"]["code"] == "internal_error"
        *_, last = events(stream.result().text)
        assert last["error"]["code"] == "internal_error"
        code, log = process.wait()
    assert code == 1, log
    assert "the bus fell asleep" in log


def test_a_thread_that_never_ends_does_not_keep_the_process() -> None:
    """A prompt that takes an hour to tokenise, on a thread that Python waits for at its end."""
    with serving("0.1", "slow-tokenizer", "console") as process:
        with pytest.raises(httpx.ReadTimeout):
            httpx.post(process.url + PATH, json=LONG, timeout=1)
        process.signal(signal.SIGTERM)
        code, log = process.wait()
    assert code == 0, log


def text_in(answer: httpx.Response) -> str:
    if answer.headers["content-type"] == "application/json":
        return str(answer.json()["choices"][0]["text"])
    return "".join(chunk["choices"][0]["text"] for chunk in events(answer.text))


def test_idle_server_stops_at_once_though_connections_are_open() -> None:
    with serving("60", "open", "console") as process, httpx.Client() as client:
        assert client.get(process.url + "/live").status_code == 200
        started_s = time.monotonic()
        process.signal(signal.SIGINT)
        code, log = process.wait()
        assert time.monotonic() - started_s < 3
    assert code == 0, log
    assert f"ready on {process.url}" in log


def test_taken_port_is_a_users_error() -> None:
    with socket.create_server(("127.0.0.1", 0)) as taken:
        port = taken.getsockname()[1]
        with pytest.raises(UserError, match=rf"port {port} on 127\.0\.0\.1 is taken; choose"):
            bind("127.0.0.1", port)


def test_bind_does_not_listen_yet() -> None:
    with bind("localhost", 0) as listener:
        address = listener.getsockname()
        with pytest.raises(ConnectionRefusedError):
            socket.create_connection(address[:2], timeout=1)


def test_unknown_host_and_foreign_address() -> None:
    with pytest.raises(UserError, match="is not known"):
        bind("no such host", 0)
    with pytest.raises(UserError, match=r"cannot listen on 192\.0\.2\.1"):
        bind("192.0.2.1", 0)
