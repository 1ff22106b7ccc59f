"""The thread for what takes long: checking input files, writing output files, tidying up."""

from __future__ import annotations

import threading
import time
from contextlib import ExitStack

import structlog

from server.batch.batches import BatchTable
from server.batch.database import Database, StoreError
from server.batch.feeder import RETRY_S, Feeder
from server.batch.files import DEFAULT_EXPIRY_S, OUTPUT_PURPOSE, FileStore, Upload
from server.batch.lines import CheckedLine, LineTable
from server.batch.metrics import BatchMetrics
from server.batch.pace import Pace
from server.batch.records import BatchRecord, Status
from server.batch.render import NEVER_RAN, never_ran
from server.batch.translate import Translator
from server.batch.validation import FileCheck, LineError

log = structlog.get_logger(__name__)

GROUP_LINES = 1000  # of one transaction
MAX_ERRORS = 100  # that a batch object lists
POLL_S = 1.0  # how late an expiry may be noticed
TIDY_S = 600.0


class Clerk:
    """Everything but `stop` and `join` happens on its own thread. Whatever is cut off by the end
    of the process is done again from its beginning: all of it may be repeated."""

    def __init__(
        self,
        database: Database,
        files: FileStore,
        batches: BatchTable,
        lines: LineTable,
        translator: Translator,
        feeder: Feeder,
        pace: Pace,
        metrics: BatchMetrics,
        news: threading.Event,
    ) -> None:
        """`news`: set by whoever has something for it to do."""
        self._database = database
        self._files = files
        self._batches = batches
        self._lines = lines
        self._translator = translator
        self._feeder = feeder
        self._pace = pace
        self._metrics = metrics
        self._tidied_s = -TIDY_S  # time.monotonic()
        self._news = news
        self._stopping = threading.Event()
        self._thread = threading.Thread(target=self._run, name="sl-serve-clerk", daemon=True)

    def start(self) -> None:
        self._thread.start()

    def stop(self) -> None:
        self._stopping.set()
        self._news.set()

    def join(self, timeout_s: float) -> None:
        if self._thread.is_alive():
            self._thread.join(timeout_s)

    def _run(self) -> None:
        while not self._stopping.is_set():
            try:
                self._turn()
                self._news.wait(POLL_S)
                self._news.clear()
            except (StoreError, OSError) as error:
                log.error("batch_store_failed", reason=str(error))
                self._stopping.wait(RETRY_S)
            except Exception:
                log.exception("batch_clerk_failed")
                self._stopping.wait(RETRY_S)

    def _turn(self) -> None:
        self._end_batches()
        for batch in self._batches.in_state(Status.VALIDATING):
            self._validate(batch)
        if time.monotonic() - self._tidied_s >= TIDY_S:
            self._files.delete_expired()
            self._batches.delete_old()
            self._tidied_s = time.monotonic()
        self._metrics.set_jobs(self._batches.count_by_status())

    def _end_batches(self) -> None:
        self._batches.expire()
        for batch in self._batches.in_state(Status.FINALIZING, Status.CANCELLING):
            if not self._stopping.is_set() and not self._feeder.holds(batch.seq):
                self._finalize(batch)

    def _validate(self, batch: BatchRecord) -> None:
        """Into `in_progress` or `failed`; left as it is when stopped or cancelled meanwhile."""
        self._lines.forget(batch)
        check = FileCheck(self._translator, batch.endpoint)
        errors: list[LineError] = []
        group: list[CheckedLine] = []
        for item in check.run(self._files.path(batch.input_file_id)):
            if self._stopping.is_set():
                return
            if isinstance(item, LineError):
                errors.append(item)
            elif not errors:  # a file with errors is refused as a whole
                group.append(item)
            if len(errors) == MAX_ERRORS:
                break
            if len(group) == GROUP_LINES:
                self._lines.add(batch, group)
                group = []
                self._end_batches()  # of others, or this one
                if self._batches.get(batch.id).status is not Status.VALIDATING:
                    return
        if errors:
            self._batches.refuse(batch, [error.as_object() for error in errors])
            return
        self._lines.add(batch, group)
        self._batches.begin(batch, check.model or "", check.n_lines)
        self._feeder.wake()

    def _finalize(self, batch: BatchRecord) -> None:
        """Lines that never ran get their error; then both files are written and named at once."""
        if batch.in_progress_at is None:  # ended while it was validated
            self._lines.forget(batch)
        self._fill_in(batch)
        expires_s = batch.output_expires_s or DEFAULT_EXPIRY_S
        with ExitStack() as stack:
            # The quota is for what comes in: a job that has run is to end.
            output = stack.enter_context(self._files.begin(within_quota=False))
            error = stack.enter_context(self._files.begin(within_quota=False))
            names = [self._write(batch, output, True), self._write(batch, error, False)]
            kinds = ((output, "output"), (error, "error"))
            with self._database.transaction() as tx:
                for (upload, kind), file_id in zip(kinds, names, strict=True):
                    if file_id is not None:
                        name = f"{batch.id}_{kind}.jsonl"
                        self._files.insert(tx, file_id, upload, name, OUTPUT_PURPOSE, expires_s)
                self._batches.conclude(tx, batch, *names)
            output.kept, error.kept = (file_id is not None for file_id in names)
        self._pace.forget(batch.seq)
        log.info("batch_ended", batch=batch.id, status=batch.outcome)

    def _fill_in(self, batch: BatchRecord) -> None:
        assert batch.outcome is not None
        if batch.outcome is Status.COMPLETED:
            return
        why = NEVER_RAN[batch.outcome]
        group = []
        for line, custom_id in self._lines.without_result(batch):
            group.append(never_ran(batch.seq, batch.id, line, custom_id, why))
            if len(group) == GROUP_LINES:
                self._lines.turn(group, (), (), {})
                group = []
        self._lines.turn(group, (), (), {})

    def _write(self, batch: BatchRecord, upload: Upload, ok: bool) -> str | None:
        """The id of the file with the lines of one kind; None where there are none."""
        for body in self._lines.results_in_order(batch, ok):
            upload.write(body)
        return self._files.move_in(upload) if upload.n_bytes else None
