"""Lines of output and error files, in OpenAI's shape."""

from __future__ import annotations

import hashlib
import re
from typing import Any

import orjson

from server.batch.lines import ClaimedLine, LineResult
from server.errors import ApiError

NEVER_RAN = {
    "cancelled": ("batch_cancelled", "The batch was cancelled before this line had ended."),
    "expired": ("batch_expired", "The batch expired before this line had ended."),
}
CRASHED = ("engine_crash", "The server failed each time it worked on this line.")
LINE_ID = re.compile(r"batch_req_[0-9a-f]{16}_([0-9]{1,9})")


def line_id(batch_id: str, line: int) -> str:
    """The same for every attempt, so that an answer can be known again."""
    digest = hashlib.blake2b(batch_id.encode(), digest_size=8).hexdigest()
    return f"batch_req_{digest}_{line}"


def line_of(result_id: str) -> int | None:
    """The line that `line_id` was given."""
    found = LINE_ID.fullmatch(result_id)
    return None if found is None else int(found.group(1))


def answered(claim: ClaimedLine, batch_id: str, answer: dict[str, Any]) -> LineResult:
    """`answer`: the body of the same request over HTTP."""
    usage = answer["usage"]
    return LineResult(
        claim.batch,
        claim.line,
        True,
        _response(claim, batch_id, 200, answer),
        usage["prompt_tokens"],
        usage["completion_tokens"],
    )


def refused(claim: ClaimedLine, batch_id: str, error: ApiError) -> LineResult:
    body = _response(claim, batch_id, error.status, error.body)
    return LineResult(claim.batch, claim.line, False, body)


def never_ran(
    batch: int, batch_id: str, line: int, custom_id: str, why: tuple[str, str]
) -> LineResult:
    code, message = why
    error = {"code": code, "message": message}
    return LineResult(batch, line, False, _json_line(batch_id, line, custom_id, None, error))


def _response(claim: ClaimedLine, batch_id: str, status: int, body: dict[str, Any]) -> bytes:
    request_id = f"{line_id(batch_id, claim.line)}_{claim.attempts}"
    response = {"status_code": status, "request_id": request_id, "body": body}
    return _json_line(batch_id, claim.line, claim.custom_id, response, None)


def _json_line(
    batch_id: str,
    line: int,
    custom_id: str,
    response: dict[str, Any] | None,
    error: dict[str, Any] | None,
) -> bytes:
    entry = {
        "id": line_id(batch_id, line),
        "custom_id": custom_id,
        "response": response,
        "error": error,
    }
    return orjson.dumps(entry, option=orjson.OPT_APPEND_NEWLINE)
