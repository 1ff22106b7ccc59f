"""The time of jobs, in unix seconds."""

from __future__ import annotations

import time
from collections.abc import Callable

Clock = Callable[[], float]


def steady_clock() -> Clock:
    """Wall time as it was at the call, advanced by a clock that nobody sets: a jump of the
    machine's date expires no job."""
    offset_s = time.time() - time.monotonic()
    return lambda: offset_s + time.monotonic()
