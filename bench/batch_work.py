"""A batch job on the very engine that also runs the same prompts without one, in turns."""

from __future__ import annotations

import json
import queue
import random
import statistics
import tempfile
import time
import uuid
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import jsonschema

from bench.errors import BenchError
from server.batch.batches import BatchOrder
from server.batch.files import INPUT_PURPOSE
from server.batch.records import BatchRecord
from server.batch.service import BatchService
from server.context import ServerContext
from server.settings import ServerSettings
from sl_serve.config import EngineConfig, SchedulerConfig
from sl_serve.core import Request, SamplingParams, TokenOut
from sl_serve.engine import Engine
from sl_serve.errors import EngineDeadError
from sl_serve.llm import UNBOUNDED_QUEUE, open_engine, open_model
from sl_serve.stats import StepStats

ENDPOINT = "/v1/completions"
MODEL_NAME = "measured"
WORDS = ("river", "stone", "winter", "lamp", "garden", "letter", "bridge", "music", "silver")
PROMPT_WORDS = (16, 96)  # from, to: of unequal length, as real ones are
POLL_S = 0.02
PROBE_TOKENS = 4  # that an interactive request generates
# As a form that answers of some length fill: a table of rows. A row is at most 52 characters with
# white space in 15 places, up to 16 characters in each: no text in this form has FORM_TOKENS, so
# that none is cut, whatever the model's taste.
FORM_TOKENS = 1024
SCHEMA = {
    "type": "array",
    "minItems": 2,
    "maxItems": 3,
    "items": {
        "type": "object",
        "properties": {
            "name": {"type": "string", "pattern": "^[a-z]{2,12}$"},
            "count": {"type": "integer", "minimum": 0, "maximum": 999},
            "kind": {"enum": ["small", "medium", "large"]},
        },
        "required": ["name", "count", "kind"],
        "additionalProperties": False,
    },
}


@dataclass(frozen=True, slots=True)
class Load:
    n_lines: int
    output_tokens: int
    max_rows: int
    n_probes: int  # interactive requests under a job


def measure(model: str, load: Load, repeat: int) -> dict[str, Any]:
    """Everything, in one process; JSON-ready. Raises UserError, BenchError."""
    checkpoint = open_model(model)
    try:
        scheduler = SchedulerConfig(max_rows=load.max_rows)
        engine = open_engine(checkpoint, EngineConfig(scheduler=scheduler, queue=UNBOUNDED_QUEUE))
    finally:
        checkpoint.close()
    with tempfile.TemporaryDirectory(prefix="sl-serve-bench-") as folder:
        context = ServerContext(engine, ServerSettings(served_model_names=(MODEL_NAME,)))
        context.batches = BatchService(context, Path(folder))
        try:
            return _Measurement(engine, context.batches, load).all(repeat)
        finally:
            context.close()
            engine.close()


class _Measurement:
    def __init__(self, engine: Engine, service: BatchService, load: Load) -> None:
        self._engine, self._service, self._load = engine, service, load
        rng = random.Random(0)
        self._prompts = [
            " ".join(rng.choices(WORDS, k=rng.randint(*PROMPT_WORDS))) for _ in range(load.n_lines)
        ]

    def all(self, repeat: int) -> dict[str, Any]:
        self._offline()  # touches memory for the first time
        runs: dict[str, list[Any]] = {"offline": [], "job": [], "free": [], "in a form": []}
        for _ in range(repeat):
            wall_s, texts = self._offline()
            runs["offline"].append({"wall_s": wall_s, "tokens": self._tokens})
            job = self._job(self._bodies(temperature=0, ignore_eos=True))
            if job.texts != texts:
                raise BenchError("the job's answers are not those of the engine alone")
            runs["job"].append({"wall_s": job.wall_s, "tokens": job.tokens})
            free = self._job(self._bodies(temperature=1))
            runs["free"].append({"wall_s": free.wall_s, "tokens": free.tokens})
            form = {"structured_outputs": {"json": SCHEMA}}
            formed = self._job(self._bodies(temperature=1, max_tokens=FORM_TOKENS, **form))
            runs["in a form"].append(
                {
                    "wall_s": formed.wall_s,
                    "tokens": formed.tokens,
                    "valid": n_valid(formed.texts),
                    "cut": formed.finish_reasons.count("length"),
                }
            )
        return {"runs": runs, "interactive": self._interactive()}

    @property
    def _tokens(self) -> int:
        return self._load.n_lines * self._load.output_tokens

    def _bodies(self, **changes: Any) -> list[dict[str, Any]]:
        start = {"model": MODEL_NAME, "max_tokens": self._load.output_tokens, "seed": 0}
        return [start | {"prompt": p} | changes for p in self._prompts]

    def _offline(self) -> tuple[float, list[str]]:
        """Seconds and texts of all prompts, submitted at once."""
        encode = self._engine.tokenizer.encode
        sampling = SamplingParams(
            max_tokens=self._load.output_tokens, temperature=0.0, ignore_eos=True
        )
        news: queue.SimpleQueue[TokenOut] = queue.SimpleQueue()
        start_s = time.perf_counter()
        requests = [Request(uuid.uuid4().hex, encode(p), sampling, news.put) for p in self._prompts]
        texts = dict.fromkeys((r.request_id for r in requests), "")
        self._engine.submit(requests)
        n_left = len(requests)
        while n_left:
            out = news.get()
            if out.error is not None:
                raise EngineDeadError(out.error)
            texts[out.request_id] += out.text
            n_left -= out.finish_reason is not None
        return time.perf_counter() - start_s, list(texts.values())

    def _job(self, bodies: Sequence[dict[str, Any]]) -> JobRun:
        """From the call that creates the batch until its files are written."""
        start_s = time.perf_counter()
        batch = self._ended(self._create(bodies))
        wall_s = time.perf_counter() - start_s
        if batch.output_file_id is None or batch.completed < len(bodies):
            raise BenchError(f"{batch.failed} of {len(bodies)} lines failed: {batch.errors}")
        lines = self._service.files.path(batch.output_file_id).read_bytes().splitlines()
        answers = [json.loads(line) for line in lines]
        answers.sort(key=lambda answer: int(answer["custom_id"]))
        choices = [a["response"]["body"]["choices"][0] for a in answers]
        return JobRun(
            wall_s,
            batch.output_tokens,
            [choice["text"] for choice in choices],
            [choice["finish_reason"] for choice in choices],
        )

    def _create(self, bodies: Sequence[dict[str, Any]]) -> BatchRecord:
        lines = (
            {"custom_id": str(i), "method": "POST", "url": ENDPOINT, "body": body}
            for i, body in enumerate(bodies)
        )
        with self._service.files.begin() as upload:
            for line in lines:
                upload.write(json.dumps(line).encode() + b"\n")
            file = self._service.files.keep(upload, "bench.jsonl", INPUT_PURPOSE)
        return self._service.create(
            BatchOrder(
                input_file_id=file.id, endpoint=ENDPOINT, completion_window="24h", window_s=86400
            )
        )

    def _ended(self, batch: BatchRecord) -> BatchRecord:
        return self._reached(batch, lambda b: b.is_finished)

    def _reached(self, batch: BatchRecord, condition: Callable[[BatchRecord], bool]) -> BatchRecord:
        while not condition(batch):
            time.sleep(POLL_S)
            batch = self._service.batches.get(batch.id)
        return batch

    def _interactive(self) -> dict[str, Any]:
        """Requests one after another while a job keeps every row busy."""
        steps: list[StepStats] = []
        rng = random.Random(1)
        bodies = self._bodies(temperature=0, ignore_eos=True, max_tokens=1024)
        batch = self._reached(self._create(bodies), lambda b: b.in_progress_at is not None)
        while self._engine.snapshot().n_running < min(self._load.max_rows, self._load.n_lines):
            time.sleep(POLL_S)
        self._engine.on_step(steps.append)
        first_token_s = []
        for _ in range(self._load.n_probes):
            first_token_s.append(self._first_token_s(rng.choice(self._prompts)))
            time.sleep(rng.random() * statistics.median(s.wall_s for s in steps))
        step_s = [s.wall_s for s in steps]
        self._service.cancel(batch.id)
        self._ended(batch)
        return {"first_token_s": first_token_s, "step_s": step_s}

    def _first_token_s(self, prompt: str) -> float:
        news: queue.SimpleQueue[TokenOut] = queue.SimpleQueue()
        ids = self._engine.tokenizer.encode(prompt)
        sampling = SamplingParams(max_tokens=PROBE_TOKENS, temperature=0.0, ignore_eos=True)
        start_s = time.perf_counter()
        self._engine.submit([Request(uuid.uuid4().hex, ids, sampling, news.put)])
        out = news.get()
        elapsed_s = time.perf_counter() - start_s
        while out.finish_reason is None:
            out = news.get()
        if out.error is not None:
            raise EngineDeadError(out.error)
        return elapsed_s


@dataclass(frozen=True, slots=True)
class JobRun:
    wall_s: float
    tokens: int  # generated
    texts: list[str]  # in the order of the lines
    finish_reasons: list[str]


def n_valid(texts: Sequence[str]) -> int:
    """How many of them are what SCHEMA says, by another package than the one that made them so."""
    validator = jsonschema.Draft202012Validator(SCHEMA)
    return sum(_is_valid(validator, text) for text in texts)


def _is_valid(validator: jsonschema.Draft202012Validator, text: str) -> bool:
    try:
        return bool(validator.is_valid(json.loads(text)))
    except ValueError:
        return False
