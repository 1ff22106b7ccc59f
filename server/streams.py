"""Server-sent events, and the race of an answer against a client that goes away."""

from __future__ import annotations

import asyncio
import time
from collections.abc import AsyncGenerator, Callable, Coroutine, Mapping
from contextlib import aclosing, suppress
from typing import Any, TypeVar

import orjson
from starlette.responses import Response
from starlette.types import Receive, Scope, Send

from server.errors import ClientGoneError

T = TypeVar("T")

PING = b": ping\n\n"
DONE = b"data: [DONE]\n\n"


def event(data: dict[str, Any]) -> bytes:
    return b"data: " + orjson.dumps(data) + b"\n\n"


async def unless_gone(receive: Receive, work: Coroutine[Any, Any, T]) -> T:
    """The result of `work`; ClientGoneError, and `work` cancelled, once the client is gone."""
    working = asyncio.create_task(work)
    leaving = asyncio.create_task(_gone(receive))
    try:
        await asyncio.wait({working, leaving}, return_when=asyncio.FIRST_COMPLETED)
        if not working.done():
            raise ClientGoneError
        return working.result()
    finally:
        working.cancel()
        leaving.cancel()
        await asyncio.gather(working, leaving, return_exceptions=True)


async def _gone(receive: Receive) -> None:
    while (await receive())["type"] != "http.disconnect":
        pass


class EventStream(Response):
    """Sends events as they come and a comment whenever `ping_s` passed without one.

    `send` is awaited before the next event is asked for: a reader that stops reading stops this
    stream and nothing else. `on_close` runs once, however the stream ends.
    """

    media_type = "text/event-stream"

    def __init__(
        self,
        events: AsyncGenerator[bytes, None],
        ping_s: float,
        on_close: Callable[[], None],
        headers: Mapping[str, str],
    ) -> None:
        unbuffered = {"X-Accel-Buffering": "no", "Cache-Control": "no-cache"}
        super().__init__(headers={**unbuffered, **headers})
        del self.headers["content-length"]
        self._events = events
        self._ping_s = ping_s
        self._on_close = on_close
        self._sent_s = 0.0  # time.monotonic() of the latest event or ping

    async def __call__(self, _: Scope, receive: Receive, send: Send) -> None:
        try:
            with suppress(ClientGoneError):
                await unless_gone(receive, self._stream(send))
        finally:
            self._on_close()

    async def _stream(self, send: Send) -> None:
        start = {"type": "http.response.start", "status": 200, "headers": self.raw_headers}
        await send(start)
        self._sent_s = time.monotonic()
        pinging = asyncio.create_task(self._ping(send))
        try:
            async with aclosing(self._events) as events:
                async for chunk in events:
                    await self._send(send, chunk)
        finally:
            pinging.cancel()
            await asyncio.gather(pinging, return_exceptions=True)
        await send({"type": "http.response.body", "body": b"", "more_body": False})

    async def _ping(self, send: Send) -> None:
        while True:
            silent_s = time.monotonic() - self._sent_s
            if silent_s >= self._ping_s:
                await self._send(send, PING)
            else:
                await asyncio.sleep(self._ping_s - silent_s)

    async def _send(self, send: Send, body: bytes) -> None:
        await send({"type": "http.response.body", "body": body, "more_body": True})
        self._sent_s = time.monotonic()
