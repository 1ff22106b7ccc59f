"""Does the engine make progress? By the machine's own pace: a step may rightly take minutes."""

from __future__ import annotations

from enum import StrEnum

from sl_serve.stats import EngineSnapshot

FIRST_STEPS = 20  # until then nobody knows what is usual
FLOOR_S = 15.0  # after them: shorter waits are never worth an alarm
STUCK_STEPS = 3  # times as long as 99 of 100 steps take
HOPELESS = 10  # times as long as a stuck step: it will not end


class Progress(StrEnum):
    STEADY = "steady"
    STUCK = "stuck"  # may end: take no new work, keep what there is
    HOPELESS = "hopeless"  # only a new process helps


def stuck_after_s(snapshot: EngineSnapshot, first_steps_s: float) -> float:
    """`first_steps_s`: what the first steps may take."""
    floor_s = first_steps_s if snapshot.n_steps < FIRST_STEPS else min(first_steps_s, FLOOR_S)
    return max(floor_s, STUCK_STEPS * max(snapshot.slow_step_s, snapshot.last_step_s))


def progress(snapshot: EngineSnapshot, first_steps_s: float) -> Progress:
    limit_s = stuck_after_s(snapshot, first_steps_s)
    if snapshot.n_running == 0 or snapshot.since_progress_s <= limit_s:
        return Progress.STEADY
    return Progress.STUCK if snapshot.since_progress_s <= HOPELESS * limit_s else Progress.HOPELESS
