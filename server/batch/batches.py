"""The table of batches: made, looked at, cancelled, tried again; every change of state is here."""

from __future__ import annotations

import hashlib
import secrets
import sqlite3
from dataclasses import dataclass
from typing import Any

import orjson

from server.batch.clock import Clock
from server.batch.database import Database, NotFoundError
from server.batch.files import INPUT_PURPOSE, UNFINISHED_SQL, missing_file
from server.batch.records import BatchRecord, Status
from sl_serve.errors import RequestError

RETENTION_S = 30 * 24 * 3600  # of ended batches, as of files


@dataclass(frozen=True, slots=True, kw_only=True)
class BatchOrder:
    """What a client asks for, checked but for the file."""

    input_file_id: str
    endpoint: str
    completion_window: str
    window_s: int
    metadata: dict[str, str] | None = None
    output_expires_s: int | None = None
    idempotency_key: str | None = None
    seed: int | None = None

    def fingerprint(self) -> str:
        asked = (
            self.input_file_id,
            self.endpoint,
            self.completion_window,
            self.metadata,
            self.output_expires_s,
            self.seed,
        )
        return hashlib.sha256(orjson.dumps(asked, option=orjson.OPT_SORT_KEYS)).hexdigest()


class BatchConflictError(RequestError):
    """The batch is not in a state for this."""


class BatchTable:
    def __init__(self, database: Database, clock: Clock) -> None:
        self._database = database
        self._clock = clock

    def create(self, order: BatchOrder) -> BatchRecord:
        """The batch of the same idempotency key, if there is one; else a new one."""
        with self._database.transaction() as tx:
            if order.idempotency_key is not None:
                known = _one(tx, "idempotency_key = ?", order.idempotency_key)
                if known is not None:
                    return _same_order(known, order)
            row = tx.execute("SELECT purpose FROM files WHERE id = ?", (order.input_file_id,))
            file = row.fetchone()
            if file is None:
                raise missing_file(order.input_file_id)
            if file["purpose"] != INPUT_PURPOSE:
                raise RequestError(
                    f"File {order.input_file_id!r} has the purpose {file['purpose']!r}; a batch "
                    f"needs one uploaded with the purpose {INPUT_PURPOSE!r}.",
                    "input_file_id",
                )
            return self._insert(tx, order)

    def _insert(self, tx: sqlite3.Connection, order: BatchOrder) -> BatchRecord:
        now = int(self._clock())
        values: dict[str, Any] = {
            "id": f"batch_{secrets.token_hex(16)}",
            "endpoint": order.endpoint,
            "input_file_id": order.input_file_id,
            "completion_window": order.completion_window,
            "metadata": None if order.metadata is None else orjson.dumps(order.metadata).decode(),
            "output_expires_s": order.output_expires_s,
            "idempotency_key": order.idempotency_key,
            "fingerprint": order.fingerprint(),
            "seed": secrets.randbits(62) if order.seed is None else order.seed,
            "status": Status.VALIDATING,
            "created_at": now,
            "expires_at": now + order.window_s,
        }
        names, marks = ", ".join(values), ", ".join("?" * len(values))
        row = tx.execute(
            f"INSERT INTO batches ({names}) VALUES ({marks}) RETURNING *", tuple(values.values())
        ).fetchone()
        return BatchRecord.of(row)

    def get(self, batch_id: str) -> BatchRecord:
        """Raises NotFoundError."""
        rows = self._database.rows("SELECT * FROM batches WHERE id = ?", batch_id)
        if not rows:
            raise NotFoundError(
                f"There is no batch {batch_id[:100]!r}.", "batch_id", "batch_not_found"
            )
        return BatchRecord.of(rows[0])

    def page(self, limit: int, after: str | None) -> tuple[list[BatchRecord], bool]:
        """A page, newest first, and whether there is more."""
        start = None if after is None else self.get(after).seq
        rows = self._database.rows(
            "SELECT * FROM batches WHERE ?1 IS NULL OR seq < ?1 ORDER BY seq DESC LIMIT ?2",
            start,
            limit + 1,
        )
        return [BatchRecord.of(row) for row in rows[:limit]], len(rows) > limit

    def in_state(self, *states: Status) -> list[BatchRecord]:
        """Oldest first."""
        marks = ", ".join("?" * len(states))
        rows = self._database.rows(
            f"SELECT * FROM batches WHERE status IN ({marks}) ORDER BY seq", *states
        )
        return [BatchRecord.of(row) for row in rows]

    def count_by_status(self) -> dict[str, int]:
        rows = self._database.rows("SELECT status, count(*) AS n FROM batches GROUP BY status")
        return {row["status"]: row["n"] for row in rows}

    def cancel(self, batch_id: str) -> BatchRecord:
        """A second time is no error; a batch that has ended or is ending raises."""
        now = int(self._clock())
        with self._database.transaction() as tx:
            batch = self.get(batch_id)
            if batch.status in (Status.CANCELLING, Status.CANCELLED):
                return batch
            if batch.status not in (Status.VALIDATING, Status.IN_PROGRESS):
                raise BatchConflictError(
                    f"Batch {batch_id!r} is {batch.status}; only one that is validating or in "
                    "progress can be cancelled.",
                    "batch_id",
                    "batch_not_cancellable",
                )
            return _change(
                tx,
                batch,
                status=Status.CANCELLING,
                outcome=Status.CANCELLED,
                cancelling_at=now,
            )

    def retry(self, batch_id: str, window_s: int) -> BatchRecord:
        """Queue again the lines that have no good answer, with a new completion window."""
        with self._database.transaction() as tx:
            batch = self.get(batch_id)
            if not batch.is_finished or batch.total == 0 or batch.failed == 0:
                raise BatchConflictError(
                    f"Batch {batch_id!r} is {batch.status} with {batch.failed} failed or "
                    "unfinished lines; only an ended batch that has some can be tried again.",
                    "batch_id",
                    "batch_not_retryable",
                )
            if not tx.execute(
                "SELECT 1 FROM files WHERE id = ?", (batch.input_file_id,)
            ).fetchone():
                raise missing_file(batch.input_file_id)
            tx.execute("DELETE FROM results WHERE batch = ? AND ok = 0", (batch.seq,))
            tx.execute(
                "UPDATE lines SET state = 0, attempts = 0 WHERE batch = ?1 AND line NOT IN "
                "(SELECT line FROM results WHERE batch = ?1)",
                (batch.seq,),
            )
            return _change(
                tx,
                batch,
                status=Status.IN_PROGRESS,
                outcome=None,
                failed=0,
                expires_at=int(self._clock()) + window_s,
                output_file_id=None,
                error_file_id=None,
                **dict.fromkeys(
                    (
                        "finalizing_at",
                        "completed_at",
                        "expired_at",
                        "cancelling_at",
                        "cancelled_at",
                    )
                ),
            )

    def begin(self, batch: BatchRecord, model: str, total: int) -> None:
        """After validation; unless it was cancelled meanwhile."""
        with self._database.transaction() as tx:
            if _status(tx, batch) is Status.VALIDATING:
                _change(
                    tx,
                    batch,
                    status=Status.IN_PROGRESS,
                    in_progress_at=int(self._clock()),
                    model=model,
                    total=total,
                )

    def refuse(self, batch: BatchRecord, errors: list[dict[str, Any]]) -> None:
        """Validation found errors."""
        listed = orjson.dumps({"object": "list", "data": errors}).decode()
        with self._database.transaction() as tx:
            tx.execute("DELETE FROM lines WHERE batch = ?", (batch.seq,))
            if _status(tx, batch) is Status.VALIDATING:
                _change(
                    tx,
                    batch,
                    status=Status.FAILED,
                    failed_at=int(self._clock()),
                    errors=listed,
                )

    def expire(self) -> None:
        """Ends what has run out of time."""
        now = int(self._clock())
        with self._database.transaction() as tx:
            tx.execute(
                "UPDATE batches SET status = 'finalizing', outcome = 'expired', finalizing_at = ?1 "
                "WHERE status IN ('validating', 'in_progress') AND expires_at <= ?1",
                (now,),
            )

    def conclude(
        self,
        tx: sqlite3.Connection,
        batch: BatchRecord,
        output_file_id: str | None,
        error_file_id: str | None,
    ) -> None:
        """The files are written: the state that was decided before."""
        assert batch.outcome is not None
        _change(
            tx,
            batch,
            status=batch.outcome,
            output_file_id=output_file_id,
            error_file_id=error_file_id,
            **{f"{batch.outcome}_at": int(self._clock())},
        )

    def delete_old(self) -> None:
        """Batches that ended long ago, with their lines and results."""
        ended = "coalesce(completed_at, failed_at, expired_at, cancelled_at)"
        with self._database.transaction() as tx:
            tx.execute(
                f"DELETE FROM batches WHERE status NOT IN {UNFINISHED_SQL} AND {ended} <= ?",
                (int(self._clock()) - RETENTION_S,),
            )


def _same_order(known: BatchRecord, order: BatchOrder) -> BatchRecord:
    if known.fingerprint != order.fingerprint():
        raise BatchConflictError(
            f"The Idempotency-Key was used for another request, batch {known.id!r}; "
            "send a new key or the same request.",
            "Idempotency-Key",
            "idempotency_key_reused",
        )
    return known


def _one(tx: sqlite3.Connection, where: str, value: object) -> BatchRecord | None:
    row = tx.execute(f"SELECT * FROM batches WHERE {where}", (value,)).fetchone()
    return None if row is None else BatchRecord.of(row)


def _status(tx: sqlite3.Connection, batch: BatchRecord) -> Status:
    row = tx.execute("SELECT status FROM batches WHERE seq = ?", (batch.seq,)).fetchone()
    return Status(row["status"])


def _change(tx: sqlite3.Connection, batch: BatchRecord, **values: object) -> BatchRecord:
    names = ", ".join(f"{name} = ?" for name in values)
    row = tx.execute(
        f"UPDATE batches SET {names} WHERE seq = ? RETURNING *", (*values.values(), batch.seq)
    ).fetchone()
    return BatchRecord.of(row)
