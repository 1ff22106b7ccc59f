"""Engines whose hidden states are swapped, for the tests of them."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import pytest

from sl_serve import stored_model
from sl_serve.config import EngineConfig
from sl_serve.plan.fit import plan_memory
from sl_serve.plan.memory import MemoryPlan
from tests.engine.running import GREEDY, config, engine, random_prompts, run

N_ROWS = 14
PROMPTS = random_prompts(N_ROWS, longest=30, seed=7)
SHORT = replace(GREEDY, max_tokens=8)


def on_the_processor_alone(folder: Path) -> list[list[int]]:
    """The tokens of PROMPTS."""
    with engine(folder, config(max_rows=N_ROWS)) as running:
        return run(running, PROMPTS, SHORT)


def swap(patch: pytest.MonkeyPatch) -> None:
    """Whatever the memory: with one sub-batch or two it would save nothing."""

    def plan(*args: object) -> MemoryPlan:
        return replace(plan_memory(*args), hidden_bytes=1)  # type: ignore[arg-type]

    patch.setattr(stored_model, "plan_memory", plan)


def settings_of(n_sub_batches: int, look_ahead: int = 1, chunk: int = 24) -> EngineConfig:
    return config(
        max_rows=N_ROWS,
        n_sub_batches=n_sub_batches,
        look_ahead=look_ahead,
        prefill_chunk_tokens=chunk,
    )
