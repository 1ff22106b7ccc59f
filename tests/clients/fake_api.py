"""A server that exists only as a function from request to response, the same for both clients."""

from __future__ import annotations

import json
from collections.abc import AsyncIterator, Iterator
from dataclasses import dataclass, field
from typing import Any

import httpx


class Chunks(httpx.SyncByteStream, httpx.AsyncByteStream):
    """A body that arrives in pieces of `size` bytes, then breaks off if `breaks`."""

    def __init__(self, body: bytes, size: int, breaks: bool = False) -> None:
        self.parts = [body[i : i + size] for i in range(0, len(body), size)]
        self.breaks = breaks
        self.closed = False

    def __iter__(self) -> Iterator[bytes]:
        yield from self.parts
        if self.breaks:
            raise httpx.RemoteProtocolError("peer closed connection")

    async def __aiter__(self) -> AsyncIterator[bytes]:
        for part in self:
            yield part

    def close(self) -> None:
        self.closed = True

    async def aclose(self) -> None:
        self.closed = True


@dataclass
class FakeServer:
    """Answers a completion with its prompt reversed, one event per character."""

    requests: list[httpx.Request] = field(default_factory=list)
    refusals: list[httpx.Response] = field(default_factory=list)  # given first, one per request
    chunk_bytes: int = 7
    breaks_after_bytes: int | None = None
    stream_error: dict[str, Any] | None = None
    streams: list[Chunks] = field(default_factory=list)

    def __call__(self, request: httpx.Request) -> httpx.Response:
        self.requests.append(request)
        if request.url.path == "/v1/models":
            return httpx.Response(200, json={"object": "list", "data": [{"id": "echo-1"}]})
        if self.refusals:
            return self.refusals.pop(0)
        body = json.loads(request.content)
        text = self._answer(body)
        if body.get("stream"):
            return httpx.Response(200, stream=self._stream(body, text))
        return httpx.Response(200, json=self._whole(body, text))

    @property
    def bodies(self) -> list[dict[str, Any]]:
        return [json.loads(r.content) for r in self.requests if r.method == "POST"]

    def _answer(self, body: dict[str, Any]) -> str:
        prompt = body["prompt"] if "prompt" in body else body["messages"][-1]["content"]
        text = prompt[::-1] if isinstance(prompt, str) else " ".join(map(str, prompt[::-1]))
        return text[: body.get("max_tokens")]

    def _whole(self, body: dict[str, Any], text: str) -> dict[str, Any]:
        said = (
            {"text": text}
            if "prompt" in body
            else {"message": {"role": "assistant", "content": text}}
        )
        return {
            "model": body["model"],
            "choices": [{"index": 0, "finish_reason": "length", **said}],
            "usage": {"prompt_tokens": 3, "completion_tokens": len(text)},
        }

    def _stream(self, body: dict[str, Any], text: str) -> Chunks:
        events: list[dict[str, Any]] = []
        for piece in text:
            said = {"text": piece} if "prompt" in body else {"delta": {"content": piece}}
            events.append({"choices": [{"index": 0, "finish_reason": None, **said}]})
        last = {"text": ""} if "prompt" in body else {"delta": {}}
        events.append({"choices": [{"index": 0, "finish_reason": "length", **last}]})
        usage = {"prompt_tokens": 3, "completion_tokens": len(text)}
        events.append({"choices": [], "usage": usage})
        if self.stream_error is not None:
            events = [*events[:2], {"error": self.stream_error}]
        lines = [
            "data: " + json.dumps({"model": body["model"]} | e, ensure_ascii=False) for e in events
        ]
        raw = ": ping\n\n" + "\r\n\r\n".join(lines) + "\n\ndata: [DONE]\n\n"
        chunks = Chunks(raw.encode()[: self.breaks_after_bytes], self.chunk_bytes)
        chunks.breaks = self.breaks_after_bytes is not None
        self.streams.append(chunks)
        return chunks

    @property
    def transport(self) -> httpx.MockTransport:
        return httpx.MockTransport(self)
