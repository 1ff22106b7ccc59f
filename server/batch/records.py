"""Rows of the tables as objects, and as OpenAI shows them."""

from __future__ import annotations

import sqlite3
from dataclasses import dataclass
from enum import StrEnum
from typing import Any

import orjson


class Status(StrEnum):
    VALIDATING = "validating"
    FAILED = "failed"  # validation found errors; nothing ran
    IN_PROGRESS = "in_progress"
    FINALIZING = "finalizing"  # all lines have ended; the files are being written
    COMPLETED = "completed"
    EXPIRED = "expired"
    CANCELLING = "cancelling"
    CANCELLED = "cancelled"


UNFINISHED = (Status.VALIDATING, Status.IN_PROGRESS, Status.FINALIZING, Status.CANCELLING)


@dataclass(frozen=True, slots=True)
class FileRecord:
    seq: int
    id: str
    filename: str
    purpose: str
    n_bytes: int
    sha256: str
    created_at: int
    expires_at: int | None

    @classmethod
    def of(cls, row: sqlite3.Row) -> FileRecord:
        return cls(**dict(row))

    def as_object(self) -> dict[str, Any]:
        return {
            "id": self.id,
            "object": "file",
            "bytes": self.n_bytes,
            "created_at": self.created_at,
            "expires_at": self.expires_at,
            "filename": self.filename,
            "purpose": self.purpose,
            "status": "processed",
            "status_details": None,
        }


@dataclass(frozen=True, slots=True)
class BatchRecord:
    seq: int
    id: str
    endpoint: str
    input_file_id: str
    completion_window: str
    metadata: str | None
    output_expires_s: int | None
    idempotency_key: str | None
    fingerprint: str
    seed: int
    status: Status
    outcome: Status | None
    model: str | None
    errors: str | None
    created_at: int
    expires_at: int
    in_progress_at: int | None
    finalizing_at: int | None
    completed_at: int | None
    failed_at: int | None
    expired_at: int | None
    cancelling_at: int | None
    cancelled_at: int | None
    output_file_id: str | None
    error_file_id: str | None
    total: int
    completed: int
    failed: int
    input_tokens: int
    output_tokens: int

    @classmethod
    def of(cls, row: sqlite3.Row) -> BatchRecord:
        values = dict(row)
        outcome = values["outcome"]
        values["status"] = Status(values["status"])
        values["outcome"] = None if outcome is None else Status(outcome)
        return cls(**values)

    @property
    def is_finished(self) -> bool:
        return self.status not in UNFINISHED

    def as_object(self) -> dict[str, Any]:
        return {
            "id": self.id,
            "object": "batch",
            "endpoint": self.endpoint,
            "model": self.model,
            "errors": None if self.errors is None else orjson.loads(self.errors),
            "input_file_id": self.input_file_id,
            "completion_window": self.completion_window,
            "status": self.status,
            "output_file_id": self.output_file_id,
            "error_file_id": self.error_file_id,
            "created_at": self.created_at,
            "in_progress_at": self.in_progress_at,
            "expires_at": self.expires_at,
            "finalizing_at": self.finalizing_at,
            "completed_at": self.completed_at,
            "failed_at": self.failed_at,
            "expired_at": self.expired_at,
            "cancelling_at": self.cancelling_at,
            "cancelled_at": self.cancelled_at,
            "request_counts": {
                "total": self.total,
                "completed": self.completed,
                "failed": self.failed,
            },
            "usage": self._usage(),
            "metadata": None if self.metadata is None else orjson.loads(self.metadata),
        }

    def _usage(self) -> dict[str, Any]:
        return {
            "input_tokens": self.input_tokens,
            "input_tokens_details": {"cached_tokens": 0},
            "output_tokens": self.output_tokens,
            "output_tokens_details": {"reasoning_tokens": 0},
            "total_tokens": self.input_tokens + self.output_tokens,
        }
