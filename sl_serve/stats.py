"""What the engine counts. Plain numbers, written by the engine thread, read by anyone."""

from __future__ import annotations

from dataclasses import dataclass
from enum import StrEnum


class EngineState(StrEnum):
    RUNNING = "running"
    DRAINING = "draining"  # finishes what it has, takes nothing new
    CLOSED = "closed"
    DEAD = "dead"  # the engine thread failed; EngineSnapshot.reason says why


@dataclass(frozen=True, slots=True)
class StepStats:
    """One step. Bytes are those that crossed the link; on a device that shares the host's memory
    they are the bytes the step read there instead."""

    wall_s: float
    n_sub_batches: int
    n_rows: int
    n_prefill_tokens: int
    n_decode_tokens: int
    weight_bytes: int
    kv_down_bytes: int
    kv_up_bytes: int
    stall_s: float = 0.0  # compute waiting for copies


@dataclass(frozen=True, slots=True)
class EngineSnapshot:
    """The engine at one moment; totals since its start."""

    state: EngineState
    reason: str | None  # of a dead engine
    n_running: int
    n_waiting: int
    waiting_tokens: int
    n_steps: int
    n_parked_total: int  # rows set aside because KV memory ran short, later resumed
    prompt_tokens_total: int
    generated_tokens_total: int
    step_s_total: float
    last_step_s: float
    since_progress_s: float  # since the last step ended, or since there was nothing to do
    weight_bytes_total: int
    kv_used_bytes: int
    kv_total_bytes: int
