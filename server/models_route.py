"""GET /v1/models and /v1/models/{id}."""

from __future__ import annotations

from typing import Any

from fastapi import APIRouter
from starlette.responses import Response

from server.context import ServerContext
from server.errors import JsonResponse


def model_routes(context: ServerContext) -> APIRouter:
    router = APIRouter(prefix="/v1")

    @router.get("/models")
    async def models() -> Response:
        names = context.settings.served_model_names
        data = [_describe(context, name) for name in names]
        return JsonResponse({"object": "list", "data": data})

    @router.get("/models/{model_id:path}")  # names such as org/model have a slash
    async def model(model_id: str) -> Response:
        return JsonResponse(_describe(context, context.model_name(model_id)))

    return router


def _describe(context: ServerContext, name: str) -> dict[str, Any]:
    engine = context.engine
    return {
        "id": name,
        "object": "model",
        "created": context.created,
        "owned_by": "sl-serve",
        "max_model_len": engine.max_model_len,
        "meta": {"n_params": engine.n_parameters, "n_vocab": engine.vocab_size},
    }
