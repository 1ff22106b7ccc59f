"""What a connection may cost: heads, trailers, slow senders, readers that never read."""

from __future__ import annotations

import json
import socket
import time
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager, suppress

import httpx
import pytest

from server import protocol
from tests.server.conftest import LiveServer
from tests.server.fake_engine import FakeEngine
from tests.server.test_streams import PATH, send_request, wait_for

HOST = b"Host: localhost\r\n"


@contextmanager
def connected(live: LiveServer) -> Iterator[socket.socket]:
    with socket.create_connection(("127.0.0.1", live.port), timeout=10) as connection:
        yield connection


def send_on(connection: socket.socket, data: bytes) -> None:
    """The server may have answered and closed before it has everything."""
    with suppress(OSError):
        connection.sendall(data)


def rest_of(connection: socket.socket) -> bytes:
    """All that the server says until it closes."""
    said = b""
    try:
        while data := connection.recv(65536):
            said += data
    except ConnectionResetError:  # it closed with bytes of ours unread
        pass
    return said


def assert_refused(said: bytes, status: int, word: str) -> None:
    head, _, body = said.partition(b"\r\n\r\n")
    assert head.startswith(b"HTTP/1.1 %d " % status), said[:200]
    assert b"x-request-id: " in head and b"connection: close" in head
    error = json.loads(body)["error"]
    assert error.keys() == {"message", "type", "param", "code"}
    assert word in error["message"]


@pytest.mark.parametrize(
    ("lines", "word"),
    [
        ([b"X-%d: 1" % i for i in range(128)], "128 headers"),
        ([b"X-Long: " + b"a" * 66_000], "65,536 bytes"),
        ([b"X-%d: " % i + b"a" * 6600 for i in range(10)], "65,536 bytes"),
        ([b"a" * 66_000 + b": 1"], "65,536 bytes"),
    ],
    ids=["many", "a long value", "long together", "a long name"],
)
def test_large_heads_in_one_piece(live: LiveServer, lines: list[bytes], word: str) -> None:
    with connected(live) as connection:
        head = b"GET /live HTTP/1.1\r\n" + HOST + b"\r\n".join(lines) + b"\r\n\r\n"
        send_on(connection, head)
        assert_refused(rest_of(connection), 431, word)


def test_heads_within_the_limits(live: LiveServer) -> None:
    headers = {f"x-{i}": "a" * 400 for i in range(100)}
    assert httpx.get(live.url + "/live", headers=headers).status_code == 200
    assert httpx.get(live.url + "/live?" + "a" * 60_000).status_code == 200


def test_a_long_target(live: LiveServer) -> None:
    with connected(live) as connection:
        send_on(connection, b"GET /" + b"a" * 66_000 + b" HTTP/1.1\r\n" + HOST + b"\r\n")
        assert_refused(rest_of(connection), 431, "65,536 bytes")


@pytest.mark.parametrize("many", [True, False])
def test_endless_trailers(live: LiveServer, many: bool) -> None:
    """Headers after a chunked body, which a parser keeps until their end comes."""
    body = json.dumps({"prompt": "a", "max_tokens": 1}).encode()
    with connected(live) as connection:
        head = b"POST " + PATH.encode() + b" HTTP/1.1\r\n" + HOST
        connection.sendall(head + b"Transfer-Encoding: chunked\r\n\r\n")
        connection.sendall(b"%x\r\n" % len(body) + body + b"\r\n0\r\n")
        trailers = b"X: 1\r\n" * 20_000 if many else b"X: " + b"a" * 300_000
        send_on(connection, trailers)
        assert_refused(rest_of(connection), 431, "headers")


@pytest.fixture
def hasty(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("HEAD_TIMEOUT_S", "BODY_TIMEOUT_S", "SEND_TIMEOUT_S"):
        monkeypatch.setattr(protocol, name, 0.3)


SLOW_BODY = b"POST " + PATH.encode() + b" HTTP/1.1\r\n" + HOST + b"Content-Length: 500\r\n\r\n{"


@pytest.mark.usefixtures("hasty")
@pytest.mark.parametrize(
    "sent", [b"G", b"GET /live HTTP/1.1\r\nHost: ", SLOW_BODY, b"\r\n"], ids=range(4)
)
@pytest.mark.parametrize("after_another", [False, True])
def test_slow_senders_are_cut_off(live: LiveServer, sent: bytes, after_another: bool) -> None:
    """One byte at a time does not help: it is the whole that has to come."""
    with connected(live) as connection:
        if after_another:
            connection.sendall(b"GET /live HTTP/1.1\r\n" + HOST + b"\r\n")
            answer = b""  # the body may come by itself
            while not answer.endswith(b"}"):
                data = connection.recv(65536)
                assert data, "closed too early"
                answer += data
            assert answer.startswith(b"HTTP/1.1 200")
        for byte in sent:
            send_on(connection, bytes([byte]))
        said = rest_of(connection)  # returns as the server closes
    assert_refused(said, 408, "in time")
    assert wait_for(lambda: not live.server.server_state.connections)


@pytest.mark.usefixtures("hasty")
def test_a_silent_connection_is_closed_without_a_word(live: LiveServer) -> None:
    with connected(live) as connection:
        assert rest_of(connection) == b""


def test_a_body_that_keeps_coming_has_time(
    live: LiveServer, monkeypatch: pytest.MonkeyPatch
) -> None:
    """As many bytes as are asked for within each period, over several periods."""
    monkeypatch.setattr(protocol, "BODY_TIMEOUT_S", 0.2)
    monkeypatch.setattr(protocol, "MIN_BODY_BYTES", 10)
    body = json.dumps({"prompt": "a", "max_tokens": 1, "padding": "x" * 2000}).encode()
    with connected(live) as connection:
        head = b"POST " + PATH.encode() + b" HTTP/1.1\r\n" + HOST
        connection.sendall(head + b"Content-Length: %d\r\n\r\n" % len(body))
        for start in range(0, len(body), 50):
            connection.sendall(body[start : start + 50])
            time.sleep(0.02)
        assert connection.recv(65536).startswith(b"HTTP/1.1 200")


@pytest.mark.usefixtures("hasty")
def test_a_reader_that_never_reads_is_given_up(live: LiveServer, engine: FakeEngine) -> None:
    """What is sent to it fills the buffers of both systems, then the stream waits, then ends."""
    live.listener.setsockopt(socket.SOL_SOCKET, socket.SO_SNDBUF, 8192)
    body = {"prompt": "a" * 1000, "n": 64, "max_tokens": 3000, "stream": True, "echo": True}
    with send_request(live, body) as connection:
        assert wait_for(lambda: engine.submitted)
        assert wait_for(lambda: engine.aborted, timeout_s=30)
        assert wait_for(lambda: not live.server.server_state.connections)
        assert connection.fileno() >= 0  # it was the server that left
    assert engine.wait_idle(10)
    assert not live.app.state.context.jobs


def test_many_idle_connections_hold_up_nobody(live: LiveServer) -> None:
    with ExitStack() as stack:
        for _ in range(200):
            stack.enter_context(connected(live))
        answer = httpx.post(live.url + PATH, json={"prompt": "a", "max_tokens": 2}, timeout=10)
        assert answer.status_code == 200
    assert wait_for(lambda: not live.server.server_state.connections)
