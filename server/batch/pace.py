"""How fast jobs go, over the last minutes."""

from __future__ import annotations

import threading
from collections import defaultdict, deque
from typing import NamedTuple

from server.batch.clock import Clock

WINDOW_S = 300.0  # lines of offloaded models may take minutes


class Rate(NamedTuple):
    lines_per_s: float
    tokens_per_s: float


class _Mark(NamedTuple):
    at_s: float
    n_lines: int
    n_tokens: int


class Pace:
    """Written by the feeder, read by whoever asks."""

    def __init__(self, clock: Clock) -> None:
        self._clock = clock
        self._lock = threading.Lock()
        self._marks: defaultdict[int, deque[_Mark]] = defaultdict(deque)

    def started(self, batch: int) -> None:
        """Its first lines have been handed to the engine."""
        with self._lock:
            if not self._marks[batch]:
                self._marks[batch].append(_Mark(self._clock(), 0, 0))

    def ended(self, batch: int, n_lines: int, n_tokens: int) -> None:
        now = self._clock()
        with self._lock:
            marks = self._marks[batch]
            marks.append(_Mark(now, n_lines, n_tokens))
            while len(marks) > 2 and marks[1].at_s < now - WINDOW_S:
                marks.popleft()

    def forget(self, batch: int) -> None:
        with self._lock:
            self._marks.pop(batch, None)

    def rate(self, batch: int) -> Rate | None:
        """None before the first line has ended."""
        with self._lock:
            marks = list(self._marks.get(batch, ()))
        if len(marks) < 2:
            return None
        seconds = max(self._clock() - marks[0].at_s, 1e-3)
        since = marks[1:]  # the first one marks the beginning
        return Rate(
            sum(m.n_lines for m in since) / seconds, sum(m.n_tokens for m in since) / seconds
        )
