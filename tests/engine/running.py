"""Run prompts through an engine whose parts a test chooses."""

from __future__ import annotations

import threading
import uuid
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path

import numpy as np

from sl_serve.config import EngineConfig, SchedulerConfig
from sl_serve.core import Request, SamplingParams, TokenOut
from sl_serve.device import Device
from sl_serve.engine import Engine
from sl_serve.llm import UNBOUNDED_QUEUE
from sl_serve.loader import Parts, load
from sl_serve.stats import StepStats
from sl_serve.weights.checkpoint import open_checkpoint
from sl_serve.weights.requantised import with_weights

GREEDY = SamplingParams(max_tokens=24, temperature=0, ignore_eos=True)
KV_BYTES = 4 << 20


def config(**scheduler: int) -> EngineConfig:
    return EngineConfig(
        kv_memory_bytes=KV_BYTES, queue=UNBOUNDED_QUEUE, scheduler=SchedulerConfig(**scheduler)
    )


@contextmanager
def engine(
    folder: Path,
    settings: EngineConfig,
    device: Device | None = None,
    change: Callable[[Parts], None] = lambda _: None,
    weights: str = "auto",
) -> Iterator[Engine]:
    """`device` implies that `settings.device` is "sim"."""
    checkpoint = with_weights(open_checkpoint(folder), weights)
    if device is not None:
        settings = replace(settings, device="sim")
    parts = load(checkpoint, settings, device=device)
    change(parts)
    running = Engine(parts, checkpoint.load_tokenizer(), settings)
    try:
        yield running
        parts.residents.check_integrity()
    finally:
        running.close()
        checkpoint.close()


class Answers:
    """Collects what the engine says about a set of requests."""

    def __init__(self, n: int) -> None:
        self.news: list[list[TokenOut]] = [[] for _ in range(n)]
        self._left = n
        self._lock = threading.Lock()
        self._done = threading.Event()

    def receiver(self, i: int) -> Callable[[TokenOut], None]:
        def receive(out: TokenOut) -> None:
            self.news[i].append(out)
            if out.finish_reason is not None:
                with self._lock:
                    self._left -= 1
                    if not self._left:
                        self._done.set()

        return receive

    def wait(self, timeout_s: float = 300) -> list[list[int]]:
        assert self._done.wait(timeout_s), "requests did not end"
        return [[t for out in news for t in out.token_ids] for news in self.news]


def requests_for(
    prompts: Sequence[list[int]], sampling: SamplingParams | Sequence[SamplingParams], tag: str = ""
) -> tuple[list[Request], Answers]:
    answers = Answers(len(prompts))
    each = [sampling] * len(prompts) if isinstance(sampling, SamplingParams) else sampling
    requests = [
        Request(f"r{tag}{i}", list(p), s, answers.receiver(i))
        for i, (p, s) in enumerate(zip(prompts, each, strict=True))
    ]
    return requests, answers


def run(
    running: Engine,
    prompts: Sequence[list[int]],
    sampling: SamplingParams | Sequence[SamplingParams] = GREEDY,
) -> list[list[int]]:
    # Of their own: an id is free again a moment after its request's end has been told.
    requests, answers = requests_for(prompts, sampling, tag=uuid.uuid4().hex)
    running.submit(requests)
    return answers.wait()


def steps_of(running: Engine) -> list[StepStats]:
    steps: list[StepStats] = []
    running.on_step(steps.append)
    return steps


def random_prompts(n: int, longest: int = 60, seed: int = 0) -> list[list[int]]:
    rng = np.random.default_rng(seed)
    return [rng.integers(0, 256, int(rng.integers(1, longest))).tolist() for _ in range(n)]


def one_by_one(folder: Path, prompts: Sequence[list[int]]) -> list[list[int]]:
    """Tokens of every prompt by itself, on the plainest settings."""
    with engine(folder, config(max_rows=1, look_ahead=0)) as running:
        return [run(running, [prompt])[0] for prompt in prompts]
