"""The tables of lines and results: what waits, what runs, what has ended."""

from __future__ import annotations

import sqlite3
from collections.abc import Collection, Iterator, Mapping, Sequence
from dataclasses import dataclass
from enum import IntEnum

from server.batch.clock import Clock
from server.batch.database import Database
from server.batch.records import BatchRecord, Status
from sl_serve.errors import RequestError

PAGE_ROWS = 200


class State(IntEnum):
    QUEUED = 0
    RUNNING = 1
    DONE = 2


@dataclass(frozen=True, slots=True)
class CheckedLine:
    """A line that validation has found to be good. Offset and length in bytes of the file."""

    line: int
    offset: int
    length: int
    custom_id: str
    n_tokens: int


@dataclass(frozen=True, slots=True)
class ClaimedLine:
    """A line that is to be run now. `attempts` counts this one."""

    batch: int
    line: int
    offset: int
    length: int
    custom_id: str
    n_tokens: int
    attempts: int


@dataclass(frozen=True, slots=True)
class LineResult:
    """How a line ended: `body` is its JSON line in the output file, or in the error file."""

    batch: int
    line: int
    ok: bool
    body: bytes
    input_tokens: int = 0
    output_tokens: int = 0


class LineTable:
    """`epoch` is this owner's number: lines claimed under an older one died with their owner."""

    def __init__(self, database: Database, clock: Clock) -> None:
        self._database = database
        self._clock = clock
        self._epoch = 0

    def take_over(self) -> int:
        """Queue again whatever an earlier owner left running; how many lines that were.

        They are suspects only if that owner died before it had ended a single line: whatever else
        kills processes spares most of them long enough, and a line that kills them all is found
        when no other is left.
        """
        with self._database.transaction() as tx:
            row = tx.execute("SELECT epoch, n_results FROM owner").fetchone()
            self._epoch, innocent = row["epoch"] + 1, row["n_results"] > 0
            tx.execute("UPDATE owner SET epoch = ?, n_results = 0", (self._epoch,))
            return tx.execute(
                "UPDATE lines SET state = 0, attempts = attempts - ? WHERE state = 1 AND epoch < ?",
                (innocent, self._epoch),
            ).rowcount

    def forget(self, batch: BatchRecord) -> None:
        """Before validation begins again."""
        with self._database.transaction() as tx:
            tx.execute("DELETE FROM lines WHERE batch = ?", (batch.seq,))

    def add(self, batch: BatchRecord, lines: Sequence[CheckedLine]) -> None:
        with self._database.transaction() as tx:
            tx.executemany(
                "INSERT INTO lines (batch, line, offset, length, custom_id, n_tokens) "
                "VALUES (?, ?, ?, ?, ?, ?)",
                [(batch.seq, c.line, c.offset, c.length, c.custom_id, c.n_tokens) for c in lines],
            )

    def batches_with_queued(self) -> list[BatchRecord]:
        """Those in progress, oldest first."""
        rows = self._database.rows(
            "SELECT * FROM batches WHERE status = 'in_progress' AND EXISTS "
            "(SELECT 1 FROM lines WHERE batch = batches.seq AND state = 0) ORDER BY seq"
        )
        return [BatchRecord.of(row) for row in rows]

    def suspects(self, attempts: int) -> int | None:
        """A batch with waiting lines that were tried so often; None if there is none."""
        rows = self._database.rows(
            "SELECT seq FROM batches WHERE status = 'in_progress' AND (SELECT attempts FROM lines "
            "WHERE batch = seq AND state = 0 ORDER BY attempts DESC, n_tokens DESC, line LIMIT 1) "
            ">= ? ORDER BY seq LIMIT 1",
            attempts,
        )
        return rows[0]["seq"] if rows else None

    def turn(
        self,
        results: Sequence[LineResult],
        released: Sequence[ClaimedLine],
        failed_attempts: Sequence[ClaimedLine],
        shares: Mapping[int, int],
    ) -> list[ClaimedLine]:
        """One transaction: results are kept, lines are put back, new ones are claimed.

        `released` never had their chance; `failed_attempts` count. `shares`: lines by batch.
        What was tried before comes first, then the longest prompts: neighbours in time are of like
        length, and what is left for the end is short.
        """
        with self._database.transaction() as tx:
            self._keep(tx, results)
            self._put_back(tx, released, 1)
            self._put_back(tx, failed_attempts, 0)
            claimed = [c for batch, n in shares.items() for c in self._claim(tx, batch, n)]
        return sorted(claimed, key=lambda c: (-c.n_tokens, c.batch, c.line))

    def _keep(self, tx: sqlite3.Connection, results: Sequence[LineResult]) -> None:
        """The first result of a line stands."""
        for result in results:
            inserted = tx.execute(
                "INSERT INTO results (batch, line, ok, body) VALUES (?, ?, ?, ?) "
                "ON CONFLICT (batch, line) DO NOTHING",
                (result.batch, result.line, result.ok, result.body),
            ).rowcount
            if not inserted:
                continue
            tx.execute(
                "UPDATE lines SET state = 2 WHERE batch = ? AND line = ?",
                (result.batch, result.line),
            )
            tx.execute(
                "UPDATE batches SET completed = completed + ?, failed = failed + ?, "
                "input_tokens = input_tokens + ?, output_tokens = output_tokens + ? WHERE seq = ?",
                (
                    result.ok,
                    not result.ok,
                    result.input_tokens,
                    result.output_tokens,
                    result.batch,
                ),
            )
        if results:
            tx.execute("UPDATE owner SET n_results = n_results + ?", (len(results),))
            tx.execute(
                "UPDATE batches SET status = 'finalizing', outcome = 'completed', "
                "finalizing_at = ? WHERE status = 'in_progress' AND completed + failed >= total",
                (int(self._clock()),),
            )

    def _put_back(
        self, tx: sqlite3.Connection, lines: Sequence[ClaimedLine], attempts: int
    ) -> None:
        """Unless the owner has changed or the line has ended."""
        tx.executemany(
            "UPDATE lines SET state = 0, attempts = attempts - ? "
            "WHERE batch = ? AND line = ? AND state = 1 AND epoch = ?",
            [(attempts, c.batch, c.line, self._epoch) for c in lines],
        )

    def _claim(self, tx: sqlite3.Connection, batch: int, n: int) -> list[ClaimedLine]:
        rows = tx.execute(
            "UPDATE lines SET state = 1, attempts = attempts + 1, epoch = ?1 "
            "WHERE batch = ?2 AND line IN (SELECT line FROM lines WHERE batch = ?2 AND state = 0 "
            "ORDER BY attempts DESC, n_tokens DESC, line LIMIT ?3) AND EXISTS "
            "(SELECT 1 FROM batches WHERE seq = ?2 AND status = 'in_progress') "
            "RETURNING batch, line, offset, length, custom_id, n_tokens, attempts",
            (self._epoch, batch, n),
        ).fetchall()
        return [ClaimedLine(*row) for row in rows]

    def without_result(self, batch: BatchRecord) -> Iterator[tuple[int, str]]:
        """Lines and their custom ids, in pages."""
        last = 0
        while rows := self._database.rows(
            "SELECT line, custom_id FROM lines WHERE batch = ? AND state <> 2 AND line > ? "
            "ORDER BY line LIMIT ?",
            batch.seq,
            last,
            PAGE_ROWS,
        ):
            yield from ((row["line"], row["custom_id"]) for row in rows)
            last = rows[-1]["line"]

    def results_in_order(self, batch: BatchRecord, ok: bool) -> Iterator[bytes]:
        """JSON lines in the order of the input, in pages."""
        last = 0
        while rows := self._database.rows(
            "SELECT line, body FROM results WHERE batch = ? AND ok = ? AND line > ? "
            "ORDER BY line LIMIT ?",
            batch.seq,
            ok,
            last,
            PAGE_ROWS,
        ):
            yield from (row["body"] for row in rows)
            last = rows[-1]["line"]

    def cursor(self, batch: BatchRecord, line: int) -> int:
        """Where the results after this line's begin. Raises RequestError if it has none."""
        rows = self._database.rows(
            "SELECT seq FROM results WHERE batch = ? AND line = ?", batch.seq, line
        )
        if not rows:
            raise RequestError(
                f"'after' names line {line} of batch {batch.id!r}, which has no result.", "after"
            )
        return int(rows[0]["seq"])

    def results_after(self, batch: BatchRecord, cursor: int) -> list[sqlite3.Row]:
        """The next page in the order of arrival: seq and body."""
        return self._database.rows(
            "SELECT seq, body FROM results WHERE batch = ? AND seq > ? ORDER BY seq LIMIT ?",
            batch.seq,
            cursor,
            PAGE_ROWS,
        )

    def may_run(self, batches: Collection[int]) -> set[int]:
        """Those of them that are in progress."""
        known = ", ".join(map(str, batches))
        rows = self._database.rows(
            f"SELECT seq FROM batches WHERE seq IN ({known}) AND status = ?", Status.IN_PROGRESS
        )
        return {row["seq"] for row in rows}
