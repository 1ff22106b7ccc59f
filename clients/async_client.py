"""The asynchronous twin of `clients.client`: the same names, awaited.

async with AsyncClient("http://127.0.0.1:8000") as client:
    answer = await client.complete("Once upon a time", max_tokens=20)
    async with client.stream(chat_call([{"role": "user", "content": "Hello"}])) as stream:
        async for piece in stream:
            print(piece, end="", flush=True)
"""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Sequence
from contextlib import asynccontextmanager
from types import TracebackType
from typing import Any, Self

import httpx

from clients.answers import (
    Completion,
    StreamReader,
    first_model,
    parse_completion,
    parse_error,
    parse_models,
)
from clients.protocol import (
    Call,
    Message,
    Prompt,
    Settings,
    chat_call,
    completion_call,
    connection_errors,
)


class AsyncTextStream:
    """Pieces of text as they come; `completion` is the whole answer, once they have all come."""

    def __init__(self, response: httpx.Response) -> None:
        self._response = response
        self._reader = StreamReader()

    async def __aiter__(self) -> AsyncIterator[str]:
        with connection_errors():
            async for chunk in self._response.aiter_bytes():
                for piece in self._reader.feed(chunk):
                    yield piece
        self._reader.result()

    @property
    def completion(self) -> Completion:
        """Raises UnreachableError while the answer is not complete."""
        return self._reader.result()


class AsyncClient:
    """Arguments and errors are those of `Client`."""

    def __init__(
        self,
        url: str | None = None,
        *,
        transport: httpx.AsyncBaseTransport | None = None,
        **settings: Any,
    ) -> None:
        self.settings = Settings(url, **settings)
        self._http = httpx.AsyncClient(transport=transport, **self.settings.http_options())
        self._model = self.settings.model

    async def complete(self, prompt: Prompt, **options: Any) -> Completion:
        return await self.send(completion_call(prompt, **options))

    async def chat(self, messages: Sequence[Message], **options: Any) -> Completion:
        return await self.send(chat_call(messages, **options))

    async def send(self, call: Call) -> Completion:
        """The whole answer to `call`, at its end."""
        call = call.for_model(await self.model())
        response = await self._request("POST", call.path, json=call.body)
        with connection_errors():
            await response.aread()
        return parse_completion(response)

    @asynccontextmanager
    async def stream(self, call: Call) -> AsyncIterator[AsyncTextStream]:
        """The answer as it is written. Leaving the block early makes the server stop."""
        call = call.for_model(await self.model()).streamed()
        timeout = self.settings.timeout(read_s=None)
        response = await self._request("POST", call.path, json=call.body, timeout=timeout)
        try:
            yield AsyncTextStream(response)
        finally:
            await response.aclose()

    async def models(self) -> list[str]:
        response = await self._request("GET", "/v1/models")
        with connection_errors():
            await response.aread()
        return parse_models(response)

    async def model(self) -> str:
        """The model calls go to: the one given, or else the first the server lists."""
        if self._model is None:
            self._model = first_model(await self.models())
        return self._model

    async def aclose(self) -> None:
        await self._http.aclose()

    async def __aenter__(self) -> Self:
        return self

    async def __aexit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        traceback: TracebackType | None,
    ) -> None:
        await self.aclose()

    async def _request(self, method: str, path: str, **options: Any) -> httpx.Response:
        """A response with a good status, its body still to be read."""
        attempt = 0
        while True:
            attempt += 1
            with connection_errors():
                request = self._http.build_request(method, path, **options)
                response = await self._http.send(request, stream=True)
                if response.is_success:
                    return response
                await response.aread()
            delay_s = self.settings.retry.delay_s(attempt, response)
            if delay_s is None:
                raise parse_error(response)
            await asyncio.sleep(delay_s)
