"""What clients get to see of a failure: OpenAI's error object, on every path.

The class of an exception decides the status, never its text. Messages of 5xx say nothing about
the inside; the details are in the log under the request id.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any

import orjson
import structlog
from starlette.exceptions import HTTPException
from starlette.responses import Response

from server.batch.database import NotFoundError, StoreError
from sl_serve.errors import (
    EngineClosedError,
    EngineDeadError,
    QueueFullError,
    RequestError,
    SlServeError,
)

LONGEST_RETRY_AFTER_S = 120  # openai-python gives up at once when told to wait longer
RETRY_CLOSED_S = 30

TYPES = {401: "authentication_error", 403: "permission_error", 429: "rate_limit_error"}
CODES = {404: "not_found", 405: "method_not_allowed", 413: "request_too_large"}


class JsonResponse(Response):
    media_type = "application/json"

    def render(self, content: Any) -> bytes:
        return orjson.dumps(content)


class ClientGoneError(Exception):
    """Nobody is left to read the answer."""


class ApiError(Exception):
    """An answer other than 2xx. `param` names the field, `code` the case."""

    def __init__(
        self,
        status: int,
        message: str,
        *,
        param: str | None = None,
        code: str | None = None,
        headers: Mapping[str, str] | None = None,
    ) -> None:
        super().__init__(message)
        self.status = status
        self.message = message
        self.param = param
        self.code = code or CODES.get(status)
        self.headers = headers

    @property
    def body(self) -> dict[str, Any]:
        kind = "server_error" if self.status >= 500 else "invalid_request_error"
        return {
            "error": {
                "message": self.message,
                "type": TYPES.get(self.status, kind),
                "param": self.param,
                "code": self.code,
            }
        }

    def response(self) -> JsonResponse:
        return JsonResponse(self.body, status_code=self.status, headers=self.headers)


def retry_after(seconds: float) -> dict[str, str]:
    whole = min(LONGEST_RETRY_AFTER_S, max(1, math.ceil(seconds)))
    return {"Retry-After": str(whole)}


def internal_error() -> ApiError:
    """To be called where the log's request id is that of the request: it is all that is told."""
    request_id = structlog.contextvars.get_contextvars().get("request_id", "unknown")
    message = f"The server failed while handling request {request_id}; its log has the details."
    return ApiError(500, message, code="internal_error")


def from_http(exc: HTTPException) -> ApiError:
    messages = {
        404: "There is nothing at this path; /openapi.json lists what there is.",
        405: "This path does not take this method; the Allow header lists those it takes.",
    }
    message = messages.get(exc.status_code, str(exc.detail))
    return ApiError(exc.status_code, message, headers=exc.headers)


def from_engine(exc: SlServeError) -> ApiError:
    match exc:
        case RequestError():
            status = 404 if isinstance(exc, NotFoundError) else 400
            return ApiError(status, str(exc), param=exc.param, code=exc.code)
        case QueueFullError():
            headers = retry_after(exc.retry_after_s)
            return ApiError(429, str(exc), code="queue_full", headers=headers)
        case EngineClosedError():
            message = "The server is shutting down and takes no new requests."
            headers = retry_after(RETRY_CLOSED_S)
            return ApiError(503, message, code="shutting_down", headers=headers)
        case EngineDeadError():
            message = "The engine has failed and takes no requests until the server is restarted."
            return ApiError(500, message, code="engine_dead")
        case StoreError(full=True):
            message = "The disk for files and batches is full; delete files or try again later."
            return ApiError(507, message, code="insufficient_storage")
        case _:
            return internal_error()
