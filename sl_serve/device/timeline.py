"""What ran when: one bar per copy or computation."""

from __future__ import annotations

from typing import NamedTuple


class Span(NamedTuple):
    stream: str  # load, compute, store, host
    name: str
    start_s: float  # since the timeline was started
    stop_s: float
