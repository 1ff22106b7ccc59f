"""GET /status: what runs now, as numbers for people; the page at / shows them."""

from __future__ import annotations

import time
from collections.abc import Sequence
from dataclasses import asdict
from typing import Any

from fastapi import APIRouter
from starlette.responses import Response

from server.context import ServerContext
from server.engine_port import EnginePort
from server.errors import JsonResponse
from sl_serve import __version__
from sl_serve.stats import EngineSnapshot, MemoryTier, StepStats

MAX_STEPS = 200
WINDOW_S = 15.0  # that rates are taken over
WINDOW_STEPS = 3  # or over as many of the latest step's length, where that is longer


class RecentSteps:
    """The latest steps. The engine thread replaces the tuple, so that others read it whole."""

    def __init__(self) -> None:
        self._steps: tuple[tuple[float, StepStats], ...] = ()  # with time.monotonic() at the end

    def add(self, stats: StepStats) -> None:
        self._steps = (*self._steps[1 - MAX_STEPS :], (time.monotonic(), stats))

    def latest(self) -> StepStats | None:
        return self._steps[-1][1] if self._steps else None

    def rates(self, now_s: float) -> dict[str, float]:
        """Per second, pauses between steps included; zeros where nothing ran lately."""
        steps = self._steps
        window_s = max(WINDOW_S, WINDOW_STEPS * steps[-1][1].wall_s) if steps else WINDOW_S
        lately = [(end_s, step) for end_s, step in steps if end_s > now_s - window_s]
        begin_s = lately[0][0] - lately[0][1].wall_s if lately else now_s - window_s
        span_s = max(now_s - begin_s, 1e-6)
        chosen = [step for _, step in lately]
        return {
            "prefill_tokens_per_s": sum(s.n_prefill_tokens for s in chosen) / span_s,
            "decode_tokens_per_s": sum(s.n_decode_tokens for s in chosen) / span_s,
            "down_bytes_per_s": sum(map(down_bytes, chosen)) / span_s,
            "up_bytes_per_s": sum(map(up_bytes, chosen)) / span_s,
        }


def down_bytes(step: StepStats) -> int:
    return step.weight_bytes + step.kv_down_bytes + step.hidden_down_bytes


def up_bytes(step: StepStats) -> int:
    return step.kv_up_bytes + step.hidden_up_bytes


def status_routes(context: ServerContext) -> APIRouter:
    router = APIRouter()
    steps = RecentSteps()
    context.engine.on_step(steps.add)

    @router.get("/status")
    async def status() -> Response:
        snapshot = context.engine.snapshot()
        latest = steps.latest()
        answer = {
            "version": __version__,
            "models": context.settings.served_model_names,
            "state": snapshot.state,
            "jobs": context.batches is not None,
            "requests": _requests(context.engine, snapshot),
            "step": None if latest is None else _step(context.engine, latest),
            "rates": steps.rates(time.monotonic()),
            "memory": [_tier(tier) for tier in context.engine.memory_tiers],
            "kv": {"used_bytes": snapshot.kv_used_bytes, "total_bytes": snapshot.kv_total_bytes},
        }
        return JsonResponse(answer)

    return router


def _requests(engine: EnginePort, snapshot: EngineSnapshot) -> dict[str, int]:
    return {
        "running": snapshot.n_running,
        "max_running": engine.max_rows,
        "waiting": snapshot.n_waiting,
        "waiting_tokens": snapshot.waiting_tokens,
        "prompt_tokens_total": snapshot.prompt_tokens_total,
        "generated_tokens_total": snapshot.generated_tokens_total,
        "steps_total": snapshot.n_steps,
    }


def _step(engine: EnginePort, step: StepStats) -> dict[str, Any]:
    """Copies run beside the arithmetic: what they add to a step's time is the stall."""
    most_rows = -(-engine.max_rows // engine.n_sub_batches)
    fills: Sequence[dict[str, int]] = [
        {"rows": fill.n_rows, "max_rows": most_rows, "tokens": fill.n_tokens}
        for fill in step.sub_batches
    ]
    sizes = {name: n for name, n in asdict(step).items() if name.endswith("_bytes")}
    return {
        "wall_s": step.wall_s,
        "compute_s": max(0.0, step.wall_s - step.stall_s),
        "stall_s": step.stall_s,
        "prefill_tokens": step.n_prefill_tokens,
        "decode_tokens": step.n_decode_tokens,
        "down_bytes": down_bytes(step),
        "up_bytes": up_bytes(step),
        "bytes": sizes,
        "sub_batches": fills,
    }


def _tier(tier: MemoryTier) -> dict[str, Any]:
    return {
        "tier": tier.name,
        "planned_bytes": tier.planned_bytes,
        "budget_bytes": tier.budget_bytes,
        "parts": [{"name": name, "bytes": n_bytes} for name, n_bytes in tier.parts],
    }
