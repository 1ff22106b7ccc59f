"""The one path of both endpoints: convert, submit, then stream or collect."""

from __future__ import annotations

from collections.abc import AsyncGenerator, Callable
from typing import Any, Protocol

import structlog
from starlette.requests import Request
from starlette.responses import Response

from server.access import record_of
from server.bodies.generation import GenerationBody
from server.context import ServerContext
from server.errors import ApiError, JsonResponse, internal_error
from server.jobs import Job
from server.params import Work
from server.streams import DONE, EventStream, event, unless_gone
from sl_serve.core import TokenOut

log = structlog.get_logger(__name__)

# (choice index, news) -> the chunks to send for it, each one entry of `choices`
Renderer = Callable[[int, TokenOut], list[dict[str, Any]]]


class Dialect(Protocol):
    """What completions and chat completions differ in. `convert` and `collect` run off the loop."""

    chunk_object: str

    def convert(self, raw: bytes) -> Work:
        """Parses, checks and tokenises; raises RequestError or ApiError."""
        ...

    def renderer(self, work: Work) -> Renderer:
        """For one stream; remembers what was sent."""
        ...

    def collect(self, work: Work, outs: list[TokenOut]) -> dict[str, Any]:
        """The whole answer, without its usage."""
        ...


def is_visible(out: TokenOut, body: GenerationBody) -> bool:
    """Text may be held back, and of such news a client has no use."""
    shown = out.text or out.logprobs or out.prompt_logprobs or out.finish_reason
    return bool(shown) or body.return_token_ids


async def generate(context: ServerContext, dialect: Dialect, request: Request) -> Response:
    work = await context.off_loop(dialect.convert, await request.body())
    await context.compile(work)
    place = {"X-Queue-Position": str(context.engine.snapshot().n_waiting_requests)}
    job = context.start(work)
    record_of(request.scope).job = job
    if work.body.stream:
        events = _events(dialect, work, job)
        return EventStream(events, context.settings.ping_s, lambda: context.finish(job), place)
    try:
        outs = await unless_gone(request.receive, job.results())
    finally:
        context.finish(job)
    usage = work.usage(job.n_completion_tokens)
    return await context.off_loop(
        lambda: JsonResponse(dialect.collect(work, outs) | {"usage": usage}, headers=place)
    )


async def _events(dialect: Dialect, work: Work, job: Job) -> AsyncGenerator[bytes, None]:
    """Chunks, then usage if asked for; a failure becomes the last event. Always ends with DONE."""
    options = work.body.stream_options
    with_usage = options is not None and options.include_usage
    continuous = with_usage and options is not None and options.continuous_usage_stats
    envelope = work.envelope(dialect.chunk_object) | ({"usage": None} if with_usage else {})
    render = dialect.renderer(work)
    try:
        async for news in job.news():
            if continuous:
                envelope["usage"] = work.usage(job.n_completion_tokens)
            choices = [choice for index, out in news.items() for choice in render(index, out)]
            if choices:
                yield b"".join(event(envelope | {"choices": [choice]}) for choice in choices)
        if with_usage:
            usage = work.usage(job.n_completion_tokens)
            yield event(envelope | {"choices": [], "usage": usage})
    except ApiError as error:
        yield event(error.body)
    except Exception:
        log.exception("stream_failed", answer=work.answer_id)
        yield event(internal_error().body)
    yield DONE
