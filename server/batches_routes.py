"""/v1/batches: OpenAI's, and beside it `results` while a batch runs and `retry` after it."""

from __future__ import annotations

import re
from collections.abc import AsyncIterator

from fastapi import APIRouter
from starlette.requests import Request
from starlette.responses import Response, StreamingResponse

from server.batch.batches import BatchOrder
from server.batch.records import BatchRecord
from server.batch.render import line_of
from server.batch.schemas import BatchBody
from server.batch.service import BatchService
from server.batch.translate import ENDPOINTS
from server.context import ServerContext
from server.errors import JsonResponse
from server.openapi import takes
from server.paging import limit_param, page
from sl_serve.errors import RequestError

HOUR_S = 3600
WINDOW = re.compile(r"([0-9]{1,4})([hd])")
LONGEST_WINDOW_S = 30 * 24 * HOUR_S
MAX_KEY_CHARS = 256


def batch_routes(context: ServerContext) -> APIRouter:
    router = APIRouter(prefix="/v1", include_in_schema=context.batches is not None)

    @router.post("/batches", openapi_extra=takes(BatchBody))
    async def create(request: Request) -> Response:
        service = context.batch_service()
        body = await service.off_loop(context.parse, BatchBody, await request.body())
        order = _order(body, request.headers.get("idempotency-key"))
        return _answer(service, await service.off_loop(service.create, order))

    @router.get("/batches")
    async def batches(request: Request) -> Response:
        service = context.batch_service()
        limit = limit_param(request.query_params, default=20, most=100)
        after = request.query_params.get("after")
        records, has_more = await service.off_loop(service.batches.page, limit, after)
        return JsonResponse(page([service.describe(record) for record in records], has_more))

    @router.get("/batches/{batch_id}")
    async def batch(batch_id: str) -> Response:
        service = context.batch_service()
        return _answer(service, await service.off_loop(service.batches.get, batch_id))

    @router.post("/batches/{batch_id}/cancel")
    async def cancel(batch_id: str) -> Response:
        service = context.batch_service()
        return _answer(service, await service.off_loop(service.cancel, batch_id))

    @router.post("/batches/{batch_id}/retry")
    async def retry(batch_id: str) -> Response:
        """With a new completion window, as long as the first."""
        service = context.batch_service()
        record = await service.off_loop(service.batches.get, batch_id)
        window_s = _window_s(record.completion_window)
        return _answer(service, await service.off_loop(service.retry, batch_id, window_s))

    @router.get("/batches/{batch_id}/results")
    async def results(batch_id: str, request: Request) -> Response:
        """JSON lines of output and errors as they have come; `after`: the id of the last one that
        is known already."""
        service = context.batch_service()
        record = await service.off_loop(service.batches.get, batch_id)
        cursor = await service.off_loop(_cursor, service, record, request.query_params.get("after"))
        headers = {"X-Incomplete": "false" if record.is_finished else "true"}
        lines = _lines(service, record, cursor)
        return StreamingResponse(lines, headers=headers, media_type="application/jsonl")

    return router


def _answer(service: BatchService, record: BatchRecord) -> Response:
    return JsonResponse(service.describe(record))


def _order(body: BatchBody, key: str | None) -> BatchOrder:
    if body.endpoint not in ENDPOINTS:
        raise RequestError(
            f"'endpoint' is {body.endpoint[:100]!r}; there is {' and '.join(ENDPOINTS)}.",
            "endpoint",
        )
    if key is not None and not 0 < len(key) <= MAX_KEY_CHARS:
        raise RequestError(
            f"The Idempotency-Key should have 1 to {MAX_KEY_CHARS} characters.", "Idempotency-Key"
        )
    expires = body.output_expires_after
    return BatchOrder(
        input_file_id=body.input_file_id,
        endpoint=body.endpoint,
        completion_window=body.completion_window,
        window_s=_window_s(body.completion_window),
        metadata=body.metadata,
        output_expires_s=None if expires is None else expires.seconds,
        idempotency_key=key,
        seed=body.seed,
    )


def _window_s(text: str) -> int:
    found = WINDOW.fullmatch(text)
    seconds = 0
    if found is not None:
        seconds = int(found.group(1)) * (HOUR_S if found.group(2) == "h" else 24 * HOUR_S)
    if not HOUR_S <= seconds <= LONGEST_WINDOW_S:
        raise RequestError(
            f"'completion_window' is {text[:20]!r}; write it like 24h or 7d, from 1h to 30d.",
            "completion_window",
        )
    return seconds


def _cursor(service: BatchService, record: BatchRecord, after: str | None) -> int:
    if after is None:
        return 0
    line = line_of(after)
    if line is None:
        raise RequestError(f"'after' is {after[:60]!r}; give the id of a result line.", "after")
    return service.lines.cursor(record, line)


async def _lines(service: BatchService, record: BatchRecord, cursor: int) -> AsyncIterator[bytes]:
    while rows := await service.off_loop(service.lines.results_after, record, cursor):
        yield b"".join(row["body"] for row in rows)
        cursor = rows[-1]["seq"]
