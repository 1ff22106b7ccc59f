"""What both clients send, how long they wait and how they fail; no input or output here.

A `Call` is one request for one answer; `clients.answers` reads what comes back.

    ClientError
    ├── UnreachableError     no connection, or it broke before the answer was complete
    └── ApiError             the server refused or failed; carries the status and its reason
"""

from __future__ import annotations

import os
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from typing import Any

import httpx

DEFAULT_URL = "http://127.0.0.1:8000"
ENV_URL = "SL_SERVE_URL"
ENV_API_KEY = "SL_SERVE_API_KEY"

Prompt = str | Sequence[int]
Message = Mapping[str, str]  # {"role": "user", "content": "..."}


class ClientError(Exception):
    """Root of the tree."""


class UnreachableError(ClientError):
    """No connection to the server, or it broke before the answer was complete."""


class ApiError(ClientError):
    """The server's own error. `status` is 0 for one that came in the middle of a stream."""

    def __init__(self, status: int, message: str, kind: str = "", param: str | None = None) -> None:
        super().__init__(f"{message} (HTTP {status})" if status else message)
        self.status = status
        self.message = message
        self.kind = kind
        self.param = param


@dataclass(frozen=True, slots=True)
class Call:
    """One request for one answer; `body` lacks the model until the client fills it in."""

    path: str
    body: Mapping[str, Any]

    def for_model(self, model: str) -> Call:
        return replace(self, body={"model": model, **self.body})

    def streamed(self) -> Call:
        flags = {"stream": True, "stream_options": {"include_usage": True}}
        return replace(self, body={**self.body, **flags})


def completion_call(prompt: Prompt, **options: Any) -> Call:
    """A continuation of a text or of token ids. `options` are fields of the API: max_tokens,
    temperature, stop, ignore_eos, ...; those that are None are left out."""
    return _call("/v1/completions", {"prompt": prompt}, options)


def chat_call(messages: Sequence[Message], **options: Any) -> Call:
    """The assistant's next message; `options` as for `completion_call`."""
    return _call("/v1/chat/completions", {"messages": [dict(m) for m in messages]}, options)


def _call(path: str, body: dict[str, Any], options: Mapping[str, Any]) -> Call:
    if options.get("n", 1) not in (None, 1):
        raise ValueError(f"n={options['n']}: a call gives one answer; send the call n times")
    return Call(path, body | {k: v for k, v in options.items() if v is not None})


@dataclass(frozen=True, slots=True)
class RetryPolicy:
    """Refusals that say "later" (429, 503) are tried again, `max_attempts` times in all.

    The server's Retry-After, in seconds, decides the pause; without it the pause doubles from
    `first_delay_s`. A pause above `max_delay_s` is not waited for: the error is raised at once.
    """

    max_attempts: int = 5
    first_delay_s: float = 0.5
    max_delay_s: float = 120.0

    def delay_s(self, attempt: int, response: httpx.Response) -> float | None:
        """Seconds to wait after the failed attempt number `attempt` (from 1); None: give up."""
        if response.status_code not in (429, 503) or attempt >= self.max_attempts:
            return None
        asked = response.headers.get("retry-after", "")
        delay = float(asked) if asked.isdecimal() else self.first_delay_s * 2 ** (attempt - 1)
        return delay if delay <= self.max_delay_s else None


@dataclass(frozen=True, slots=True)
class Settings:
    """Where the server is and how long to wait. Steps may last seconds and answers hours, so a
    stream has no read limit, and a whole answer a generous one."""

    url: str | None = None  # None: SL_SERVE_URL, or else the server's default address
    api_key: str | None = field(default=None, repr=False)  # None: SL_SERVE_API_KEY, or else none
    model: str | None = None  # None: the first model the server lists
    answer_timeout_s: float | None = 3600.0
    connect_timeout_s: float = 10.0
    retry: RetryPolicy = field(default_factory=RetryPolicy)

    def http_options(self) -> dict[str, Any]:
        """Keyword arguments for both of httpx's clients."""
        url = self.url or os.environ.get(ENV_URL) or DEFAULT_URL
        api_key = self.api_key or os.environ.get(ENV_API_KEY)
        return {
            "base_url": url.rstrip("/").removesuffix("/v1"),
            "headers": {"authorization": f"Bearer {api_key}"} if api_key else {},
            "timeout": self.timeout(self.answer_timeout_s),
            # Idle connections are dropped before usual servers drop them, so that no request is
            # written into a connection that is being closed.
            "limits": httpx.Limits(max_connections=None, keepalive_expiry=2.0),
        }

    def timeout(self, read_s: float | None) -> httpx.Timeout:
        return httpx.Timeout(connect=self.connect_timeout_s, read=read_s, write=60.0, pool=None)


@contextmanager
def connection_errors() -> Iterator[None]:
    """Turns httpx's failures of the connection into ours."""
    try:
        yield
    except (httpx.TransportError, httpx.InvalidURL) as error:
        reason = str(error) or type(error).__name__
        raise UnreachableError(f"no answer from the server: {reason}") from error
