"""A file of requests in, files of answers and errors out: a batch job without a server.

While it runs, its job lives in a folder beside the output file; once both files are written whole,
the folder goes. What ends in between leaves a folder that the next run can resume from.
"""

from __future__ import annotations

import hashlib
import os
import shutil
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import orjson

from server.batch.batches import BatchOrder
from server.batch.files import INPUT_PURPOSE, sync_folder
from server.batch.records import BatchRecord, Status
from server.batch.service import BatchService
from server.batch.translate import ENDPOINTS
from server.engine_port import EnginePort
from sl_serve.errors import EngineDeadError, UserError
from sl_serve.stats import EngineState

POLL_S = 0.2
FOREVER_S = 100 * 365 * 24 * 3600  # a run on one's own machine has no deadline
SHOWN_ERRORS = 5
FIRST_LINE_BYTES = 2**20

Watch = Callable[[dict[str, Any]], None]  # gets the batch object, time and again


@dataclass(frozen=True, slots=True)
class RunPaths:
    source: Path
    output: Path

    @property
    def errors(self) -> Path:
        return self.output.with_name(f"{self.output.stem}.errors{self.output.suffix}")

    @property
    def folder(self) -> Path:
        return self.output.with_name(f"{self.output.name}.run")

    def is_done(self, resume: bool) -> bool:
        """Whether a run to resume had come to its end.

        Raises UserError for what can be known before a model is loaded.
        """
        if not self.source.is_file():
            raise UserError(f"there is no file {self.source}")
        if not self.output.parent.is_dir():
            raise UserError(f"there is no folder {self.output.parent} for the output")
        if self.folder.exists() and not resume:
            raise UserError(
                f"an earlier run into {self.output} did not come to its end; continue it with "
                f"--resume, or delete {self.folder}"
            )
        if self.output.exists() and not self.folder.exists() and not resume:
            raise UserError(f"{self.output} exists; choose another output or delete it")
        return self.output.exists() and not self.folder.exists()


def run_file(
    service: BatchService, engine: EnginePort, paths: RunPaths, seed: int, watch: Watch
) -> BatchRecord:
    """Runs the job in `service` to its end and writes its files; the batch as it ended.

    Raises UserError for an input with errors, EngineDeadError when the engine fails; the job can
    then be resumed. Close the service, then call `clear`.
    """
    batch = _open_batch(service, paths, seed)
    while not batch.is_finished:
        watch(service.describe(batch))
        snapshot = engine.snapshot()
        if snapshot.state is EngineState.DEAD:
            raise EngineDeadError(f"{snapshot.reason}; continue with --resume")
        time.sleep(POLL_S)
        batch = service.batches.get(batch.id)
    watch(service.describe(batch))
    if batch.status is Status.COMPLETED:
        _export(service, batch.error_file_id, paths.errors, always=False)
        _export(service, batch.output_file_id, paths.output, always=True)
    return batch


def clear(paths: RunPaths) -> None:
    shutil.rmtree(paths.folder)


def complaints(batch: BatchRecord) -> str:
    """One sentence about an input that was refused."""
    errors = orjson.loads(batch.errors or "{}").get("data", [])
    shown = [f"line {e['line']}: {e['message']}" if e["line"] else e["message"] for e in errors]
    more = f" (and {len(shown) - SHOWN_ERRORS} more)" if len(shown) > SHOWN_ERRORS else ""
    return "; ".join(shown[:SHOWN_ERRORS]) + more


def _open_batch(service: BatchService, paths: RunPaths, seed: int) -> BatchRecord:
    known, _ = service.batches.page(1, None)
    if not known:
        return _new_batch(service, paths.source, seed)
    (batch,) = known
    if service.files.get(batch.input_file_id).sha256 != _sha256(paths.source):
        raise UserError(
            f"{paths.source} has changed since the run began; delete {paths.folder} to begin anew"
        )
    return batch


def _new_batch(service: BatchService, source: Path, seed: int) -> BatchRecord:
    with service.files.begin() as upload:
        upload.copy(source)
        file = service.files.keep(upload, source.name, INPUT_PURPOSE, None)
    order = BatchOrder(
        input_file_id=file.id,
        endpoint=endpoint_of(source),
        completion_window="none",
        window_s=FOREVER_S,
        seed=seed,
    )
    return service.create(order)


def endpoint_of(source: Path) -> str:
    """The `url` of the first line; whatever else is wrong is for validation to say."""
    with source.open("rb") as file:
        first = next(
            (line for line in iter(lambda: file.readline(FIRST_LINE_BYTES), b"") if line.strip()),
            b"",
        )
    try:
        url = orjson.loads(first)["url"]
    except (ValueError, LookupError, TypeError):
        return ENDPOINTS[0]
    return url if url in ENDPOINTS else ENDPOINTS[0]


def _sha256(path: Path) -> str:
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def _export(service: BatchService, file_id: str | None, target: Path, always: bool) -> None:
    """A copy in one piece, or none; `always`: an empty file where there is nothing to copy."""
    if file_id is None and not always:
        return
    part = target.with_name(target.name + ".part")
    with part.open("wb") as copy:
        if file_id is not None:
            with service.files.path(file_id).open("rb") as rendered:
                shutil.copyfileobj(rendered, copy)
        copy.flush()
        os.fsync(copy.fileno())
    os.replace(part, target)
    sync_folder(target.parent)
