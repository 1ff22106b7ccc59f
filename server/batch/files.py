"""Files on the disk and their rows. A name on the disk is a digest of a random id of ours."""

from __future__ import annotations

import hashlib
import os
import secrets
import sqlite3
from collections.abc import Sequence
from contextlib import suppress
from pathlib import Path
from types import TracebackType
from typing import BinaryIO

from server.batch.clock import Clock
from server.batch.database import Database, NotFoundError, StoreError, storage_errors
from server.batch.records import UNFINISHED, FileRecord
from sl_serve.errors import RequestError, UserError

INPUT_PURPOSE, OUTPUT_PURPOSE = "batch", "batch_output"
MAX_INPUT_BYTES = 200 * 2**20
DEFAULT_EXPIRY_S = 30 * 24 * 3600  # OpenAI's, for files of batches
SHORTEST_EXPIRY_S, LONGEST_EXPIRY_S = 3600, 30 * 24 * 3600  # that may be asked for
MAX_FILENAME_CHARS = 255
MAX_ROWS = 10_000  # of a list
PARTIAL = ".part"
COPY_BYTES = 2**20


class FileTooLargeError(UserError):
    """An input over the limit."""


def missing_file(file_id: str) -> NotFoundError:
    """The same for a file that never was and one that is gone."""
    return NotFoundError(f"There is no file {file_id[:100]!r}.", "file_id", "file_not_found")


class FileStore:
    """`folder` exists. Raises StoreError where disk or database fail; `full` over the quota too."""

    def __init__(
        self, database: Database, folder: Path, clock: Clock, quota_bytes: int | None = None
    ) -> None:
        self._database = database
        self._folder = folder
        self._clock = clock
        self._quota_bytes = quota_bytes

    def begin(self, max_bytes: int | None = None, within_quota: bool = True) -> Upload:
        """A new file, to be written and then kept."""
        room = None
        if within_quota and self._quota_bytes is not None:
            room = self._quota_bytes - self._used_bytes()
        with storage_errors():
            path = self._folder / (secrets.token_hex(16) + PARTIAL)
            return Upload(path, max_bytes, room)

    def keep(
        self, upload: Upload, filename: str, purpose: str, expires_s: int | None = DEFAULT_EXPIRY_S
    ) -> FileRecord:
        """Its bytes and its name are on the disk when this returns."""
        file_id = self.move_in(upload)
        with self._database.transaction() as tx:
            record = self.insert(tx, file_id, upload, filename, purpose, expires_s)
        upload.kept = True
        return record

    def move_in(self, upload: Upload) -> str:
        """The id under which the bytes now lie; nobody knows it until a row says so."""
        file_id = f"file-{secrets.token_hex(16)}"
        with storage_errors():
            upload.finish()
            os.replace(upload.path, self.path(file_id))
            upload.path = self.path(file_id)
            sync_folder(self._folder)
        return file_id

    def insert(
        self,
        tx: sqlite3.Connection,
        file_id: str,
        upload: Upload,
        filename: str,
        purpose: str,
        expires_s: int | None,
    ) -> FileRecord:
        now = int(self._clock())
        expires_at = None if expires_s is None else now + expires_s
        values = (file_id, filename[:MAX_FILENAME_CHARS], purpose, upload.n_bytes, upload.sha256)
        row = tx.execute(
            "INSERT INTO files (id, filename, purpose, n_bytes, sha256, created_at, expires_at) "
            "VALUES (?, ?, ?, ?, ?, ?, ?) RETURNING *",
            (*values, now, expires_at),
        ).fetchone()
        return FileRecord.of(row)

    def get(self, file_id: str) -> FileRecord:
        """Raises NotFoundError."""
        rows = self._database.rows("SELECT * FROM files WHERE id = ?", file_id)
        if not rows:
            raise missing_file(file_id)
        return FileRecord.of(rows[0])

    def path(self, file_id: str) -> Path:
        return self._folder / f"{hashlib.sha256(file_id.encode()).hexdigest()}.jsonl"

    def page(
        self, limit: int, after: str | None, newest_first: bool, purpose: str | None
    ) -> tuple[list[FileRecord], bool]:
        """A page, and whether there is more."""
        start = None if after is None else self.get(after).seq
        beyond, order = ("<", "DESC") if newest_first else (">", "ASC")
        rows = self._database.rows(
            f"SELECT * FROM files WHERE (?1 IS NULL OR seq {beyond} ?1) "
            f"AND (?2 IS NULL OR purpose = ?2) ORDER BY seq {order} LIMIT ?3",
            start,
            purpose,
            limit + 1,
        )
        return [FileRecord.of(row) for row in rows[:limit]], len(rows) > limit

    def delete(self, file_id: str) -> None:
        """Raises NotFoundError, and RequestError for one that an unfinished batch reads."""
        self.get(file_id)
        with self._database.transaction() as tx:
            if user := self._user_of(tx, file_id):
                raise RequestError(
                    f"File {file_id!r} is the input of batch {user!r}, which has not ended; "
                    "cancel the batch first.",
                    "file_id",
                    "file_in_use",
                )
            tx.execute("DELETE FROM files WHERE id = ?", (file_id,))
        with storage_errors():  # a crash before this leaves an orphan for `sweep`
            self.path(file_id).unlink(missing_ok=True)

    def _user_of(self, tx: sqlite3.Connection, file_id: str) -> str | None:
        row = tx.execute(
            f"SELECT id FROM batches WHERE input_file_id = ? AND status IN {UNFINISHED_SQL}",
            (file_id,),
        ).fetchone()
        return None if row is None else str(row["id"])

    def delete_expired(self) -> None:
        """Those that an unfinished batch reads stay until it has ended."""
        rows = self._database.rows(
            "SELECT id FROM files WHERE expires_at <= ? AND id NOT IN "
            f"(SELECT input_file_id FROM batches WHERE status IN {UNFINISHED_SQL})",
            int(self._clock()),
        )
        for row in rows:
            self.delete(row["id"])

    def sweep(self) -> None:
        """Removes what a crash left without a row. Only while nobody writes."""
        known = {self.path(row["id"]).name for row in self._database.rows("SELECT id FROM files")}
        with storage_errors():
            for path in self._folder.iterdir():
                if path.name not in known:
                    path.unlink()

    def _used_bytes(self) -> int:
        (row,) = self._database.rows("SELECT coalesce(sum(n_bytes), 0) AS used FROM files")
        return int(row["used"])


class Upload:
    """A file that is being written; gone at the end of its block unless it was kept."""

    def __init__(self, path: Path, max_bytes: int | None, room_bytes: int | None) -> None:
        self.path = path
        self.n_bytes = 0
        self.kept = False  # its row is in the database
        self._max_bytes = max_bytes
        self._room_bytes = room_bytes
        self._digest = hashlib.sha256()
        self._file: BinaryIO = path.open("xb")

    @property
    def sha256(self) -> str:
        return self._digest.hexdigest()

    def write(self, data: bytes) -> None:
        """Raises FileTooLargeError over the limit, StoreError for a full disk."""
        self.n_bytes += len(data)
        if self._max_bytes is not None and self.n_bytes > self._max_bytes:
            raise FileTooLargeError(
                f"The file is over the limit of {self._max_bytes:,} bytes; split it."
            )
        if self._room_bytes is not None and self.n_bytes > self._room_bytes:
            raise StoreError("the jobs folder: its quota is used up", full=True)
        self._digest.update(data)
        with storage_errors():
            self._file.write(data)

    def copy(self, source: Path) -> None:
        with source.open("rb") as file:
            while chunk := file.read(COPY_BYTES):
                self.write(chunk)

    def finish(self) -> None:
        with self._file:
            self._file.flush()
            os.fsync(self._file.fileno())

    def __enter__(self) -> Upload:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        if not self.kept:
            with suppress(OSError):  # a full disk, once more: the bytes go with the file
                self._file.close()
            with storage_errors():
                self.path.unlink(missing_ok=True)


def sync_folder(folder: Path) -> None:
    """A new name in it is on the disk when this returns."""
    descriptor = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def _sql_list(values: Sequence[str]) -> str:
    return "(" + ", ".join(f"'{value}'" for value in values) + ")"


UNFINISHED_SQL = _sql_list(UNFINISHED)
