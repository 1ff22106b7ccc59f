"""A batch service without HTTP, input files for it, and what came of them."""

from __future__ import annotations

import json
import time
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any

from server.batch.batches import BatchOrder
from server.batch.clock import Clock
from server.batch.records import BatchRecord, FileRecord
from server.batch.service import BatchService
from server.context import ServerContext
from server.settings import ServerSettings
from tests.server.fake_engine import FakeEngine

COMPLETIONS = "/v1/completions"
CHAT = "/v1/chat/completions"
HOUR_S = 3600
SETTINGS = ServerSettings(served_model_names=("toy",), drain_timeout_s=5.0)


def line(custom_id: str, body: dict[str, Any] | None = None, **changes: Any) -> dict[str, Any]:
    asked = {"model": "toy", "prompt": custom_id, "max_tokens": 4} if body is None else body
    entry = {"custom_id": custom_id, "method": "POST", "url": COMPLETIONS, "body": asked}
    return entry | changes


def jsonl(entries: Iterable[Any]) -> bytes:
    return b"".join(json.dumps(entry).encode() + b"\n" for entry in entries)


def wait_for(condition: Callable[[], object], timeout_s: float = 60.0) -> None:
    limit_s = time.monotonic() + timeout_s
    while not condition():
        assert time.monotonic() < limit_s, "it never came true"
        time.sleep(0.005)


class Jobs:
    def __init__(self, engine: FakeEngine, folder: Path, clock: Clock | None = None) -> None:
        self.engine = engine
        self.folder = folder
        self.context = ServerContext(engine, SETTINGS)
        self.service = self.context.batches = BatchService(self.context, folder, clock=clock)

    def __enter__(self) -> Jobs:
        return self

    def __exit__(self, *_: object) -> None:
        self.context.close()

    def upload(self, data: bytes) -> FileRecord:
        with self.service.files.begin() as upload:
            upload.write(data)
            return self.service.files.keep(upload, "in.jsonl", "batch")

    def create(self, data: bytes, window_s: int = HOUR_S, **changes: Any) -> BatchRecord:
        order = {
            "input_file_id": self.upload(data).id,
            "endpoint": COMPLETIONS,
            "completion_window": "1h",
            "window_s": window_s,
            "seed": 7,
        }
        return self.service.create(BatchOrder(**(order | changes)))

    def get(self, batch: BatchRecord) -> BatchRecord:
        return self.service.batches.get(batch.id)

    def reach(self, batch: BatchRecord, status: str) -> BatchRecord:
        wait_for(lambda: self.get(batch).status == status or self.get(batch).is_finished)
        reached = self.get(batch)
        assert reached.status == status, (reached, self.complaints(reached))
        return reached

    def complaints(self, batch: BatchRecord) -> list[dict[str, Any]]:
        return [] if batch.errors is None else json.loads(batch.errors)["data"]

    def read(self, file_id: str | None) -> dict[str, dict[str, Any]]:
        """Lines of an output or error file by custom id; each must be there once."""
        if file_id is None:
            return {}
        raw = self.service.files.path(file_id).read_bytes()
        assert raw.endswith(b"\n")
        entries = [json.loads(entry) for entry in raw.splitlines()]
        by_id = {entry["custom_id"]: entry for entry in entries}
        assert len(by_id) == len(entries)
        return by_id
