"""Is it alive, is it well, does it take work: three questions of an orchestrator."""

from __future__ import annotations

from fastapi import APIRouter
from prometheus_client import CONTENT_TYPE_LATEST
from starlette.responses import Response

from server.context import ServerContext
from server.errors import ApiError, JsonResponse, retry_after
from server.openapi import answers_also
from server.watchdog import Progress, progress
from sl_serve import __version__
from sl_serve.stats import EngineSnapshot, EngineState


def health_routes(context: ServerContext) -> APIRouter:
    router = APIRouter()

    def judge(snapshot: EngineSnapshot) -> Progress:
        return progress(snapshot, context.settings.stall_floor_s)

    async def live() -> Response:
        """503 once only a new process helps: the engine is dead, or stuck beyond hope."""
        snapshot = context.engine.snapshot()
        if snapshot.state is EngineState.DEAD:
            _raise_if_down(snapshot)
        if judge(snapshot) is Progress.HOPELESS:
            raise _stuck(snapshot)
        return JsonResponse({"status": "ok"})

    async def health() -> Response:
        """503 while the engine does not work: dead, closed or stuck."""
        snapshot = context.engine.snapshot()
        _raise_if_down(snapshot)
        if judge(snapshot) is not Progress.STEADY:
            raise _stuck(snapshot)
        return JsonResponse({"status": "ok"})

    async def ready() -> Response:
        """503 while no new request would be served: also while draining."""
        if context.engine.snapshot().state is EngineState.DRAINING:
            raise _unavailable("draining", "The server is draining and takes no new requests.")
        return await health()

    @router.get("/metrics", responses=answers_also("text/plain"))
    async def metrics() -> Response:
        return Response(context.metrics.render(), headers={"Content-Type": CONTENT_TYPE_LATEST})

    @router.get("/version")
    async def version() -> Response:
        return JsonResponse({"version": __version__})

    for path, answer in (("/live", live), ("/ping", live), ("/health", health), ("/ready", ready)):
        router.add_api_route(path, answer, methods=["GET"])
        router.add_api_route(path, answer, methods=["HEAD"], include_in_schema=False)
    return router


def _raise_if_down(snapshot: EngineSnapshot) -> None:
    if snapshot.state is EngineState.DEAD:
        # Anyone may ask: why it failed is for the log.
        raise _unavailable("engine_dead", "The engine has failed; the log says why.")
    if snapshot.state is EngineState.CLOSED:
        raise _unavailable("engine_closed", "The engine is closed.")


def _unavailable(code: str, message: str) -> ApiError:
    return ApiError(503, message, code=code, headers=retry_after(30))


def _stuck(snapshot: EngineSnapshot) -> ApiError:
    seconds, usual = snapshot.since_progress_s, snapshot.slow_step_s
    message = f"No step has ended for {seconds:.0f} s; they usually take up to {usual:.3g} s."
    return _unavailable("stuck", message)
