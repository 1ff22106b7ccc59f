"""Running totals of an engine."""

from __future__ import annotations

import time
from dataclasses import dataclass, field

from sl_serve.stats import EngineSnapshot, EngineState, StepStats


@dataclass(slots=True)
class Totals:
    """Written by the engine thread; each number is read whole by others."""

    n_steps: int = 0
    n_parked: int = 0
    prompt_tokens: int = 0
    generated_tokens: int = 0
    step_s: float = 0.0
    last_step_s: float = 0.0
    weight_bytes: int = 0
    progress_at_s: float = field(default_factory=time.monotonic)

    def working(self) -> None:
        """There is work to do now: time without progress counts from here or the last step."""
        self.progress_at_s = time.monotonic()

    def add(self, step: StepStats, n_generated: int) -> None:
        self.n_steps += 1
        self.prompt_tokens += step.n_prefill_tokens
        self.generated_tokens += n_generated
        self.step_s += step.wall_s
        self.last_step_s = step.wall_s
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
        )
