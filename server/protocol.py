"""Uvicorn's HTTP parser with ceilings on what a connection costs, in bytes and in time."""

from __future__ import annotations

import asyncio
import uuid
from typing import Any

import orjson
from uvicorn.protocols.http.httptools_impl import STATUS_LINE, HttpToolsProtocol

from server.errors import ApiError

MAX_HEAD_BYTES = 64 * 2**10  # request line, headers and trailers; also of any one of them
MAX_HEADERS = 128
HEAD_TIMEOUT_S = 60.0  # to send a head, counted from its first byte or from the connection's begin
BODY_TIMEOUT_S = 60.0  # within it a body ends or brings MIN_BODY_BYTES more
MIN_BODY_BYTES = 64 * 2**10
SEND_TIMEOUT_S = 120.0  # without room in the send buffer: nobody reads


class GuardedProtocol(HttpToolsProtocol):
    """Memory per connection is bounded: the parser keeps at most MAX_HEAD_BYTES that the app has
    not seen, bodies are read no faster than the app takes them, and a stream waits for its reader
    (uvicorn's flow control), who is given SEND_TIMEOUT_S."""

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        self._unseen_bytes = 0  # fed to the parser since it last gave something to the app
        self._head_bytes = 0
        self._body_bytes = 0  # since the timer was set
        self._refusal: ApiError | None = None  # what the parser was stopped for
        self._reading: asyncio.TimerHandle | None = None
        self._writing: asyncio.TimerHandle | None = None

    def connection_made(self, transport: asyncio.Transport) -> None:  # type: ignore[override]
        super().connection_made(transport)
        self._expect(HEAD_TIMEOUT_S)

    def connection_lost(self, exc: Exception | None) -> None:
        self._stop_reading_timer()
        self._stop_writing_timer()
        super().connection_lost(exc)

    def data_received(self, data: bytes) -> None:
        self._unseen_bytes += len(data)
        super().data_received(data)
        if self._unseen_bytes > MAX_HEAD_BYTES and not self.transport.is_closing():
            self._refuse(_head_too_large())
        if self._reading is None and self._is_between_requests:
            self._expect(HEAD_TIMEOUT_S)  # blank lines, before which uvicorn's own timer stopped

    def on_message_begin(self) -> None:
        self._head_bytes = 0
        self._expect(HEAD_TIMEOUT_S)
        super().on_message_begin()

    def on_url(self, url: bytes) -> None:
        self._count(len(url))
        super().on_url(url)

    def on_header(self, name: bytes, value: bytes) -> None:
        """Also called for trailers."""
        self._count(len(name) + len(value))
        if len(self.headers) >= MAX_HEADERS:
            self._stop_parser(ApiError(431, f"The request has more than {MAX_HEADERS} headers."))
        super().on_header(name, value)

    def on_headers_complete(self) -> None:
        self._unseen_bytes = 0
        self._body_bytes = 0
        self._expect(BODY_TIMEOUT_S)
        super().on_headers_complete()

    def on_body(self, body: bytes) -> None:
        self._unseen_bytes = 0
        self._body_bytes += len(body)
        super().on_body(body)

    def on_message_complete(self) -> None:
        self._unseen_bytes = 0
        self._stop_reading_timer()
        super().on_message_complete()

    def pause_writing(self) -> None:
        super().pause_writing()
        self._writing = self.loop.call_later(SEND_TIMEOUT_S, self.transport.abort)

    def resume_writing(self) -> None:
        self._stop_writing_timer()
        super().resume_writing()

    def send_400_response(self, msg: str) -> None:
        self._refuse(self._refusal or ApiError(400, msg))

    @property
    def _is_between_requests(self) -> bool:
        return self.cycle is None or self.cycle.response_complete

    def _count(self, n_bytes: int) -> None:
        self._head_bytes += n_bytes
        if self._head_bytes > MAX_HEAD_BYTES:
            self._stop_parser(_head_too_large())

    def _stop_parser(self, refusal: ApiError) -> None:
        """In its callbacks: it reports any error as a request that is no HTTP."""
        self._refusal = refusal
        raise refusal

    def _expect(self, seconds: float) -> None:
        self._stop_reading_timer()
        self._reading = self.loop.call_later(seconds, self._too_slow)

    def _too_slow(self) -> None:
        if self._body_bytes >= MIN_BODY_BYTES or self.flow.read_paused:
            self._body_bytes = 0
            self._expect(BODY_TIMEOUT_S)
        elif self._is_between_requests and self._unseen_bytes == 0:
            self.transport.close()  # nothing was asked: an answer would be taken for the next one's
        elif not self.transport.is_closing():
            self._refuse(ApiError(408, "The request did not arrive in time; send it again."))

    def _stop_reading_timer(self) -> None:
        if self._reading is not None:
            self._reading.cancel()
            self._reading = None

    def _stop_writing_timer(self) -> None:
        if self._writing is not None:
            self._writing.cancel()
            self._writing = None

    def _refuse(self, error: ApiError) -> None:
        """Answers in the app's place, unless it has begun to, and closes."""
        if self._is_between_requests or not self.cycle.response_started:
            self.transport.write(_whole_answer(error))
        self.transport.close()


def _head_too_large() -> ApiError:
    limit = f"{MAX_HEAD_BYTES:,} bytes"
    return ApiError(431, f"Request line and headers are over the limit of {limit}.")


def _whole_answer(error: ApiError) -> bytes:
    body = orjson.dumps(error.body)
    lines = [
        b"content-type: application/json",
        b"content-length: %d" % len(body),
        b"x-request-id: req-" + uuid.uuid4().hex.encode(),
        b"connection: close",
    ]
    return STATUS_LINE[error.status] + b"\r\n".join(lines) + b"\r\n\r\n" + body
