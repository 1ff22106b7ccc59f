"""A stand-in for `sl-serve serve`, run as a program: python serve_fake.py [--fail | --bad-end]."""

from __future__ import annotations

import json
import signal
import sys
from collections.abc import AsyncIterator

import uvicorn
from starlette.applications import Starlette
from starlette.requests import Request
from starlette.responses import JSONResponse, PlainTextResponse, Response, StreamingResponse
from starlette.routing import Route

counted = {"prompt": 0, "generated": 0, "steps": 0}

METRICS = """\
# TYPE sl_serve_prompt_tokens_total counter
sl_serve_prompt_tokens_total {prompt}
# TYPE sl_serve_generation_tokens_total counter
sl_serve_generation_tokens_total {generated}
# TYPE sl_serve_step_seconds histogram
sl_serve_step_seconds_bucket{{le="+Inf"}} {steps}
sl_serve_step_seconds_sum {seconds}
sl_serve_step_seconds_count {steps}
# TYPE sl_serve_host_to_device_bytes_total counter
sl_serve_host_to_device_bytes_total{{kind="weights"}} {weights}
sl_serve_host_to_device_bytes_total{{kind="kv"}} 12345
"""


async def ready(request: Request) -> Response:
    return JSONResponse({"status": "ok"})


async def models(request: Request) -> Response:
    return JSONResponse({"object": "list", "data": [{"id": "fake"}]})


async def metrics(request: Request) -> Response:
    steps = counted["steps"]
    text = METRICS.format(**counted, seconds=0.25 * steps, weights=2_000_000 * steps)
    return PlainTextResponse(text)


async def completions(request: Request) -> Response:
    body = await request.json()
    counted["prompt"] += 10
    counted["generated"] += body["max_tokens"]
    counted["steps"] += 1
    usage = {"prompt_tokens": 10, "completion_tokens": body["max_tokens"]}
    choice = {"index": 0, "text": " it rained.", "finish_reason": "length"}
    return JSONResponse({"model": "fake", "choices": [choice], "usage": usage})


async def chat(request: Request) -> Response:
    async def events() -> AsyncIterator[str]:
        for word in ("Because ", "of ", "scattering."):
            event = {"model": "fake", "choices": [{"delta": {"content": word}}]}
            yield f"data: {json.dumps(event)}\n\n"
        yield "data: [DONE]\n\n"

    return StreamingResponse(events(), media_type="text/event-stream")


if __name__ == "__main__":
    if "--fail" in sys.argv:
        sys.exit("error: no such model")
    routes = [
        Route("/ready", ready),
        Route("/v1/models", models),
        Route("/metrics", metrics),
        Route("/v1/completions", completions, methods=["POST"]),
        Route("/v1/chat/completions", chat, methods=["POST"]),
    ]
    # uvicorn stops on SIGTERM and then hands it on to this.
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(3 if "--bad-end" in sys.argv else 0))
    config = uvicorn.Config(Starlette(routes=routes), port=int(sys.argv[-1]), log_level="warning")
    uvicorn.Server(config).run()
