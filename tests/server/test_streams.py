"""Silence, disconnects and slow readers, in process and over real sockets."""

from __future__ import annotations

import asyncio
import json
import select
import socket
import threading
import time
from collections.abc import AsyncGenerator, Callable
from typing import Any

import httpx
import pytest

from server.errors import ClientGoneError
from server.streams import PING, EventStream, unless_gone
from tests.server.conftest import LiveServer, MakeClient
from tests.server.fake_engine import FakeEngine, expected_output
from tests.server.test_completions import events, text_of

PATH = "/v1/completions"


def wait_for(condition: Callable[[], object], timeout_s: float = 5.0) -> bool:
    deadline_s = time.monotonic() + timeout_s
    while not condition() and time.monotonic() < deadline_s:
        time.sleep(0.005)
    return bool(condition())


async def test_pings_before_the_first_token(make_client: MakeClient, engine: FakeEngine) -> None:
    client = make_client(ping_s=0.05)
    engine.gate.clear()
    asyncio.get_running_loop().call_later(0.4, engine.gate.set)
    body = {"prompt": "a", "max_tokens": 3, "stream": True}
    text = (await client.post(PATH, json=body)).text
    before, _, _ = text.partition("data: ")
    assert 3 <= before.count(": ping\n\n") <= 9
    assert before.replace(": ping\n\n", "") == ""
    pieces = [chunk["choices"][0]["text"] for chunk in events(text)]
    assert "".join(pieces) == text_of(expected_output("a", 3))


async def test_pings_while_text_is_held_back(make_client: MakeClient, engine: FakeEngine) -> None:
    client = make_client(ping_s=0.05)
    engine.step_s, engine.holds_text = 0.04, True  # news come faster than pings, events do not
    body = {"prompt": "a", "max_tokens": 10, "stream": True}
    text = (await client.post(PATH, json=body)).text
    assert text.count(": ping\n\n") >= 4
    assert len(events(text)) == 1


async def test_no_pings_while_data_flows(make_client: MakeClient, engine: FakeEngine) -> None:
    client = make_client(ping_s=0.5)
    engine.step_s = 0.02
    body = {"prompt": "a", "max_tokens": 30, "stream": True}
    assert ": ping" not in (await client.post(PATH, json=body)).text


async def never() -> dict[str, Any]:
    await asyncio.Event().wait()
    raise AssertionError


async def test_stream_waits_for_its_reader() -> None:
    produced, may_send = [], asyncio.Semaphore(3)

    async def numbers() -> AsyncGenerator[bytes, None]:
        for i in range(100):
            produced.append(i)
            yield b"data: x\n\n"

    async def send(_: Any) -> None:
        await may_send.acquire()

    closed: list[bool] = []
    stream = EventStream(numbers(), 15, lambda: closed.append(True), {})
    task = asyncio.create_task(stream({}, never, send))
    await asyncio.sleep(0.05)
    assert len(produced) == 3  # the start and two events went out, the third one waits
    task.cancel()
    with pytest.raises(asyncio.CancelledError):
        await task
    assert closed == [True]


async def test_stream_ends_when_the_client_goes_even_in_silence() -> None:
    ended: list[str] = []

    async def silence() -> AsyncGenerator[bytes, None]:
        try:
            await asyncio.Event().wait()
            yield b""
        finally:
            ended.append("events")

    pinged = asyncio.Event()

    async def send(message: Any) -> None:
        if message.get("body") == PING:
            pinged.set()

    async def receive() -> dict[str, Any]:
        await pinged.wait()
        return {"type": "http.disconnect"}

    await EventStream(silence(), 0.01, lambda: ended.append("job"), {})({}, receive, send)
    assert ended == ["events", "job"]


async def test_unless_gone() -> None:
    async def gone() -> dict[str, Any]:
        return {"type": "http.disconnect"}

    async def failing() -> None:
        raise ZeroDivisionError

    assert await unless_gone(never, asyncio.sleep(0.01, "done")) == "done"
    with pytest.raises(ZeroDivisionError):
        await unless_gone(never, failing())
    with pytest.raises(ClientGoneError):
        await unless_gone(gone, asyncio.sleep(60))


def send_request(live: LiveServer, body: dict[str, Any], path: str = PATH) -> socket.socket:
    payload = json.dumps(body).encode()
    head = f"POST {path} HTTP/1.1\r\nHost: localhost\r\nContent-Length: {len(payload)}\r\n\r\n"
    connection = socket.create_connection(("127.0.0.1", live.port), timeout=10)
    connection.sendall(head.encode() + payload)
    return connection


@pytest.mark.parametrize("stream", [True, False])
@pytest.mark.parametrize("queued", [True, False])
@pytest.mark.parametrize("path", ["/v1/completions", "/v1/chat/completions"])
def test_disconnect_aborts_every_choice(
    live: LiveServer, engine: FakeEngine, stream: bool, queued: bool, path: str
) -> None:
    engine.step_s = 0.01
    if queued:
        engine.gate.clear()
    shape = {"prompt": "a", "messages": [{"role": "user", "content": "a"}]}
    body = shape | {"n": 3, "max_tokens": 3000, "stream": stream}
    with send_request(live, body, path):
        assert wait_for(lambda: len(engine.active) == 3)
        assert queued or wait_for(lambda: engine.n_steps > 2)
    assert engine.wait_idle()
    assert set(engine.aborted) == {request.request_id for request in engine.submitted}
    assert wait_for(lambda: not live.app.state.context.jobs)
    engine.gate.set()
    assert httpx.post(live.url + PATH, json={"prompt": "a"}).status_code == 200


def test_a_finished_request_is_not_aborted(live: LiveServer, engine: FakeEngine) -> None:
    for stream in (True, False):
        body = {"prompt": "a", "max_tokens": 3, "stream": stream}
        assert httpx.post(live.url + PATH, json=body).status_code == 200
    assert engine.aborted == []


def test_reader_that_never_reads_holds_up_nobody(live: LiveServer, engine: FakeEngine) -> None:
    body = {"prompt": "a" * 10, "n": 16, "max_tokens": 2000, "stream": True}
    with send_request(live, body) as connection:
        connection.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, 4096)
        assert wait_for(lambda: engine.submitted)
        answer = httpx.post(live.url + PATH, json={"prompt": "b", "max_tokens": 5}, timeout=20)
        assert answer.status_code == 200
    assert wait_for(lambda: not live.app.state.context.jobs)
    assert engine.wait_idle()


def test_live_answers_while_a_long_prompt_is_tokenised(
    live: LiveServer, engine: FakeEngine, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The tokenizer does not return before others have been answered."""
    entered, may_return = threading.Event(), threading.Event()
    encode = engine.tokenizer.encode

    def held(text: str, add_special_tokens: bool = True) -> list[int]:
        entered.set()
        assert may_return.wait(20)
        return encode(text, add_special_tokens)

    monkeypatch.setattr(engine.tokenizer, "encode", held)
    with send_request(live, {"prompt": "a" * 2**20}) as connection:
        assert entered.wait(10)
        for path in ("/live", "/ready", "/v1/models", "/metrics"):
            assert httpx.get(live.url + path).status_code == 200
        may_return.set()
        assert connection.recv(65536).startswith(b"HTTP/1.1 400")  # longer than the context
    assert engine.submitted == []


def raw_answer(live: LiveServer, sent: bytes) -> bytes:
    answer = b""
    with socket.create_connection(("127.0.0.1", live.port), timeout=5) as connection:
        connection.sendall(sent)
        while data := connection.recv(65536):
            answer += data
    return answer


def test_endless_head_is_cut_off(live: LiveServer) -> None:
    with socket.create_connection(("127.0.0.1", live.port), timeout=5) as connection:
        connection.sendall(b"GET /live HTTP/1.1\r\nHost: localhost\r\nX-Long: ")
        for _ in range(100):
            connection.sendall(b"a" * 5000)
            if select.select([connection], [], [], 0.01)[0]:
                break
        head, _, body = connection.recv(65536).partition(b"\r\n\r\n")
    assert head.startswith(b"HTTP/1.1 431")
    assert b"x-request-id: " in head
    assert "65,536 bytes" in json.loads(body)["error"]["message"]


@pytest.mark.parametrize(
    "garbage", [b"\x16\x03\x01\x02\x00\r\n\r\n", b"GET\r\n\r\n", b"{}\r\n\r\n"]
)
def test_what_is_not_http_gets_a_400(live: LiveServer, garbage: bytes) -> None:
    head, _, body = raw_answer(live, garbage).partition(b"\r\n\r\n")
    assert head.startswith(b"HTTP/1.1 400")
    assert json.loads(body)["error"]["type"] == "invalid_request_error"


def test_long_bodies_and_keep_alive_are_not_taken_for_heads(live: LiveServer) -> None:
    with httpx.Client(base_url=live.url) as client:
        for _ in range(3):
            body = {"prompt": "a", "max_tokens": 1, "padding": "x" * 300_000}
            assert client.post(PATH, json=body).status_code == 200
            assert client.get("/live").status_code == 200


def test_chunked_body_over_the_limit(start_live: Any) -> None:
    with start_live(max_body_bytes=1000) as live:

        def pieces() -> Any:
            for _ in range(20):
                yield b" " * 100

        assert httpx.post(live.url + PATH, content=pieces()).status_code == 413


@pytest.mark.parametrize("stream", [False, True])
async def test_an_answer_says_how_many_requests_waited_before_it(
    make_client: MakeClient, engine: FakeEngine, stream: bool
) -> None:
    waiting = engine.snapshot().n_waiting_requests
    body = {"prompt": "a", "max_tokens": 1, "stream": stream}
    answer = await make_client().post(PATH, json=body)
    assert answer.headers["x-queue-position"] == str(waiting)
