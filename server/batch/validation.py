"""One pass over an input file: every line is parsed, translated and measured, its form compiled;
none is kept."""

from __future__ import annotations

import hashlib
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from server.batch.lines import CheckedLine
from server.batch.translate import Translator, line_seed
from server.errors import ApiError
from sl_serve.errors import RequestError

MAX_LINES = 50_000
MAX_CUSTOM_ID_CHARS = 512
MAX_SHOWN_CHARS = 100


class LineError(Exception):
    """What is wrong with one line, as the batch object shows it."""

    def __init__(self, code: str, message: str, param: str | None = None) -> None:
        super().__init__(message)
        self.code = code
        self.param = param
        self.line: int | None = None

    def as_object(self) -> dict[str, Any]:
        message, param = str(self), self.param
        return {"code": self.code, "line": self.line, "message": message, "param": param}


class FileCheck:
    """Checks the lines of one file, which must agree with the endpoint and with one another."""

    def __init__(self, translator: Translator, endpoint: str, max_lines: int = MAX_LINES) -> None:
        self._translator = translator
        self._endpoint = endpoint
        self._max_lines = max_lines
        self._seen: set[bytes] = set()  # digests: custom ids may be long
        self.model: str | None = None  # of the first line, and so of all
        self.n_lines = 0

    def run(self, path: Path) -> Iterator[CheckedLine | LineError]:
        """One or the other for each line that is not blank; an error without a line is the last."""
        longest = self._translator.max_line_bytes
        offset = 0
        with path.open("rb") as file:
            number = 0
            while raw := file.readline(longest + 1):
                number += 1
                if len(raw) > longest:
                    yield _at(number, LineError("line_too_long", f"over {longest:,} bytes"))
                    return
                if raw.strip():
                    self.n_lines += 1
                    if self.n_lines > self._max_lines:
                        yield LineError("too_many_lines", f"over {self._max_lines:,} lines")
                        return
                    yield self._checked(number, offset, raw)
                offset += len(raw)
        if self.n_lines == 0:
            yield LineError("empty_file", "the file has no lines")

    def _checked(self, number: int, offset: int, raw: bytes) -> CheckedLine | LineError:
        try:
            custom_id, body = self._read(raw)
            n_tokens = self._measure(body, custom_id)
            return CheckedLine(number, offset, len(raw), custom_id, n_tokens)
        except LineError as error:
            return _at(number, error)

    def _read(self, raw: bytes) -> tuple[str, dict[str, Any]]:
        try:
            entry = self._translator.parse(raw)
        except RequestError as error:
            raise LineError("invalid_json_line", str(error)) from None
        custom_id = self._custom_id(entry)
        if entry.get("method") != "POST":
            raise LineError("invalid_method", "'method' should be \"POST\".", "method")
        if entry.get("url") != self._endpoint:
            shown = str(entry.get("url"))[:MAX_SHOWN_CHARS]
            raise LineError(
                "mismatched_endpoint",
                f"'url' is {shown!r}, the batch's is {self._endpoint!r}.",
                "url",
            )
        body = entry.get("body")
        if not isinstance(body, dict):
            raise LineError("invalid_body", "'body' should be a JSON object.", "body")
        if body.get("stream"):
            raise LineError("stream_not_supported", "a line cannot be streamed.", "body.stream")
        return custom_id, body

    def _custom_id(self, entry: dict[str, Any]) -> str:
        custom_id = entry.get("custom_id")
        if not isinstance(custom_id, str) or not 0 < len(custom_id) <= MAX_CUSTOM_ID_CHARS:
            limit = f"a string of 1 to {MAX_CUSTOM_ID_CHARS} characters"
            raise LineError("invalid_custom_id", f"'custom_id' should be {limit}.", "custom_id")
        digest = hashlib.blake2b(custom_id.encode(), digest_size=16).digest()
        if digest in self._seen:
            shown = custom_id[:MAX_SHOWN_CHARS]
            raise LineError("duplicate_custom_id", f"{shown!r} was used before.", "custom_id")
        self._seen.add(digest)
        return custom_id

    def _measure(self, body: dict[str, Any], custom_id: str) -> int:
        """Prompt tokens of a body that could be run as it is."""
        try:
            work = self._translator.work(self._endpoint, body, line_seed(0, custom_id))
            if work.grammar is not None:
                work.grammar.grammar()  # compiled: a form that cannot be is found here
        except (RequestError, ApiError) as error:
            code, param = error.code or "invalid_body", error.param
            raise LineError(code, str(error), f"body.{param}" if param else "body") from None
        self.model = self.model or work.model
        if work.model != self.model:
            raise LineError(
                "model_mismatch",
                f"the model is {work.model!r}, before {self.model!r}.",
                "body.model",
            )
        return work.n_prompt_tokens


def _at(number: int, error: LineError) -> LineError:
    error.line = number
    return error
