"""How the server's answers are read, streamed or whole, and its errors; no input or output here."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import httpx

from clients.protocol import ApiError, ClientError, UnreachableError


@dataclass(frozen=True, slots=True)
class Completion:
    """One whole answer. `text` is the continuation or the assistant's message."""

    text: str
    finish_reason: str | None
    prompt_tokens: int
    completion_tokens: int
    model: str


def parse_completion(response: httpx.Response) -> Completion:
    """The answer in the body of a response whose status was good."""
    body = json_body(response)
    try:
        choice, usage = body["choices"][0], body["usage"]
        text = choice["message"]["content"] or "" if "message" in choice else choice["text"]
        return Completion(
            text=text,
            finish_reason=choice["finish_reason"],
            prompt_tokens=usage["prompt_tokens"],
            completion_tokens=usage["completion_tokens"],
            model=body["model"],
        )
    except (KeyError, IndexError, TypeError) as error:
        raise ApiError(response.status_code, f"not a completion: {response.text[:200]}") from error


def parse_models(response: httpx.Response) -> list[str]:
    """Names of the models the server offers."""
    try:
        return [entry["id"] for entry in json_body(response)["data"]]
    except (KeyError, TypeError) as error:
        message = f"not a list of models: {response.text[:200]}"
        raise ApiError(response.status_code, message) from error


def first_model(names: Sequence[str]) -> str:
    if not names:
        raise ClientError("the server lists no model; name one")
    return names[0]


def json_body(response: httpx.Response) -> Any:
    try:
        return response.json()
    except ValueError as error:
        message = f"not JSON: {response.text[:200]}"
        raise ApiError(response.status_code, message) from error


def parse_error(response: httpx.Response) -> ApiError:
    """The error in a response, also of a proxy that answers in plain text."""
    try:
        return _error_from(json.loads(response.text), response.status_code)
    except ValueError:
        text = response.text.strip()[:200] or response.reason_phrase
        return ApiError(response.status_code, text)


def _error_from(body: Any, status: int) -> ApiError:
    error = body.get("error") if isinstance(body, dict) else None
    if not isinstance(error, dict):
        return ApiError(status, str(error or body)[:200])
    return ApiError(
        status, str(error.get("message")), str(error.get("type") or ""), error.get("param")
    )


class StreamReader:
    """Bytes of a streamed answer in, pieces of text out.

    Events are split at newline bytes alone: model text may hold characters, such as U+2028, at
    which general line splitters would cut an event in two.
    """

    def __init__(self) -> None:
        self._rest = b""
        self._text: list[str] = []
        self._finish_reason: str | None = None
        self._usage: Mapping[str, int] = {}
        self._model = ""
        self.done = False

    def feed(self, chunk: bytes) -> list[str]:
        """Pieces of text that `chunk` completes.

        Raises ApiError if the server reports an error inside the stream.
        """
        *lines, self._rest = (self._rest + chunk).split(b"\n")
        pieces = [self._read_line(line.strip()) for line in lines]
        return [piece for piece in pieces if piece]

    def result(self) -> Completion:
        """The whole answer; raises UnreachableError if the stream was cut before its end."""
        if not self.done:
            raise UnreachableError("the connection ended before the answer was complete")
        return Completion(
            text="".join(self._text),
            finish_reason=self._finish_reason,
            prompt_tokens=self._usage.get("prompt_tokens", 0),
            completion_tokens=self._usage.get("completion_tokens", 0),
            model=self._model,
        )

    def _read_line(self, line: bytes) -> str:
        if not line.startswith(b"data:"):  # blank lines, comments that keep the line alive
            return ""
        data = line.removeprefix(b"data:").strip()
        if data == b"[DONE]":
            self.done = True
            return ""
        event = json.loads(data)
        if "error" in event:
            raise _error_from(event, status=0)
        return self._read_event(event)

    def _read_event(self, event: Mapping[str, Any]) -> str:
        self._model = event.get("model") or self._model
        self._usage = event.get("usage") or self._usage
        if not event.get("choices"):
            return ""
        choice = event["choices"][0]
        self._finish_reason = choice.get("finish_reason") or self._finish_reason
        delta = choice.get("delta")
        text: str = (choice.get("text") if delta is None else delta.get("content")) or ""
        self._text.append(text)
        return text
