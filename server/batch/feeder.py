"""The thread that keeps the engine's rows busy with lines, and commits what comes back."""

from __future__ import annotations

import heapq
import threading
import time
from collections import Counter, deque
from collections.abc import Callable, Iterable, Mapping
from contextlib import ExitStack
from typing import BinaryIO

import structlog

from server.batch.database import StoreError
from server.batch.files import FileStore
from server.batch.lines import ClaimedLine, LineResult, LineTable
from server.batch.metrics import BatchMetrics
from server.batch.pace import Pace
from server.batch.records import BatchRecord
from server.batch.render import CRASHED, answered, never_ran, refused
from server.batch.running import RunningLine
from server.batch.translate import Translator, line_seed
from server.engine_port import EnginePort
from server.errors import ApiError, from_engine, internal_error
from sl_serve.core import FinishReason
from sl_serve.errors import EngineClosedError, EngineDeadError, QueueFullError, RequestError
from sl_serve.stats import EngineState

log = structlog.get_logger(__name__)

ROWS_IN_FLIGHT = 2  # times the engine's rows: one set runs while the next one waits its turn
MAX_ATTEMPTS = 3  # that end with a failure; then the line is to blame
GROUP_S = 0.05  # results of this long are one transaction
POLL_S = 0.5
RETRY_S = 2.0  # after the disk or the database failed


class Feeder:
    """Owns the lines in flight. Everything but `wake`, `holds` and `stop` is its own thread's."""

    def __init__(
        self,
        engine: EnginePort,
        translator: Translator,
        files: FileStore,
        lines: LineTable,
        pace: Pace,
        metrics: BatchMetrics,
        wind_down_s: float,
        on_turn: Callable[[], None],
    ) -> None:
        """`wind_down_s`: how long lines that are aborted at the end may take. `on_turn` hears of
        every turn in which lines ended."""
        self._engine = engine
        self._translator = translator
        self._files = files
        self._lines = lines
        self._pace = pace
        self._metrics = metrics
        self._wind_down_s = wind_down_s
        self._on_turn = on_turn
        self._running: dict[tuple[int, int], RunningLine] = {}
        self._ended: deque[RunningLine] = deque()  # filled by the engine's thread
        self._results: list[LineResult] = []
        self._released: list[ClaimedLine] = []
        self._failed: list[ClaimedLine] = []
        self._unreadable: dict[int, float] = {}  # batch -> monotonic time of the next try
        self._wake = threading.Event()
        self._stopping = threading.Event()
        self._thread = threading.Thread(target=self._run, name="sl-serve-feeder", daemon=True)

    def start(self) -> None:
        self._thread.start()

    def wake(self) -> None:
        """There may be something to do."""
        self._wake.set()

    def holds(self, batch: int) -> bool:
        return any(key[0] == batch for key in list(self._running))

    def stop(self) -> None:
        """Feed no more; lines in flight are aborted and put back. Returns at once."""
        self._stopping.set()
        self._wake.set()

    def join(self, timeout_s: float) -> None:
        if self._thread.is_alive():
            self._thread.join(timeout_s)

    def _run(self) -> None:
        while not self._stopping.is_set():
            self._wake.wait(POLL_S)
            self._wake.clear()
            self._stopping.wait(GROUP_S if self._guarded(self._turn) else RETRY_S)
        self._guarded(self._wind_down)

    def _guarded(self, work: Callable[[], None]) -> bool:
        """False where it failed; what was not committed is kept for the next time."""
        try:
            work()
        except StoreError as error:
            log.error("batch_store_failed", reason=str(error))
            return False
        except Exception:
            log.exception("batch_feeder_failed")
            return False
        return True

    def _turn(self) -> None:
        self._collect()
        batches = self._hungry()
        claimed = self._commit(self._wanted(batches))
        self._start_lines(claimed, batches)
        self._abort_strangers()

    def _collect(self) -> None:
        while self._ended:
            line = self._ended.popleft()
            del self._running[line.claim.batch, line.claim.line]
            self._settle(line)

    def _settle(self, line: RunningLine) -> None:
        if line.failure is None:
            self._results.append(self._answer(line))
        elif line.failure.finish_reason is FinishReason.ABORT:
            self._released.append(line.claim)
        elif self._engine.snapshot().state in (EngineState.RUNNING, EngineState.DRAINING):
            log.warning("batch_line_failed", line=line.claim.line, reason=line.failure.error)
            self._failed.append(line.claim)
        elif self._stopping.is_set():
            self._released.append(line.claim)
        # else the engine died of it or beside it: the claim stands, and counts for whoever opens
        # the folder next

    def _answer(self, line: RunningLine) -> LineResult:
        try:
            answer = self._translator.dialect(line.batch.endpoint).collect(
                line.work, line.outputs()
            )
        except Exception:
            log.exception("batch_answer_failed", line=line.claim.line)
            return refused(line.claim, line.batch.id, internal_error())
        usage = line.work.usage(line.n_completion_tokens)
        return answered(line.claim, line.batch.id, answer | {"usage": usage})

    def _hungry(self) -> dict[int, BatchRecord]:
        """Batches with lines that wait, by number."""
        if self._stopping.is_set() or self._engine.snapshot().state is not EngineState.RUNNING:
            return {}
        now_s = time.monotonic()
        self._unreadable = {b: s for b, s in self._unreadable.items() if s > now_s}
        waiting = self._lines.batches_with_queued()
        return {b.seq: b for b in waiting if b.seq not in self._unreadable}

    def _wanted(self, batches: Mapping[int, BatchRecord]) -> dict[int, int]:
        """Lines to be claimed, by batch. One on its last attempt runs alone, so that no other is
        blamed for what it does."""
        suspect = self._lines.suspects(MAX_ATTEMPTS - 1) if batches else None
        if suspect is not None:
            return {suspect: 1} if suspect in batches and not self._running else {}
        in_flight = self._in_flight()
        room = ROWS_IN_FLIGHT * self._engine.max_rows - in_flight.total()
        return shares(room, batches, in_flight)

    def _in_flight(self) -> Counter[int]:
        """Engine requests by batch."""
        count: Counter[int] = Counter()
        for line in self._running.values():
            count[line.claim.batch] += len(line.work.choices)
        return count

    def _commit(self, wanted: Mapping[int, int]) -> list[ClaimedLine]:
        if not (self._results or self._released or self._failed or wanted):
            return []
        claimed = self._lines.turn(self._results, self._released, self._failed, wanted)
        self._report()
        self._results, self._released, self._failed = [], [], []
        return claimed

    def _report(self) -> None:
        for result in self._results:
            self._metrics.line_ended(result.ok)
            self._pace.ended(result.batch, 1, result.input_tokens + result.output_tokens)
        if self._results or self._released:
            self._on_turn()

    def _start_lines(
        self, claimed: Iterable[ClaimedLine], batches: Mapping[int, BatchRecord]
    ) -> None:
        with ExitStack() as stack:
            inputs: dict[int, BinaryIO] = {}
            for claim in claimed:
                batch = batches[claim.batch]
                self._pace.started(batch.seq)
                try:
                    if batch.seq not in inputs:
                        path = self._files.path(batch.input_file_id)
                        inputs[batch.seq] = stack.enter_context(path.open("rb"))
                    raw = _read(inputs[batch.seq], claim)
                except OSError as error:
                    log.error("batch_input_unreadable", batch=batch.id, reason=str(error))
                    self._unreadable[batch.seq] = time.monotonic() + RETRY_S
                    self._released.append(claim)
                    continue
                self._start_line(claim, batch, raw)

    def _start_line(self, claim: ClaimedLine, batch: BatchRecord, raw: bytes) -> None:
        if claim.attempts > MAX_ATTEMPTS:
            failure = never_ran(batch.seq, batch.id, claim.line, claim.custom_id, CRASHED)
            self._results.append(failure)
            self._wake.set()
            return
        key = (claim.batch, claim.line)
        try:
            body = self._translator.parse(raw)["body"]
            seed = line_seed(batch.seed, claim.custom_id)
            work = self._translator.work(batch.endpoint, body, seed)
            line = RunningLine(claim, batch, work, self._engine, self._line_ended)
            self._running[key] = line  # before it can end
            line.submit()
        except (RequestError, ApiError) as error:
            self._running.pop(key, None)
            answer = error if isinstance(error, ApiError) else from_engine(error)
            self._results.append(refused(claim, batch.id, answer))
            self._wake.set()
        except (QueueFullError, EngineClosedError, EngineDeadError):
            self._running.pop(key, None)
            self._released.append(claim)
        except Exception:
            log.exception("batch_line_failed", line=claim.line)
            self._running.pop(key, None)
            self._failed.append(claim)

    def _line_ended(self, line: RunningLine) -> None:
        """On the engine's thread."""
        self._ended.append(line)
        self._wake.set()

    def _abort_strangers(self) -> None:
        """Lines of batches that were cancelled or have expired."""
        batches = {key[0] for key in self._running}
        strangers = batches - self._lines.may_run(batches) if batches else set()
        for line in list(self._running.values()):
            if line.claim.batch in strangers:
                line.abort()

    def _wind_down(self) -> None:
        """Ends what runs, within the time there is, and puts back what has no result."""
        for line in list(self._running.values()):
            line.abort()
        limit_s = time.monotonic() + self._wind_down_s
        self._collect()
        while self._running and time.monotonic() < limit_s:
            self._wake.wait(GROUP_S)
            self._wake.clear()
            self._collect()
        self._released += [line.claim for line in self._running.values()]
        self._running.clear()
        self._commit({})


def _read(file: BinaryIO, claim: ClaimedLine) -> bytes:
    file.seek(claim.offset)
    raw = file.read(claim.length)
    if len(raw) < claim.length:
        raise OSError(f"line {claim.line} is cut off")
    return raw


def shares(room: int, batches: Iterable[int], in_flight: Mapping[int, int]) -> dict[int, int]:
    """How many lines each batch may add: always to the one that has fewest in flight."""
    heap = [(in_flight.get(batch, 0), batch) for batch in batches]
    heapq.heapify(heap)
    wanted: Counter[int] = Counter()
    for _ in range(room if heap else 0):
        n, batch = heap[0]
        wanted[batch] += 1
        heapq.heapreplace(heap, (n + 1, batch))
    return dict(wanted)
