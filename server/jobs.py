"""The engine requests of one HTTP request, and the news they send back."""

from __future__ import annotations

import asyncio
import time
from collections.abc import AsyncIterator, Callable, Sequence
from contextlib import suppress
from functools import partial

import structlog

from server.engine_port import EnginePort
from server.errors import ApiError, internal_error
from server.params import Work
from sl_serve.core import FinishReason, Request, TokenOut

log = structlog.get_logger(__name__)

# (choice index, news, time.monotonic() of its arrival)
Watcher = Callable[[int, TokenOut, float], None]


class Job:
    """Lives on the event loop; the engine thread calls `_post` alone, which only hands over.

    News wait in a list whose length is bounded by the tokens asked for, and are merged per choice
    when read, so a slow reader costs memory for its own answer at most and never a step's time.
    """

    def __init__(self, engine: EnginePort, work: Work, watch: Watcher) -> None:
        self._engine = engine
        self._watch = watch
        self._loop = asyncio.get_running_loop()
        self._mail: list[tuple[int, TokenOut]] = []
        self._arrived = asyncio.Event()
        self._failure: ApiError | None = None
        self._unfinished = set(range(len(work.choices)))
        self.n_prompt_tokens = work.n_prompt_tokens
        self.n_completion_tokens = 0  # of the news read so far
        self._requests = [
            Request(f"{work.answer_id}-{i}", prompt.ids, sampling, partial(self._post, i))
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

    def _post(self, index: int, out: TokenOut) -> None:
        with suppress(RuntimeError):  # the loop is closed: nobody is left to read
            self._loop.call_soon_threadsafe(self._receive, index, out)

    def _receive(self, index: int, out: TokenOut) -> None:
        self._watch(index, out, time.monotonic())
        self._mail.append((index, out))
        if out.finish_reason is not None:
            self._unfinished.discard(index)
        self._arrived.set()

    async def news(self) -> AsyncIterator[dict[int, TokenOut]]:
        """What came since the last turn, merged per choice, until all choices have ended.

        Raises ApiError where the engine failed or gave the request up.
        """
        while self._unfinished or self._mail:
            await self._arrived.wait()
            self._arrived.clear()
            if self._failure is not None:
                raise self._failure
            mail, self._mail = self._mail, []
            by_choice: dict[int, list[TokenOut]] = {}
            for index, out in mail:
                self.n_completion_tokens += len(out.token_ids)
                _raise_failure(out)
                by_choice.setdefault(index, []).append(out)
            if by_choice:
                yield {index: merged(outs) for index, outs in sorted(by_choice.items())}

    async def results(self) -> list[TokenOut]:
        """The whole answer, one TokenOut per choice."""
        pieces: list[list[TokenOut]] = [[] for _ in self._requests]
        async for news in self.news():
            for index, out in news.items():
                pieces[index].append(out)
        return [merged(outs) for outs in pieces]


def merged(outs: Sequence[TokenOut]) -> TokenOut:
    """Consecutive news of one request as one."""
    last = outs[-1]
    if len(outs) == 1:
        return last
    return TokenOut(
        request_id=last.request_id,
        token_ids=tuple(i for out in outs for i in out.token_ids),
        text="".join(out.text for out in outs),
        logprobs=tuple(lp for out in outs for lp in out.logprobs),
        prompt_logprobs=outs[0].prompt_logprobs,
        finish_reason=last.finish_reason,
        stop_reason=last.stop_reason,
        usage=last.usage,
    )


def _raise_failure(out: TokenOut) -> None:
    if out.finish_reason is FinishReason.ERROR:
        log.error("generation_failed", engine_request=out.request_id, reason=out.error)
        raise internal_error()
    if out.finish_reason is FinishReason.ABORT:
        raise ApiError(503, "The server ended this request early.", code="aborted")
