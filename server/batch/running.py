"""A line in the engine."""

from __future__ import annotations

import threading
from collections.abc import Callable
from functools import partial

from server.batch.lines import ClaimedLine
from server.batch.records import BatchRecord
from server.engine_port import EnginePort
from server.jobs import Gathered
from server.params import Work
from sl_serve.core import BACKGROUND_PRIORITY, FinishReason, Request, TokenOut


class RunningLine:
    """The engine thread calls `_receive`, which gathers and, at the very end, calls `on_end`."""

    def __init__(
        self,
        claim: ClaimedLine,
        batch: BatchRecord,
        work: Work,
        engine: EnginePort,
        on_end: Callable[[RunningLine], None],
    ) -> None:
        """Compiles the line's form where nobody has yet; raises RequestError if it cannot be."""
        self.claim = claim
        self.batch = batch
        self.work = work
        self.n_completion_tokens = 0
        self.failure: TokenOut | None = None
        self._engine = engine
        self._on_end = on_end
        self._lock = threading.Lock()
        self._gathered = [Gathered() for _ in work.choices]
        self._unfinished = set(range(len(work.choices)))
        self._requests = [
            Request(
                f"{work.answer_id}-{i}",
                prompt.ids,
                sampling,
                partial(self._receive, i),
                BACKGROUND_PRIORITY,
                constraint=work.constraint(),
            )
            for i, (prompt, sampling) in enumerate(work.choices)
        ]

    def submit(self) -> None:
        """All or nothing; raises what the engine raises."""
        self._engine.submit(self._requests)

    def abort(self) -> None:
        with self._lock:
            unfinished = sorted(self._unfinished)
        for i in unfinished:
            self._engine.abort(self._requests[i].request_id)

    def outputs(self) -> list[TokenOut]:
        """One per choice, whole; after the end."""
        return [gathered.as_one() for gathered in self._gathered]

    def _receive(self, index: int, out: TokenOut) -> None:
        self._gathered[index].add(out)
        self.n_completion_tokens += len(out.token_ids)
        if out.finish_reason is None:
            return
        if out.finish_reason in (FinishReason.ERROR, FinishReason.ABORT):
            self.failure = self.failure or out
        with self._lock:
            self._unfinished.discard(index)
            ended = not self._unfinished
        if ended:
            self._on_end(self)
