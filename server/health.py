"""Is it alive, is it well, does it take work: three questions of an orchestrator."""

from __future__ import annotations

from fastapi import APIRouter
from prometheus_client import CONTENT_TYPE_LATEST
from starlette.responses import Response

from server.context import ServerContext
from server.errors import ApiError, JsonResponse, retry_after
from sl_serve import __version__
from sl_serve.stats import EngineSnapshot, EngineState

STUCK_STEPS = 3  # a step this many times longer than the usual one counts as stuck


def health_routes(context: ServerContext) -> APIRouter:
    router = APIRouter()

    async def live() -> Response:
        """200 as long as the process answers."""
        return JsonResponse({"status": "ok"})

    async def health() -> Response:
        """503 once the engine is dead or closed."""
        _raise_if_down(context.engine.snapshot())
        return JsonResponse({"status": "ok"})

    async def ready() -> Response:
        """503 while no new request would be served: dead, draining or stuck."""
        snapshot = context.engine.snapshot()
        _raise_if_down(snapshot)
        if snapshot.state is EngineState.DRAINING:
            raise _unavailable("draining", "The server is draining and takes no new requests.")
        if _is_stuck(snapshot, context.settings.stall_floor_s):
            seconds = snapshot.since_progress_s
            raise _unavailable("stuck", f"The engine has not ended a step for {seconds:.0f} s.")
        return JsonResponse({"status": "ok"})

    @router.get("/metrics")
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
        raise _unavailable("engine_dead", f"The engine has failed: {snapshot.reason}")
    if snapshot.state is EngineState.CLOSED:
        raise _unavailable("engine_closed", "The engine is closed.")


def _unavailable(code: str, message: str) -> ApiError:
    return ApiError(503, message, code=code, headers=retry_after(30))


def _is_stuck(snapshot: EngineSnapshot, floor_s: float) -> bool:
    """Measured against the machine's own pace: a step may rightly take minutes."""
    if snapshot.n_running == 0:
        return False
    mean_s = snapshot.step_s_total / max(snapshot.n_steps, 1)
    usual_s = max(mean_s, snapshot.last_step_s)
    return snapshot.since_progress_s > max(floor_s, STUCK_STEPS * usual_s)
