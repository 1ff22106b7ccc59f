"""Threads that work out masks while the engine's own thread runs a step."""

from __future__ import annotations

import threading
from collections.abc import Callable
from concurrent.futures import Future
from queue import SimpleQueue
from typing import TypeVar

T = TypeVar("T")

N_THREADS = 2
MAX_THREADS = 16  # with those that replaced stuck ones


class MaskThreads:
    """Daemon threads: native code that hangs cannot be ended, and must hold up neither the other
    requests nor the end of the process."""

    def __init__(self, n_threads: int = N_THREADS) -> None:
        self._jobs: SimpleQueue[Callable[[], None] | None] = SimpleQueue()
        self._n_threads = 0
        self._lock = threading.Lock()
        for _ in range(n_threads):
            self.add_one()

    def submit(self, work: Callable[[], T]) -> Future[T]:
        future: Future[T] = Future()

        def run() -> None:
            try:
                future.set_result(work())
            except BaseException as error:  # told to whoever waits
                future.set_exception(error)

        self._jobs.put(run)
        return future

    def add_one(self) -> None:
        """In place of one that is stuck."""
        with self._lock:
            if self._n_threads < MAX_THREADS:
                self._n_threads += 1
                name = f"sl-serve-masks-{self._n_threads}"
                threading.Thread(target=self._run, name=name, daemon=True).start()

    def close(self) -> None:
        with self._lock:
            for _ in range(self._n_threads):
                self._jobs.put(None)

    def _run(self) -> None:
        while (job := self._jobs.get()) is not None:
            job()
