"""What the engine counts. Plain numbers, written by the engine thread, read by anyone."""

from __future__ import annotations

import time
from collections import deque
from dataclasses import dataclass, field
from enum import StrEnum
from typing import NamedTuple

from sl_serve.core import StepPlan

RECENT_STEPS = 500  # that say how long a step takes


class EngineState(StrEnum):
    RUNNING = "running"
    DRAINING = "draining"  # finishes what it has, takes nothing new
    CLOSED = "closed"
    DEAD = "dead"  # the engine thread failed; EngineSnapshot.reason says why


class SubBatchFill(NamedTuple):
    """What one sub-batch of a step had in it."""

    n_rows: int
    n_tokens: int


@dataclass(frozen=True, slots=True)
class MemoryTier:
    """What is reserved before the first step in one place: (part, bytes), none of them empty."""

    name: str  # host, device or disk
    parts: tuple[tuple[str, int], ...]
    budget_bytes: int | None  # None: no ceiling is known

    @property
    def planned_bytes(self) -> int:
        return sum(n_bytes for _, n_bytes in self.parts)


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
    hidden_down_bytes: int = 0  # of hidden states that are swapped
    hidden_up_bytes: int = 0
    sub_batches: tuple[SubBatchFill, ...] = ()


@dataclass(frozen=True, slots=True)
class EngineSnapshot:
    """The engine at one moment; totals since its start."""

    state: EngineState
    reason: str | None  # of a dead engine
    n_running: int
    n_waiting: int
    n_waiting_requests: int  # of n_waiting, those that are not of batch jobs
    waiting_tokens: int  # theirs
    n_steps: int
    n_parked_total: int  # rows set aside for want of KV memory or for better ones, later resumed
    prompt_tokens_total: int
    generated_tokens_total: int
    step_s_total: float
    last_step_s: float
    since_progress_s: float  # since the last step ended, or since there was nothing to do
    weight_bytes_total: int
    kv_used_bytes: int
    kv_total_bytes: int
    slow_step_s: float = 0.0  # 99 of 100 of the latest steps were not slower
    n_short_of_memory: int = 0  # steps given up for want of memory and repeated smaller


@dataclass(frozen=True, slots=True)
class BytesMoved:
    """Running totals of a sweep's traffic."""

    weights: int
    kv_down: int
    kv_up: int
    hidden_down: int
    hidden_up: int


def step_stats(
    plan: StepPlan, wall_s: float, before: BytesMoved, after: BytesMoved, stall_s: float
) -> StepStats:
    works = [w for s in plan.sub_batches for w in s.rows]
    prompt_works = [w for w in works if w.start < w.request.n_prompt]
    n_prefill = sum(w.n_new for w in prompt_works)
    return StepStats(
        wall_s=wall_s,
        n_sub_batches=len(plan.sub_batches),
        n_rows=len(works),
        n_prefill_tokens=n_prefill,
        n_decode_tokens=plan.n_tokens - n_prefill,
        weight_bytes=after.weights - before.weights,
        kv_down_bytes=after.kv_down - before.kv_down,
        kv_up_bytes=after.kv_up - before.kv_up,
        stall_s=stall_s,
        hidden_down_bytes=after.hidden_down - before.hidden_down,
        hidden_up_bytes=after.hidden_up - before.hidden_up,
        sub_batches=tuple(SubBatchFill(len(s.rows), s.n_tokens) for s in plan.sub_batches),
    )


@dataclass(slots=True)
class Totals:
    """Written by the engine thread; each number is read whole by others."""

    n_steps: int = 0
    n_parked: int = 0
    n_short_of_memory: int = 0
    prompt_tokens: int = 0
    generated_tokens: int = 0
    step_s: float = 0.0
    last_step_s: float = 0.0
    weight_bytes: int = 0
    progress_at_s: float = field(default_factory=time.monotonic)
    slow_step_s: float = 0.0
    _recent_s: deque[float] = field(default_factory=lambda: deque(maxlen=RECENT_STEPS))

    def working(self) -> None:
        """There is work to do now: time without progress counts from here or the last step."""
        self.progress_at_s = time.monotonic()

    def add(self, step: StepStats, n_generated: int) -> None:
        self.n_steps += 1
        self.prompt_tokens += step.n_prefill_tokens
        self.generated_tokens += n_generated
        self.step_s += step.wall_s
        self.last_step_s = step.wall_s
        self._recent_s.append(step.wall_s)
        self.slow_step_s = sorted(self._recent_s)[(99 * len(self._recent_s) - 1) // 100]
        self.weight_bytes += step.weight_bytes
        self.progress_at_s = time.monotonic()

    def tokens_per_s(self) -> float:
        """Prompt and output together, while stepping."""
        return (self.prompt_tokens + self.generated_tokens) / self.step_s if self.step_s else 0.0

    def snapshot(
        self,
        *,
        state: EngineState,
        reason: str | None,
        n_running: int,
        n_waiting: int,
        n_waiting_requests: int,
        waiting_tokens: int,
        kv_used_bytes: int,
        kv_total_bytes: int,
    ) -> EngineSnapshot:
        idle = n_running == 0 and n_waiting == 0
        return EngineSnapshot(
            state=state,
            reason=reason,
            n_running=n_running,
            n_waiting=n_waiting,
            n_waiting_requests=n_waiting_requests,
            waiting_tokens=waiting_tokens,
            n_steps=self.n_steps,
            n_parked_total=self.n_parked,
            prompt_tokens_total=self.prompt_tokens,
            generated_tokens_total=self.generated_tokens,
            step_s_total=self.step_s,
            last_step_s=self.last_step_s,
            since_progress_s=0.0 if idle else time.monotonic() - self.progress_at_s,
            weight_bytes_total=self.weight_bytes,
            kv_used_bytes=kv_used_bytes,
            kv_total_bytes=kv_total_bytes,
            slow_step_s=self.slow_step_s,
            n_short_of_memory=self.n_short_of_memory,
        )
