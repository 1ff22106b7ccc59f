"""Batch jobs of one folder: what routes and `run-batch` call."""

from __future__ import annotations

import asyncio
import fcntl
import os
import threading
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any, ParamSpec, TypeVar

import structlog

from server.batch.batches import BatchOrder, BatchTable
from server.batch.clerk import Clerk
from server.batch.clock import Clock, steady_clock
from server.batch.database import Database, StoreError
from server.batch.feeder import Feeder
from server.batch.files import FileStore
from server.batch.lines import LineTable
from server.batch.metrics import BatchMetrics
from server.batch.pace import Pace
from server.batch.records import BatchRecord, Status
from server.batch.translate import Translator
from server.context import ServerContext
from sl_serve.errors import UserError

log = structlog.get_logger(__name__)

P = ParamSpec("P")
T = TypeVar("T")

N_WORKERS = 2  # a slow disk holds up these, and no chat
CLOSE_S = 5.0  # for the last commit, once the engine has let go of the lines


class BatchService:
    """Starts to work at once: what an earlier process left unfinished goes on.

    One process owns a folder at a time. Raises UserError where the folder cannot be used.
    """

    def __init__(
        self,
        context: ServerContext,
        folder: Path,
        quota_bytes: int | None = None,
        clock: Clock | None = None,
    ) -> None:
        clock = clock or steady_clock()
        self._lock: int | None
        self._lock, self._database = open_folder(folder)
        self.files = FileStore(self._database, folder / "files", clock, quota_bytes)
        self.batches = BatchTable(self._database, clock)
        self.lines = LineTable(self._database, clock)
        self._clock = clock
        self._pace = Pace(clock)
        self._workers = ThreadPoolExecutor(N_WORKERS, thread_name_prefix="sl-serve-jobs")
        metrics = BatchMetrics(context.metrics.registry)
        translator = Translator(context)
        self._clerk_news = threading.Event()
        self._feeder = Feeder(
            context.engine,
            translator,
            self.files,
            self.lines,
            self._pace,
            metrics,
            context.settings.drain_timeout_s,
            on_turn=self._clerk_news.set,
        )
        self._clerk = Clerk(
            self._database,
            self.files,
            self.batches,
            self.lines,
            translator,
            self._feeder,
            self._pace,
            metrics,
            self._clerk_news,
        )
        self.files.sweep()
        recovered = self.lines.take_over()
        metrics.recovered.inc(recovered)
        if recovered:
            log.warning("batch_lines_recovered", lines=recovered)
        self._feeder.start()
        self._clerk.start()

    async def off_loop(self, work: Callable[P, T], *args: P.args, **kwargs: P.kwargs) -> T:
        """Runs `work` on one of few threads; the disk is behind everything here."""
        loop = asyncio.get_running_loop()
        return await loop.run_in_executor(self._workers, lambda: work(*args, **kwargs))

    def create(self, order: BatchOrder) -> BatchRecord:
        """Raises RequestError, StoreError; as do the others."""
        record = self.batches.create(order)
        self._clerk_news.set()
        return record

    def cancel(self, batch_id: str) -> BatchRecord:
        record = self.batches.cancel(batch_id)
        self._feeder.wake()
        self._clerk_news.set()
        return record

    def retry(self, batch_id: str, window_s: int) -> BatchRecord:
        record = self.batches.retry(batch_id, window_s)
        self._feeder.wake()
        return record

    def describe(self, batch: BatchRecord) -> dict[str, Any]:
        """OpenAI's object, and beside it how the batch gets on."""
        return batch.as_object() | {"progress": self._progress(batch)}

    def _progress(self, batch: BatchRecord) -> dict[str, Any]:
        ended = batch.completed + batch.failed
        rate = self._pace.rate(batch.seq) if batch.status is Status.IN_PROGRESS else None
        expected_at = None
        if rate is not None and rate.lines_per_s > 0:
            expected_at = int(self._clock() + (batch.total - ended) / rate.lines_per_s)
        return {
            "lines": ended,
            "total": batch.total,
            "tokens": batch.input_tokens + batch.output_tokens,
            "tokens_per_second": None if rate is None else round(rate.tokens_per_s, 2),
            "expected_at": expected_at,
        }

    def pause(self) -> None:
        """Feed no more: what runs is put back, results are committed, jobs stay as they are.
        Returns at once."""
        self._clerk.stop()
        self._feeder.stop()

    def close(self) -> None:
        """`pause`, and waits a little for it: where steps are long, drain the engine in between.
        What is cut off here is done again by the next owner. Idempotent."""
        self.pause()
        self._feeder.join(CLOSE_S)
        self._clerk.join(CLOSE_S)
        self._workers.shutdown(wait=True, cancel_futures=True)
        self._database.close()
        if self._lock is not None:
            os.close(self._lock)
            self._lock = None


def open_folder(folder: Path) -> tuple[int, Database]:
    """Makes what is missing. The folder is this process's until the descriptor is closed."""
    lock = lock_folder(folder)
    try:
        return lock, Database(folder / "jobs.sqlite")
    except StoreError as error:
        os.close(lock)
        raise UserError(f"the jobs folder {folder} cannot be used: {error}") from None
    except UserError:
        os.close(lock)
        raise


def check_folder(folder: Path) -> None:
    """Raises UserError where a service could not be started."""
    lock, database = open_folder(folder)
    database.close()
    os.close(lock)


def lock_folder(folder: Path) -> int:
    try:
        (folder / "files").mkdir(parents=True, exist_ok=True)
        descriptor = os.open(folder / "lock", os.O_RDWR | os.O_CREAT, 0o600)
    except OSError as error:
        raise UserError(
            f"the jobs folder {folder} cannot be written to: {error.strerror}; choose another"
        ) from None
    try:
        fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except OSError:
        os.close(descriptor)
        raise UserError(
            f"the jobs folder {folder} is used by another process; stop it or choose another folder"
        ) from None
    return descriptor
