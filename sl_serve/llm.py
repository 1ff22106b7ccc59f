"""Offline generation over the same engine."""

from __future__ import annotations

import threading
import uuid
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from types import TracebackType

from rich.progress import Progress

from sl_serve.config import EngineConfig, LoadFormat, QueueConfig
from sl_serve.core import FinishReason, Request, SamplingParams, TokenLogprob, TokenOut
from sl_serve.engine import Engine
from sl_serve.errors import EngineDeadError
from sl_serve.loader import OnPlan, load
from sl_serve.weights.checkpoint import Checkpoint, open_checkpoint
from sl_serve.weights.dummy import open_dummy
from sl_serve.weights.locate import resolve_model
from sl_serve.weights.tiers import OnLayer

Prompt = str | list[int]

UNBOUNDED_QUEUE = QueueConfig(max_requests=1 << 40, max_tokens=1 << 60)


@dataclass(slots=True)
class Generation:
    """One prompt's continuation."""

    prompt_tokens: int
    text: str = ""
    token_ids: list[int] = field(default_factory=list)
    finish_reason: FinishReason | None = None
    logprobs: list[TokenLogprob] = field(default_factory=list)
    prompt_logprobs: list[TokenLogprob | None] | None = None


def open_model(
    model: str, load_format: LoadFormat = "auto", progress: Callable[[str], None] | None = None
) -> Checkpoint:
    """What the command line calls MODEL. `progress` hears of anything that is fetched.

    Raises ModelError, CheckpointError."""
    if load_format == "dummy":
        return open_dummy(model)
    return open_checkpoint(resolve_model(model, progress))


def open_engine(
    checkpoint: Checkpoint,
    config: EngineConfig,
    on_plan: OnPlan = lambda _: None,
    on_layer: OnLayer = lambda: None,
) -> Engine:
    """Load a checkpoint and start an engine over it."""
    tokenizer = checkpoint.load_tokenizer()
    return Engine(load(checkpoint, config, on_plan, on_layer), tokenizer, config)


class LLM:
    """A model and an engine of its own; a context manager.

    `model` as on the command line: a folder, a .gguf file, a hub id, or "smollm2"; with the load
    format "dummy" a folder with config.json or the name of a shape.
    """

    def __init__(self, model: str, config: EngineConfig | None = None) -> None:
        config = config or EngineConfig(queue=UNBOUNDED_QUEUE)
        checkpoint = open_model(model, config.load_format)
        try:
            self.engine = open_engine(checkpoint, config)
        finally:
            checkpoint.close()

    def generate(
        self,
        prompts: Sequence[Prompt],
        sampling: SamplingParams | Sequence[SamplingParams],
        progress: bool = False,
    ) -> list[Generation]:
        """Continue every prompt, in order. Raises RequestError, EngineDeadError."""
        each = [sampling] * len(prompts) if isinstance(sampling, SamplingParams) else sampling
        ids = [self.engine.tokenizer.encode(p) if isinstance(p, str) else p for p in prompts]
        collector = _Collector([len(i) for i in ids], progress)
        requests = [
            Request(f"{uuid.uuid4().hex}-{n}", i, s, collector.receiver(n))
            for n, (i, s) in enumerate(zip(ids, each, strict=True))
        ]
        with collector.bar:
            self.engine.submit(requests)
            collector.done.wait()
        if collector.error is not None:
            raise EngineDeadError(collector.error)
        return collector.generations

    def close(self) -> None:
        self.engine.close()

    def __enter__(self) -> LLM:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        self.close()


class _Collector:
    """Gathers what the engine thread tells about a list of requests."""

    def __init__(self, prompt_tokens: Sequence[int], progress: bool) -> None:
        self.generations = [Generation(n) for n in prompt_tokens]
        self.error: str | None = None
        self.done = threading.Event()
        self.bar = Progress(disable=not progress)
        self._task = self.bar.add_task("generating", total=len(self.generations))
        self._left = len(self.generations)
        if not self._left:
            self.done.set()

    def receiver(self, n: int) -> _Receiver:
        return _Receiver(self, n)

    def take(self, n: int, out: TokenOut) -> None:
        generation = self.generations[n]
        generation.text += out.text
        generation.token_ids += out.token_ids
        generation.logprobs += out.logprobs
        if out.prompt_logprobs is not None:
            generation.prompt_logprobs = list(out.prompt_logprobs)
        if out.finish_reason is None:
            return
        generation.finish_reason = out.finish_reason
        self.error = self.error or out.error
        self.bar.advance(self._task)
        self._left -= 1
        if not self._left:
            self.done.set()


@dataclass(frozen=True, slots=True)
class _Receiver:
    collector: _Collector
    n: int

    def __call__(self, out: TokenOut) -> None:
        self.collector.take(self.n, out)
