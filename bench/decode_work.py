"""Steps of decoding with so many rows, of a model as its file has it or widened to float32."""

from __future__ import annotations

import queue
import uuid
from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from typing import Any, Literal

import numpy as np
import torch

from bench.cases import WARM_UP_TOKENS
from bench.errors import BenchError
from bench.measurement import peak_rss_bytes
from sl_serve.config import ActivationName, EngineConfig, SchedulerConfig
from sl_serve.core import Request, SamplingParams, TokenOut
from sl_serve.engine import Engine
from sl_serve.errors import EngineDeadError
from sl_serve.llm import UNBOUNDED_QUEUE, open_engine, open_model
from sl_serve.stats import StepStats
from sl_serve.weights.checkpoint import Checkpoint
from sl_serve.weights.file_range import FileRange
from sl_serve.weights.formats import Format, plain
from sl_serve.weights.wrapped import WrappedCheckpoint

# rounded: as the file has it, with activations in 8 bits.
Held = Literal["stored", "rounded", "float32"]
HELD: tuple[Held, ...] = ("stored", "rounded", "float32")
PROMPT_TOKENS, OUTPUT_TOKENS = 32, 48
LEAST_TOKEN_ID = 3  # below it are ends and beginnings in many vocabularies


class Widened(WrappedCheckpoint):
    """A checkpoint whose every number is held in float32, as if its file had them so."""

    def __init__(self, checkpoint: Checkpoint) -> None:
        super().__init__(checkpoint)
        self.config = replace(checkpoint.config, dtype="float32")

    def read(self, name: str) -> torch.Tensor:
        return self._inner.read(name).float()

    def format(self, name: str) -> Format:
        return plain(torch.float32)

    def read_blocks(self, name: str) -> torch.Tensor:
        raise AssertionError("nothing is in blocks")

    def location(self, name: str) -> FileRange | None:
        return None


@dataclass
class DecodeSteps:
    """Seconds of each step in which so many rows decode and no prompt is read."""

    n_rows: int
    seconds: list[float] = field(default_factory=list)

    def __call__(self, step: StepStats) -> None:
        if (step.n_decode_tokens, step.n_prefill_tokens) == (self.n_rows, 0):
            self.seconds.append(step.wall_s)


def measure(
    model: str, held: Held, rows: Sequence[int], output_tokens: int = OUTPUT_TOKENS
) -> dict[str, Any]:
    """Steps of every number of rows, each in an engine of its own; JSON-ready.

    Raises UserError for a model that cannot be loaded."""
    step_s: dict[str, list[float]] = {}
    checkpoint = open_model(model)
    try:
        held_so: Checkpoint = Widened(checkpoint) if held == "float32" else checkpoint
        activations: ActivationName = "int8" if held == "rounded" else "float32"
        for n_rows in rows:
            engine = open_engine(held_so, _config(n_rows, output_tokens, activations))
            try:
                step_s[str(n_rows)] = _decode_seconds(engine, n_rows, output_tokens)
                plan = engine.plan
            finally:
                engine.close()
    finally:
        checkpoint.close()
    if plan.n_disk_layers:
        raise BenchError(f"{model} does not fit into memory; give a smaller model")
    return {
        "step_s": step_s,
        "layers_bytes": plan.weights_bytes,
        "peak_rss_bytes": peak_rss_bytes(),
    }


def _config(n_rows: int, output_tokens: int, activations: ActivationName) -> EngineConfig:
    return EngineConfig(
        activations=activations,
        max_model_len=PROMPT_TOKENS + output_tokens,
        scheduler=SchedulerConfig(max_rows=n_rows),
        queue=UNBOUNDED_QUEUE,
    )


def _decode_seconds(engine: Engine, n_rows: int, output_tokens: int) -> list[float]:
    """After a run like it, which touches memory for the first time."""
    steps = DecodeSteps(n_rows)
    _generate(engine, n_rows, WARM_UP_TOKENS)
    engine.on_step(steps)
    _generate(engine, n_rows, output_tokens)
    return steps.seconds


def _generate(engine: Engine, n_rows: int, n_tokens: int) -> None:
    """Prompts of ordinary tokens, the same each time; all are submitted at once."""
    news: queue.SimpleQueue[TokenOut] = queue.SimpleQueue()
    sampling = SamplingParams(max_tokens=n_tokens, temperature=0.0, ignore_eos=True)
    shape = (n_rows, PROMPT_TOKENS)
    prompts = np.random.default_rng(0).integers(LEAST_TOKEN_ID, engine.vocab_size, shape)
    requests = [Request(uuid.uuid4().hex, p, sampling, news.put) for p in prompts.tolist()]
    engine.submit(requests)
    while n_rows:
        out = news.get()
        if out.error is not None:
            raise EngineDeadError(out.error)
        n_rows -= out.finish_reason is not None
