"""The app: routes, error handlers and layers, put together."""

from __future__ import annotations

import structlog
from fastapi import APIRouter
from starlette.exceptions import HTTPException
from starlette.middleware import Middleware
from starlette.middleware.cors import CORSMiddleware
from starlette.requests import ClientDisconnect, Request
from starlette.responses import Response

from server.access import Access
from server.auth import ApiKeys, LoopbackGuard
from server.batch.service import BatchService
from server.batches_routes import batch_routes
from server.bodies.chat import ChatBody
from server.bodies.generation import CompletionBody
from server.chat import ChatCompletions
from server.completions import Completions
from server.context import ServerContext
from server.engine_port import EnginePort
from server.errors import ApiError, ClientGoneError, from_engine, from_http
from server.files_routes import PATH as FILES_PATH
from server.files_routes import file_routes, upload_limit_bytes
from server.generation import generate
from server.health import health_routes
from server.limits import BodyLimit
from server.models_route import model_routes
from server.openapi import DescribedApp, answers_also, takes
from server.page_routes import page_routes
from server.settings import ServerSettings
from server.status import status_routes
from server.tokens import token_routes
from sl_serve import __version__
from sl_serve.errors import SlServeError

log = structlog.get_logger(__name__)


def create_app(engine: EnginePort, settings: ServerSettings) -> DescribedApp:
    """The app is ready at once, and at work where its folder has batches that have not ended;
    `app.state.context` is what `run` needs of it to drain."""
    context = ServerContext(engine, settings)
    if settings.jobs_dir is not None:
        context.batches = BatchService(context, settings.jobs_dir, settings.jobs_quota_bytes)
    app = DescribedApp(
        title="sl-serve",
        version=__version__,
        docs_url=None,  # their scripts come from elsewhere
        redoc_url=None,
        redirect_slashes=False,
        middleware=_layers(context),
        exception_handlers={
            ApiError: _answer_api_error,
            SlServeError: _answer_engine_error,
            HTTPException: _answer_http_error,
            ClientGoneError: _answer_nobody,
            ClientDisconnect: _answer_nobody,
        },
    )
    app.state.context = context
    for router in (
        _generation_routes(context),
        model_routes(context),
        token_routes(context),
        health_routes(context),
        file_routes(context),
        batch_routes(context),
        status_routes(context),
        page_routes(),
    ):
        app.include_router(router)
    return app


def _layers(context: ServerContext) -> list[Middleware]:
    """Outermost first. Refusals pass the id and CORS layers too."""
    settings = context.settings
    layers = [Middleware(Access, metrics=context.metrics)]
    if settings.cors_origins:
        layers.append(
            Middleware(
                CORSMiddleware,
                allow_origins=settings.cors_origins,
                allow_methods=["GET", "POST", "DELETE"],
                allow_headers=["*"],
                expose_headers=["x-request-id"],
            )
        )
    if settings.api_keys:
        layers.append(Middleware(ApiKeys, keys=settings.api_keys))
    elif settings.on_loopback:
        hosts, origins = settings.allowed_hosts, settings.cors_origins
        layers.append(Middleware(LoopbackGuard, hosts=hosts, origins=origins))
    larger = {FILES_PATH: upload_limit_bytes()}
    layers.append(Middleware(BodyLimit, max_bytes=settings.max_body_bytes, larger=larger))
    return layers


def _generation_routes(context: ServerContext) -> APIRouter:
    router = APIRouter(prefix="/v1")
    completions_dialect, chat_dialect = Completions(context), ChatCompletions(context)

    streams = answers_also("text/event-stream")

    @router.post("/completions", openapi_extra=takes(CompletionBody), responses=streams)
    async def completions(request: Request) -> Response:
        return await generate(context, completions_dialect, request)

    @router.post("/chat/completions", openapi_extra=takes(ChatBody), responses=streams)
    async def chat_completions(request: Request) -> Response:
        return await generate(context, chat_dialect, request)

    return router


async def _answer_api_error(_: Request, error: Exception) -> Response:
    assert isinstance(error, ApiError)
    return error.response()


async def _answer_engine_error(_: Request, error: Exception) -> Response:
    assert isinstance(error, SlServeError)
    answer = from_engine(error)
    if answer.status in (500, 507):
        log.error("engine_refused", reason=str(error))
    return answer.response()


async def _answer_http_error(_: Request, error: Exception) -> Response:
    assert isinstance(error, HTTPException)
    return from_http(error).response()


async def _answer_nobody(_: Request, __: Exception) -> Response:
    return Response(status_code=499)  # "client closed request", as nginx logs it
