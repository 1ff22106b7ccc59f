"""How a batch looks on the command line: its options' names, its bar."""

from __future__ import annotations

import time
from datetime import timedelta
from typing import Any

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TaskID, TextColumn

from sl_serve.cli_options import option


def batch_option(flag: str, short: str, help_text: str) -> object:
    return option("Batch", flag, help_text, short=short, of="BATCH_")


class BatchBar:
    """A batch object, as a progress bar; of the same look in `run-batch` and in `batches watch`."""

    def __init__(self, console: Console) -> None:
        columns = (TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn())
        details = TextColumn("{task.fields[details]}")
        self._bar = Progress(*columns, details, console=console)
        self._task: TaskID = self._bar.add_task("validating", total=None, details="")

    def __enter__(self) -> BatchBar:
        self._bar.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._bar.stop()

    def show(self, batch: dict[str, Any]) -> None:
        progress = batch["progress"]
        self._bar.update(
            self._task,
            description=batch["status"],
            completed=progress["lines"],
            total=progress["total"] or None,
            details=details(batch),
        )


def details(batch: dict[str, Any]) -> str:
    progress, failed = batch["progress"], batch["request_counts"]["failed"]
    parts = [f"{failed} failed"] if failed else []
    if progress["tokens_per_second"] is not None:
        parts.append(f"{progress['tokens_per_second']:.1f} tokens/s")
    if progress["expected_at"] is not None:
        left_s = max(0, progress["expected_at"] - int(time.time()))
        parts.append(f"{timedelta(seconds=left_s)} left")
    return ", ".join(parts)
