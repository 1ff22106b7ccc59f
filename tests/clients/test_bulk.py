from __future__ import annotations

import asyncio
import json

import httpx
import pytest
from fake_api import FakeServer

from clients.answers import Completion
from clients.async_client import AsyncClient
from clients.bulk import gather_calls, run_bulk
from clients.protocol import ApiError, ClientError, RetryPolicy, completion_call


class SlowServer:
    """Answers later requests sooner, and refuses the prompt "bad"."""

    def __init__(self) -> None:
        self.echo = FakeServer()
        self.open = self.most_open = 0

    async def __call__(self, request: httpx.Request) -> httpx.Response:
        if request.url.path == "/v1/models":
            return self.echo(request)
        prompt = json.loads(request.content)["prompt"]
        self.open += 1
        self.most_open = max(self.most_open, self.open)
        await asyncio.sleep(0.001 * (10 - len(prompt)))
        self.open -= 1
        if prompt == "bad":
            return httpx.Response(400, json={"error": {"message": "bad prompt"}})
        return self.echo(request)


async def test_order_is_kept_concurrency_bounded_and_no_call_lost() -> None:
    server = SlowServer()
    prompts = ["a", "bad", "abc", "abcd", "abcdefg", "xy", "bad", "z"]
    seen: list[object] = []
    async with AsyncClient("http://test", transport=httpx.MockTransport(server)) as client:
        outcomes = await gather_calls(
            client, [completion_call(p) for p in prompts], concurrency=3, on_done=seen.append
        )
    texts = [o.text if isinstance(o, Completion) else None for o in outcomes]
    assert texts == [None if p == "bad" else p[::-1] for p in prompts]
    assert all(isinstance(outcomes[i], ApiError) for i in (1, 6))
    assert server.most_open == 3
    assert len(seen) == len(prompts)
    model_questions = [r for r in server.echo.requests if r.method == "GET"]
    assert len(model_questions) == 1


async def test_concurrency_must_be_positive() -> None:
    async with AsyncClient("http://test") as client:
        with pytest.raises(ValueError, match="at least 1"):
            await gather_calls(client, [], concurrency=0)


def test_run_bulk_shows_progress(
    fake_server: FakeServer, capsys: pytest.CaptureFixture[str]
) -> None:
    fake_server.refusals = [httpx.Response(503)]
    calls = [completion_call(p) for p in ("abc", "de", "f")]
    outcomes = run_bulk(
        calls,
        "http://test",
        concurrency=1,
        transport=fake_server.transport,
        retry=RetryPolicy(max_attempts=1),
    )
    assert isinstance(outcomes[0], ClientError)
    assert [o.text for o in outcomes[1:] if isinstance(o, Completion)] == ["ed", "f"]
    shown = capsys.readouterr().out
    assert "3/3" in shown
    assert "3 tokens, 1 failed" in " ".join(shown.split())


def test_run_bulk_may_be_silent(
    fake_server: FakeServer, capsys: pytest.CaptureFixture[str]
) -> None:
    assert run_bulk([], "http://test", progress=False, transport=fake_server.transport) == []
    assert capsys.readouterr().out == ""
