"""The outermost layer: an id on every answer, one log line per request, and no escaping error."""

from __future__ import annotations

import re
import time
import uuid
from dataclasses import dataclass, field
from typing import TYPE_CHECKING

import structlog
from starlette.datastructures import Headers, MutableHeaders
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from server.auth import PUBLIC_PATHS
from server.errors import internal_error

if TYPE_CHECKING:
    from server.jobs import Job
    from server.metrics import ServerMetrics

log = structlog.get_logger(__name__)

CLIENT_ID = re.compile(r"[A-Za-z0-9._-]{1,128}")
SCOPE_KEY = "sl_serve.record"
QUIET_PATHS = PUBLIC_PATHS | {"/metrics", "/status"}  # polled every few seconds


@dataclass(slots=True)
class RequestRecord:
    """What the log line of one request says."""

    request_id: str
    started_s: float = field(default_factory=time.monotonic)
    status: int = 499  # as long as no answer was begun: the client left first
    job: Job | None = None


def record_of(scope: Scope) -> RequestRecord:
    record = scope[SCOPE_KEY]
    assert isinstance(record, RequestRecord)
    return record


class Access:
    def __init__(self, app: ASGIApp, metrics: ServerMetrics) -> None:
        self._app = app
        self._metrics = metrics

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] != "http":
            await self._app(scope, receive, send)
            return
        record = RequestRecord(_request_id(scope))
        scope[SCOPE_KEY] = record

        async def send_with_id(message: Message) -> None:
            if message["type"] == "http.response.start":
                record.status = message["status"]
                MutableHeaders(scope=message)["x-request-id"] = record.request_id
            await send(message)

        with structlog.contextvars.bound_contextvars(request_id=record.request_id):
            try:
                await self._app(scope, receive, send_with_id)
            except Exception:
                log.exception("request_failed", path=scope["path"][:200])
                if record.status != 499:  # an answer was begun: only cutting it off shows failure
                    raise
                await internal_error().response()(scope, receive, send_with_id)
            finally:
                self._report(scope, record)

    def _report(self, scope: Scope, record: RequestRecord) -> None:
        seconds = time.monotonic() - record.started_s
        route = getattr(scope.get("route"), "path", "unknown")
        self._metrics.answered(route, record.status, seconds)
        write = log.debug if scope["path"] in QUIET_PATHS else log.info
        write(
            "request",
            method=scope["method"],
            route=route,
            status=record.status,
            prompt_tokens=record.job.n_prompt_tokens if record.job else 0,
            completion_tokens=record.job.n_completion_tokens if record.job else 0,
            seconds=round(seconds, 4),
        )


def _request_id(scope: Scope) -> str:
    """The client's own id where it is harmless, otherwise a new one."""
    offered = Headers(scope=scope).get("x-request-id", "")
    return offered if CLIENT_ID.fullmatch(offered) else f"req-{uuid.uuid4().hex}"
