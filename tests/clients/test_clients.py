"""Both clients through the same expectations; `Twin` hides which of the two is being asked."""

from __future__ import annotations

import asyncio
from collections.abc import Callable, Coroutine
from typing import Any

import httpx
import pytest
from fake_api import FakeServer

from clients.answers import Completion
from clients.async_client import AsyncClient
from clients.client import Client
from clients.protocol import (
    ApiError,
    Call,
    RetryPolicy,
    UnreachableError,
    chat_call,
    completion_call,
)


class Twin:
    """Blocking calls to either client."""

    def __init__(self, kind: str, transport: httpx.MockTransport, **settings: Any) -> None:
        self.kind, self.transport, self.settings = kind, transport, settings

    def _sync(self) -> Client:
        return Client("http://test/v1/", transport=self.transport, **self.settings)

    def _async(self, use: Callable[[AsyncClient], Coroutine[Any, Any, Any]]) -> Any:
        async def run() -> Any:
            async with AsyncClient(
                "http://test/v1/", transport=self.transport, **self.settings
            ) as client:
                return await use(client)

        return asyncio.run(run())

    def send(self, call: Call) -> Completion:
        if self.kind == "sync":
            with self._sync() as client:
                return client.send(call)
        return self._async(lambda client: client.send(call))

    def stream(self, call: Call, limit: int | None = None) -> tuple[list[str], Completion | None]:
        """Pieces, at most `limit`, and the whole answer if all were taken."""

        async def use(client: AsyncClient) -> tuple[list[str], Completion | None]:
            pieces: list[str] = []
            async with client.stream(call) as stream:
                async for piece in stream:
                    pieces.append(piece)
                    if len(pieces) == limit:
                        return pieces, None
            return pieces, stream.completion

        if self.kind == "async":
            return self._async(use)
        pieces: list[str] = []
        with self._sync() as client, client.stream(call) as stream:
            for piece in stream:
                pieces.append(piece)
                if len(pieces) == limit:
                    return pieces, None
        return pieces, stream.completion


@pytest.fixture(params=["sync", "async"])
def twin(request: pytest.FixtureRequest, fake_server: FakeServer) -> Callable[..., Twin]:
    return lambda **settings: Twin(request.param, fake_server.transport, **settings)


def test_whole_answers(twin: Callable[..., Twin], fake_server: FakeServer) -> None:
    expected = Completion("cba", "length", 3, 3, "echo-1")
    assert twin().send(completion_call("abc")) == expected
    assert twin().send(chat_call([{"role": "user", "content": "abc"}])) == expected
    assert twin().send(completion_call([7, 8], temperature=0)).text == "8 7"
    assert [str(r.url) for r in fake_server.requests[:2]] == [
        "http://test/v1/models",
        "http://test/v1/completions",
    ]
    assert fake_server.bodies[2] == {"model": "echo-1", "prompt": [7, 8], "temperature": 0}


def test_streams_end_with_the_whole_answer(
    twin: Callable[..., Twin], fake_server: FakeServer
) -> None:
    call = chat_call([{"role": "user", "content": "ab\u2028ç"}])
    pieces, completion = twin().stream(call)
    assert pieces == ["ç", "\u2028", "b", "a"]
    assert completion == Completion("ç\u2028ba", "length", 3, 4, "echo-1")
    assert fake_server.bodies[0]["stream_options"] == {"include_usage": True}


def test_leaving_a_stream_closes_its_connection(
    twin: Callable[..., Twin], fake_server: FakeServer
) -> None:
    pieces, _ = twin().stream(completion_call("abcdef"), limit=2)
    assert pieces == ["f", "e"]
    assert fake_server.streams[0].closed


def test_no_read_timeout_on_streams_only(
    twin: Callable[..., Twin], fake_server: FakeServer
) -> None:
    twin(model="m", answer_timeout_s=77.0).send(completion_call("a"))
    twin(model="m", answer_timeout_s=77.0).stream(completion_call("a"))
    timeouts = [r.extensions["timeout"]["read"] for r in fake_server.requests]
    assert timeouts == [77.0, None]


def test_given_model_and_key_are_sent(twin: Callable[..., Twin], fake_server: FakeServer) -> None:
    twin(model="other", api_key="secret").send(completion_call("a"))
    assert fake_server.bodies == [{"model": "other", "prompt": "a"}]
    assert fake_server.requests[0].headers["authorization"] == "Bearer secret"


def test_refusals_are_retried_as_the_server_asks(
    twin: Callable[..., Twin], fake_server: FakeServer, sleeps: list[float]
) -> None:
    fake_server.refusals = [
        httpx.Response(429, headers={"retry-after": "17"}, json={"error": {"message": "full"}}),
        httpx.Response(503, text="draining"),
        httpx.Response(503, headers={"retry-after": "Fri, 31 Dec 1999 23:59:59 GMT"}),
    ]
    assert twin(model="m").send(completion_call("ab")).text == "ba"
    assert sleeps == [17.0, 1.0, 2.0]


@pytest.mark.parametrize(
    ("status", "headers", "n_attempts"),
    [(400, {}, 1), (500, {}, 1), (429, {}, 3), (503, {"retry-after": "121"}, 1)],
)
def test_retries_are_bounded(
    twin: Callable[..., Twin],
    fake_server: FakeServer,
    sleeps: list[float],
    status: int,
    headers: dict[str, str],
    n_attempts: int,
) -> None:
    body = {"error": {"message": "no", "type": "t", "param": "prompt", "code": None}}
    fake_server.refusals = [httpx.Response(status, headers=headers, json=body) for _ in range(9)]
    with pytest.raises(ApiError) as caught:
        twin(model="m", retry=RetryPolicy(max_attempts=3)).stream(completion_call("ab"))
    error = caught.value
    assert (error.status, error.kind, error.param) == (status, "t", "prompt")
    assert str(error) == f"no (HTTP {status})"
    assert len(fake_server.requests) == n_attempts
    assert len(sleeps) == n_attempts - 1


def test_errors_in_the_middle_of_a_stream(
    twin: Callable[..., Twin], fake_server: FakeServer
) -> None:
    fake_server.stream_error = {"message": "engine died", "type": "server_error"}
    with pytest.raises(ApiError, match="engine died"):
        twin().stream(completion_call("abc"))


def test_a_broken_connection_is_unreachable(
    twin: Callable[..., Twin], fake_server: FakeServer
) -> None:
    fake_server.breaks_after_bytes = 150
    with pytest.raises(UnreachableError, match="peer closed connection"):
        twin().stream(completion_call("abc"))


def test_no_server_is_unreachable(twin: Callable[..., Twin]) -> None:
    def refuse(request: httpx.Request) -> httpx.Response:
        raise httpx.ConnectError("Connection refused")

    client = twin()
    client.transport = httpx.MockTransport(refuse)
    with pytest.raises(UnreachableError, match="Connection refused"):
        client.send(completion_call("abc"))


def test_settings_come_from_the_environment(
    fake_server: FakeServer, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("SL_SERVE_URL", "http://elsewhere:9")
    monkeypatch.setenv("SL_SERVE_API_KEY", "from-env")
    with Client(transport=fake_server.transport) as client:
        assert client.complete("ab").text == "ba"
    assert str(fake_server.requests[-1].url) == "http://elsewhere:9/v1/completions"
    assert fake_server.requests[-1].headers["authorization"] == "Bearer from-env"
    assert "secret" not in repr(Client(api_key="secret").settings)


def test_several_answers_per_call_are_refused() -> None:
    with pytest.raises(ValueError, match="n=2"):
        completion_call("a", n=2)
    assert completion_call("a", n=None, stop=None).body == {"prompt": "a"}
