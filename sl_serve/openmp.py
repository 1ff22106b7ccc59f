"""The OpenMP runtime that torch brings and the native core shares."""

from __future__ import annotations

import ctypes
from contextlib import suppress

_PAUSE_SOFT = 1  # omp_pause_soft, OpenMP 5.0, section 3.2.44


def release_workers() -> None:
    """End the idle workers of the calling thread.

    Each thread that has run a parallel region keeps workers of its own. Where those of all threads
    together outnumber the cores, the runtime lets them wait asleep instead of spinning, and every
    region of the engine then starts with a wake-up: measured 100 us instead of 10, a third of a
    step of four rows. So whoever computes before the engine's thread does gives its workers up.
    """
    with suppress(AttributeError, OSError):  # another runtime, or none
        ctypes.CDLL(None).omp_pause_resource_all(_PAUSE_SOFT)
