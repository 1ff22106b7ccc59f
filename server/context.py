"""What all handlers of one app share; made once by `create_app`."""

from __future__ import annotations

import asyncio
import time
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from typing import TYPE_CHECKING, ParamSpec, TypeVar

import structlog

from server.bodies.fields import Body
from server.bodies.validation import BodyT, validate
from server.engine_port import EnginePort
from server.errors import ApiError
from server.jobs import Job
from server.limits import parse_object
from server.metrics import ServerMetrics
from server.params import Work
from server.settings import ServerSettings
from sl_serve.errors import QueueFullError
from sl_serve.grammar.compiler import Grammars, Wanted
from sl_serve.grammar.forms import Form, source_of
from sl_serve.grammar.vocabulary import vocabulary_of

if TYPE_CHECKING:
    from server.batch.service import BatchService

log = structlog.get_logger(__name__)

P = ParamSpec("P")
T = TypeVar("T")

MAX_IGNORED_NAMES = 100
MAX_COMPILING = 64
RETRY_COMPILE_S = 5


class ServerContext:
    def __init__(self, engine: EnginePort, settings: ServerSettings) -> None:
        self.engine = engine
        self.settings = settings
        self.metrics = ServerMetrics(engine, settings.stall_floor_s)
        self.jobs: set[Job] = set()
        self.batches: BatchService | None = None  # set by `create_app` where there is a folder
        self.created = int(time.time())  # unix seconds
        self.grammars = Grammars(lambda: vocabulary_of(engine.tokenizer, engine.vocab_size))
        # Apart from the others: these may wait for seconds, and one works while the others wait.
        self._compilers = ThreadPoolExecutor(1, thread_name_prefix="sl-serve-compile")
        self._n_compiling = 0  # on the loop
        self._workers = ThreadPoolExecutor(settings.n_workers, thread_name_prefix="sl-serve-front")
        self._ignored_names: set[str] = set()

    def batch_service(self) -> BatchService:
        """ApiError 501 where batches are off."""
        if self.batches is None:
            raise ApiError(
                501,
                "Files and batches are off; start the server with --jobs-dir, a folder for them.",
                code="batches_off",
            )
        return self.batches

    def pause_batches(self) -> None:
        if self.batches is not None:
            self.batches.pause()

    def close(self) -> None:
        if self.batches is not None:
            self.batches.close()
        self._workers.shutdown(wait=False, cancel_futures=True)
        self._compilers.shutdown(wait=False, cancel_futures=True)
        self.grammars.close()

    async def off_loop(self, work: Callable[P, T], *args: P.args, **kwargs: P.kwargs) -> T:
        """Runs `work` on one of few threads, so that the loop keeps answering."""
        loop = asyncio.get_running_loop()
        return await loop.run_in_executor(self._workers, lambda: work(*args, **kwargs))

    def wanted(self, asked: tuple[Form, str] | None) -> Wanted | None:
        """For `Work`: `asked` is a form and the field that asks for it."""
        if asked is None:
            return None
        form, param = asked
        return Wanted(self.grammars, source_of(form), param)

    async def compile(self, work: Work) -> None:
        """After it, `work.constraint()` takes no time. QueueFullError when many wait already."""
        if work.grammar is None or work.grammar.is_ready:
            return
        if self._n_compiling >= MAX_COMPILING:
            raise QueueFullError(
                f"{self._n_compiling} grammars wait to be compiled; try again later",
                RETRY_COMPILE_S,
            )
        self._n_compiling += 1
        try:
            await asyncio.get_running_loop().run_in_executor(self._compilers, work.grammar.grammar)
        finally:
            self._n_compiling -= 1

    def parse(self, kind: type[BodyT], raw: bytes) -> BodyT:
        body = validate(kind, parse_object(raw, self.settings.max_json_depth))
        self._note_ignored(body)
        return body

    def model_name(self, asked: str | None) -> str:
        """The served name meant by `asked`; ApiError 404 for a stranger."""
        names = self.settings.served_model_names
        if asked is None:
            return names[0]
        if asked in names:
            return asked
        raise ApiError(
            404,
            f"The model {asked[:200]!r} is not served here; there is {', '.join(names)}.",
            param="model",
            code="model_not_found",
        )

    def start(self, work: Work) -> Job:
        """Hands the work to the engine; nothing is left behind where it refuses."""
        job = Job(self.engine, work, self.metrics.watch(len(work.choices), time.monotonic()))
        job.submit()
        self.jobs.add(job)
        return job

    def finish(self, job: Job) -> None:
        """Gives back whatever the engine still holds for it."""
        self.jobs.discard(job)
        job.abort()

    def _note_ignored(self, body: Body) -> None:
        """Says once per name that a field has no effect; the names are a client's, so bounded."""
        for name in body.model_extra or {}:
            if name not in self._ignored_names and len(self._ignored_names) < MAX_IGNORED_NAMES:
                self._ignored_names.add(name)
                log.warning("ignored_field", field=name[:64])
