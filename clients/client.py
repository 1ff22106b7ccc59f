"""A synchronous client of the server's OpenAI-compatible API.

with Client("http://127.0.0.1:8000") as client:
    print(client.complete("Once upon a time", max_tokens=20).text)
    with client.stream(chat_call([{"role": "user", "content": "Hello"}])) as stream:
        for piece in stream:
            print(piece, end="", flush=True)
    print(stream.completion.completion_tokens)
"""

from __future__ import annotations

import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
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


class TextStream:
    """Pieces of text as they come; `completion` is the whole answer, once they have all come."""

    def __init__(self, response: httpx.Response) -> None:
        self._response = response
        self._reader = StreamReader()

    def __iter__(self) -> Iterator[str]:
        with connection_errors():
            for chunk in self._response.iter_bytes():
                yield from self._reader.feed(chunk)
        self._reader.result()

    @property
    def completion(self) -> Completion:
        """Raises UnreachableError while the answer is not complete."""
        return self._reader.result()


class Client:
    """Raises ApiError for what the server refuses, UnreachableError when there is none.

    `settings` are the fields of `Settings`; the URL and the API key default to the environment's
    SL_SERVE_URL and SL_SERVE_API_KEY.
    """

    def __init__(
        self,
        url: str | None = None,
        *,
        transport: httpx.BaseTransport | None = None,
        **settings: Any,
    ) -> None:
        self.settings = Settings(url, **settings)
        self._http = httpx.Client(transport=transport, **self.settings.http_options())
        self._model = self.settings.model

    def complete(self, prompt: Prompt, **options: Any) -> Completion:
        return self.send(completion_call(prompt, **options))

    def chat(self, messages: Sequence[Message], **options: Any) -> Completion:
        return self.send(chat_call(messages, **options))

    def send(self, call: Call) -> Completion:
        """The whole answer to `call`, at its end."""
        call = call.for_model(self.model())
        response = self.request("POST", call.path, json=call.body)
        with connection_errors():
            response.read()
        return parse_completion(response)

    @contextmanager
    def stream(self, call: Call) -> Iterator[TextStream]:
        """The answer as it is written. Leaving the block early makes the server stop."""
        call = call.for_model(self.model()).streamed()
        timeout = self.settings.timeout(read_s=None)
        response = self.request("POST", call.path, json=call.body, timeout=timeout)
        try:
            yield TextStream(response)
        finally:
            response.close()

    def models(self) -> list[str]:
        response = self.request("GET", "/v1/models")
        with connection_errors():
            response.read()
        return parse_models(response)

    def model(self) -> str:
        """The model calls go to: the one given, or else the first the server lists."""
        if self._model is None:
            self._model = first_model(self.models())
        return self._model

    def close(self) -> None:
        self._http.close()

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        traceback: TracebackType | None,
    ) -> None:
        self.close()

    def request(self, method: str, path: str, **options: Any) -> httpx.Response:
        """A response with a good status, its body still to be read and closed."""
        attempt = 0
        while True:
            attempt += 1
            with connection_errors():
                request = self._http.build_request(method, path, **options)
                response = self._http.send(request, stream=True)
                if response.is_success:
                    return response
                response.read()
            delay_s = self.settings.retry.delay_s(attempt, response)
            if delay_s is None:
                raise parse_error(response)
            time.sleep(delay_s)
