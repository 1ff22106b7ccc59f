"""The engine requests of one HTTP request, and the news they send back."""

from __future__ import annotations

import asyncio
import time
from collections.abc import AsyncIterator, Callable
from contextlib import suppress
from contextvars import copy_context
from dataclasses import replace
from functools import partial
from io import StringIO

import structlog

from server.engine_port import EnginePort
from server.errors import ApiError, internal_error
from server.params import Work
from sl_serve.core import FinishReason, Request, TokenLogprob, TokenOut

log = structlog.get_logger(__name__)

# (choice index, news, time.monotonic() of its arrival)
Watcher = Callable[[int, TokenOut, float], None]


class Gathered:
    """News of one choice as one piece: the text and ids of many tokens, not an object for each."""

    def __init__(self) -> None:
        self._latest: TokenOut | None = None
        self._ids: list[int] = []
        self._text = StringIO(newline="")  # as it is written
        self._logprobs: list[TokenLogprob] = []
        self._prompt_logprobs: tuple[TokenLogprob | None, ...] | None = None

    def add(self, out: TokenOut) -> None:
        self._latest = out
        self._ids += out.token_ids
        self._text.write(out.text)
        self._logprobs += out.logprobs
        if out.prompt_logprobs is not None:
            self._prompt_logprobs = out.prompt_logprobs

    def as_one(self) -> TokenOut:
        assert self._latest is not None
        return replace(
            self._latest,
            token_ids=tuple(self._ids),
            text=self._text.getvalue(),
            logprobs=tuple(self._logprobs),
            prompt_logprobs=self._prompt_logprobs,
        )


class Job:
    """Lives on the event loop; the engine thread calls `_post` alone, which only hands over.

    News that nobody has read yet are gathered per choice, so a slow reader costs the memory of its
    own answer, as one that did not ask for a stream does, and never a step's time.
    """

    def __init__(self, engine: EnginePort, work: Work, watch: Watcher) -> None:
        self._engine = engine
        self._watch = watch
        self._loop = asyncio.get_running_loop()
        self._context = copy_context()  # the request's id, for what is logged about its news
        self._inbox: dict[int, Gathered] = {}
        self._arrived = asyncio.Event()
        self._failure: ApiError | None = None
        self._unfinished = set(range(len(work.choices)))
        self.n_prompt_tokens = work.n_prompt_tokens
        self.n_completion_tokens = 0
        self._requests = [
            Request(
                f"{work.answer_id}-{i}",
                prompt.ids,
                sampling,
                partial(self._post, i),
                constraint=work.constraint(),
            )
            for i, (prompt, sampling) in enumerate(work.choices)
        ]

    def submit(self) -> None:
        """All or nothing; raises what the engine raises."""
        self._engine.submit(self._requests)

    def abort(self) -> None:
        for i in sorted(self._unfinished):
            self._engine.abort(self._requests[i].request_id)

    def fail(self, error: ApiError) -> None:
        """Ends the answer with `error`, whatever the engine still does about it."""
        self._failure = error
        self._arrived.set()
        self.abort()

    async def news(self) -> AsyncIterator[dict[int, TokenOut]]:
        """What came since the last turn, one piece per choice, until all choices have ended.

        Raises ApiError where the engine failed or gave the request up.
        """
        while self._unfinished or self._inbox:
            await self._arrival()
            if self._inbox:
                inbox, self._inbox = self._inbox, {}
                yield {index: gathered.as_one() for index, gathered in sorted(inbox.items())}

    async def results(self) -> list[TokenOut]:
        """The whole answer, one TokenOut per choice; raises as `news` does."""
        while self._unfinished:
            await self._arrival()
        return [gathered.as_one() for _, gathered in sorted(self._inbox.items())]

    async def _arrival(self) -> None:
        await self._arrived.wait()
        self._arrived.clear()
        if self._failure is not None:
            raise self._failure

    def _post(self, index: int, out: TokenOut) -> None:
        with suppress(RuntimeError):  # the loop is closed: nobody is left to read
            self._loop.call_soon_threadsafe(self._receive, index, out, context=self._context)

    def _receive(self, index: int, out: TokenOut) -> None:
        self._watch(index, out, time.monotonic())
        self.n_completion_tokens += len(out.token_ids)
        self._inbox.setdefault(index, Gathered()).add(out)
        if out.finish_reason is not None:
            self._unfinished.discard(index)
        if self._failure is None:
            self._failure = _failure_of(out)
        self._arrived.set()


def _failure_of(out: TokenOut) -> ApiError | None:
    if out.finish_reason is FinishReason.ERROR:
        log.error("generation_failed", engine_request=out.request_id, reason=out.error)
        return internal_error()
    if out.finish_reason is FinishReason.ABORT:
        return ApiError(503, "The server ended this request early.", code="aborted")
    return None
