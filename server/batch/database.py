"""The SQLite file of all jobs, and what its failures and the disk's are called."""

from __future__ import annotations

import errno
import sqlite3
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from sl_serve.errors import RequestError, SlServeError, UserError

SCHEMA_VERSION = 1
BUSY_S = 2.0  # how long another program's lock on the file is waited for

SCHEMA = """
CREATE TABLE owner (
    epoch INTEGER NOT NULL,  -- the number of the process that works here
    n_results INTEGER NOT NULL  -- that it has committed
);
INSERT INTO owner VALUES (0, 0);

CREATE TABLE files (
    seq INTEGER PRIMARY KEY AUTOINCREMENT,
    id TEXT NOT NULL UNIQUE,
    filename TEXT NOT NULL,  -- as the client calls it; never part of a path
    purpose TEXT NOT NULL,
    n_bytes INTEGER NOT NULL,
    sha256 TEXT NOT NULL,
    created_at INTEGER NOT NULL,  -- all *_at: unix seconds
    expires_at INTEGER
);

CREATE TABLE batches (
    seq INTEGER PRIMARY KEY AUTOINCREMENT,
    id TEXT NOT NULL UNIQUE,
    endpoint TEXT NOT NULL,
    input_file_id TEXT NOT NULL,
    completion_window TEXT NOT NULL,
    metadata TEXT,  -- JSON
    output_expires_s INTEGER,
    idempotency_key TEXT UNIQUE,
    fingerprint TEXT NOT NULL,  -- of what was asked for under that key
    seed INTEGER NOT NULL,
    status TEXT NOT NULL,
    outcome TEXT,  -- the status that finalizing leads to
    model TEXT,
    errors TEXT,  -- JSON
    created_at INTEGER NOT NULL,
    expires_at INTEGER NOT NULL,
    in_progress_at INTEGER,
    finalizing_at INTEGER,
    completed_at INTEGER,
    failed_at INTEGER,
    expired_at INTEGER,
    cancelling_at INTEGER,
    cancelled_at INTEGER,
    output_file_id TEXT,
    error_file_id TEXT,
    total INTEGER NOT NULL DEFAULT 0,
    completed INTEGER NOT NULL DEFAULT 0,
    failed INTEGER NOT NULL DEFAULT 0,
    input_tokens INTEGER NOT NULL DEFAULT 0,
    output_tokens INTEGER NOT NULL DEFAULT 0
);

CREATE TABLE lines (
    batch INTEGER NOT NULL REFERENCES batches (seq) ON DELETE CASCADE,
    line INTEGER NOT NULL,  -- from 1, as editors count
    offset INTEGER NOT NULL,  -- in the input file, in bytes, as length
    length INTEGER NOT NULL,
    custom_id TEXT NOT NULL,
    n_tokens INTEGER NOT NULL,  -- of the prompt
    state INTEGER NOT NULL DEFAULT 0,  -- lines.State
    attempts INTEGER NOT NULL DEFAULT 0,  -- without those that ended for another reason
    epoch INTEGER NOT NULL DEFAULT 0,  -- the owner that claimed it
    PRIMARY KEY (batch, line)
) WITHOUT ROWID;
CREATE INDEX lines_queued ON lines (batch, attempts DESC, n_tokens DESC, line) WHERE state = 0;

CREATE TABLE results (
    seq INTEGER PRIMARY KEY AUTOINCREMENT,  -- order of arrival
    batch INTEGER NOT NULL REFERENCES batches (seq) ON DELETE CASCADE,
    line INTEGER NOT NULL,
    ok INTEGER NOT NULL,  -- for the output file; 0: for the error file
    body BLOB NOT NULL,  -- the JSON line
    UNIQUE (batch, line)
);
"""


class StoreError(SlServeError):
    """The jobs folder fails, for now. `full`: for want of room."""

    def __init__(self, message: str, full: bool = False) -> None:
        super().__init__(message)
        self.full = full


class NotFoundError(RequestError):
    """There is no file or batch of this id."""


@contextmanager
def storage_errors() -> Iterator[None]:
    """Turns failures of SQLite and of the disk into StoreError."""
    try:
        yield
    except sqlite3.Error as error:
        code = getattr(error, "sqlite_errorcode", None)
        raise StoreError(f"the job database: {error}", code == sqlite3.SQLITE_FULL) from error
    except OSError as error:
        full = error.errno in (errno.ENOSPC, errno.EDQUOT)
        raise StoreError(f"the jobs folder: {error}", full) from error


class Database:
    """One connection, one thread at a time. Raises StoreError whenever the file cannot be used;
    then nothing of the transaction has happened."""

    def __init__(self, path: Path) -> None:
        """Raises StoreError, and UserError for a file of another version."""
        self._lock = threading.RLock()
        with storage_errors():
            self._connection = sqlite3.connect(
                path, timeout=BUSY_S, check_same_thread=False, isolation_level=None
            )
        try:
            with storage_errors():
                self._prepare(path)
        except Exception:
            self._connection.close()
            raise

    def _prepare(self, path: Path) -> None:
        self._connection.row_factory = sqlite3.Row
        self._connection.execute("PRAGMA journal_mode = WAL")
        self._connection.execute("PRAGMA synchronous = FULL")  # a commit is on the disk
        self._connection.execute("PRAGMA foreign_keys = ON")
        (version,) = self._connection.execute("PRAGMA user_version").fetchone()
        if version == 0:
            set_version = f"PRAGMA user_version = {SCHEMA_VERSION}"
            self._connection.executescript(f"BEGIN; {SCHEMA} {set_version}; COMMIT;")
        elif version != SCHEMA_VERSION:
            raise UserError(
                f"{path} has version {version} of the job tables, this program knows version "
                f"{SCHEMA_VERSION}; choose another jobs folder or the program that made it"
            )

    @contextmanager
    def transaction(self) -> Iterator[sqlite3.Connection]:
        """All or nothing, durable once left."""
        with self._lock, storage_errors():
            self._connection.execute("BEGIN IMMEDIATE")
            try:
                yield self._connection
                self._connection.execute("COMMIT")
            except BaseException:
                if self._connection.in_transaction:
                    self._connection.execute("ROLLBACK")
                raise

    def rows(self, query: str, *values: object) -> list[sqlite3.Row]:
        with self._lock, storage_errors():
            return self._connection.execute(query, values).fetchall()

    def close(self) -> None:
        with self._lock:
            self._connection.close()
