"""/v1/files: what batches read and write."""

from __future__ import annotations

from typing import Any

from fastapi import APIRouter
from starlette.requests import Request
from starlette.responses import FileResponse, Response

from server.batch.files import (
    DEFAULT_EXPIRY_S,
    INPUT_PURPOSE,
    LONGEST_EXPIRY_S,
    MAX_INPUT_BYTES,
    MAX_ROWS,
    SHORTEST_EXPIRY_S,
    FileTooLargeError,
)
from server.batch.records import FileRecord
from server.batch.service import BatchService
from server.context import ServerContext
from server.errors import ApiError, JsonResponse, retry_after
from server.paging import choice_param, limit_param, page
from server.uploads import UploadForm
from sl_serve.errors import RequestError

PATH = "/v1/files"
FORM_BYTES = 2**20  # of an upload, beside the file
MAX_UPLOADS = 8  # at a time

UPLOAD_FORM = {
    "requestBody": {
        "required": True,
        "content": {
            "multipart/form-data": {
                "schema": {
                    "type": "object",
                    "required": ["file", "purpose"],
                    "properties": {
                        "file": {"type": "string", "format": "binary"},
                        "purpose": {"type": "string", "enum": [INPUT_PURPOSE]},
                        "expires_after[anchor]": {"type": "string", "enum": ["created_at"]},
                        "expires_after[seconds]": {"type": "integer"},
                    },
                }
            }
        },
    }
}


def upload_limit_bytes() -> int:
    """Of a body with a file in it."""
    return MAX_INPUT_BYTES + FORM_BYTES


def file_routes(context: ServerContext) -> APIRouter:
    router = APIRouter(prefix="/v1", include_in_schema=context.batches is not None)
    uploads = Uploads(context)

    @router.post("/files", openapi_extra=UPLOAD_FORM)
    async def create(request: Request) -> Response:
        return JsonResponse((await uploads.receive(request)).as_object())

    @router.get("/files")
    async def files(request: Request) -> Response:
        service = context.batch_service()
        query = request.query_params
        limit = limit_param(query, default=MAX_ROWS, most=MAX_ROWS)
        newest_first = choice_param(query, "order", ("desc", "asc")) == "desc"
        records, has_more = await service.off_loop(
            service.files.page, limit, query.get("after"), newest_first, query.get("purpose")
        )
        return JsonResponse(page([record.as_object() for record in records], has_more))

    @router.get("/files/{file_id}")
    async def file(file_id: str) -> Response:
        service = context.batch_service()
        return JsonResponse((await service.off_loop(service.files.get, file_id)).as_object())

    @router.get("/files/{file_id}/content")
    async def content(file_id: str) -> Response:
        service = context.batch_service()
        record = await service.off_loop(service.files.get, file_id)
        return FileResponse(
            service.files.path(record.id),
            media_type="application/octet-stream",
            filename=f"{record.id}.jsonl",
        )

    @router.delete("/files/{file_id}")
    async def delete(file_id: str) -> Response:
        service = context.batch_service()
        await service.off_loop(service.files.delete, file_id)
        return JsonResponse({"id": file_id, "object": "file", "deleted": True})

    return router


class Uploads:
    """Receives files; counts those that are under way."""

    def __init__(self, context: ServerContext) -> None:
        self._context = context
        self._n_running = 0

    async def receive(self, request: Request) -> FileRecord:
        service = self._context.batch_service()
        if self._n_running >= MAX_UPLOADS:
            message = f"{MAX_UPLOADS} uploads are under way; try again when one has ended."
            raise ApiError(503, message, code="too_many_uploads", headers=retry_after(5))
        self._n_running += 1
        try:
            return await _receive(service, request)
        except FileTooLargeError as error:
            raise ApiError(413, str(error), param="file") from None
        finally:
            self._n_running -= 1


async def _receive(service: BatchService, request: Request) -> FileRecord:
    form = UploadForm(request.headers.get("content-type", ""))
    with await service.off_loop(service.files.begin, MAX_INPUT_BYTES) as upload:
        async for chunk in request.stream():
            if data := form.feed(chunk):
                await service.off_loop(upload.write, data)
        form.finish()
        if form.fields.get("purpose") != INPUT_PURPOSE:
            raise RequestError(f"'purpose' should be {INPUT_PURPOSE!r}.", "purpose")
        expires_s = _expires_s(form.fields)
        name = form.filename or "upload"
        return await service.off_loop(service.files.keep, upload, name, INPUT_PURPOSE, expires_s)


def _expires_s(fields: dict[str, Any]) -> int:
    anchor = fields.get("expires_after[anchor]")
    seconds = fields.get("expires_after[seconds]")
    if anchor is None and seconds is None:
        return DEFAULT_EXPIRY_S
    if anchor != "created_at":
        raise RequestError("'expires_after[anchor]' should be 'created_at'.", "expires_after")
    digits = str(seconds)
    if not (digits.isascii() and digits.isdecimal() and len(digits) < 10):
        digits = "0"
    if not SHORTEST_EXPIRY_S <= int(digits) <= LONGEST_EXPIRY_S:
        raise RequestError(
            f"'expires_after[seconds]' should be from {SHORTEST_EXPIRY_S} to {LONGEST_EXPIRY_S}.",
            "expires_after",
        )
    return int(digits)
