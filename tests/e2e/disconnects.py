"""Clients that leave: how many steps later their row is free."""

from __future__ import annotations

import json
import random
import socket
import threading
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from typing import NamedTuple

import torch

from sl_serve.core import Request, StepPlan, TokenOut
from sl_serve.engine import Engine
from sl_serve.kv.pool import Slab
from sl_serve.loader import Parts
from tests.e2e.serving import serving
from tests.engine.running import GREEDY, config, requests_for
from tests.server.conftest import LiveServer

PHASES = ("queued", "prefill", "decode")
N_ROWS = 2
SETTINGS = config(max_rows=N_ROWS, n_sub_batches=2, prefill_chunk_tokens=16)
HOLDING = replace(GREEDY, max_tokens=None)
WAIT_S = 20.0


class Turnstile:
    """Lets single steps of an engine pass."""

    def __init__(self) -> None:
        self._changed = threading.Condition()
        self._n_allowed = 0
        self._n_waiting = 0

    def install(self, parts: Parts) -> None:
        inner = parts.sweep.run

        def gated(plan: StepPlan, slabs: Mapping[int, Slab]) -> list[torch.Tensor]:
            with self._changed:
                self._n_waiting += 1
                self._changed.notify_all()
                assert self._changed.wait_for(lambda: self._n_allowed > 0, 60)
                self._n_waiting -= 1
                self._n_allowed -= 1
            return inner(plan, slabs)

        parts.sweep.run = gated  # type: ignore[method-assign]

    def allow(self, n_steps: int) -> None:
        with self._changed:
            self._n_allowed += n_steps
            self._changed.notify_all()

    def forbid(self) -> None:
        with self._changed:
            self._n_allowed = 0

    def wait(self) -> None:
        """Until a step is about to begin and may not."""
        with self._changed:
            ready = lambda: self._n_waiting > 0 and self._n_allowed == 0  # noqa: E731
            assert self._changed.wait_for(ready, WAIT_S), "no step begins"


class Departure(NamedTuple):
    phase: str
    is_stream: bool
    n_steps: int  # from the engine's hearing of it to the row's being free


class Witness:
    """Knows what the server asks of its engine."""

    def __init__(self, engine: Engine) -> None:
        self.requests: list[Request] = []
        self.aborted, self.ended = threading.Event(), threading.Event()
        self._submit, self._abort = engine.submit, engine.abort
        engine.submit = self.submit  # type: ignore[method-assign]
        engine.abort = self.abort  # type: ignore[method-assign]

    def submit(self, requests: Sequence[Request]) -> None:
        for request in requests:
            request.on_output = self._watched(request.on_output)
        self.aborted.clear()
        self.ended.clear()
        self._submit(requests)
        self.requests += requests

    def abort(self, request_id: str) -> None:
        self._abort(request_id)
        self.aborted.set()

    def _watched(self, inner: Callable[[TokenOut], None]) -> Callable[[TokenOut], None]:
        def receive(out: TokenOut) -> None:
            inner(out)
            if out.finish_reason is not None:
                self.ended.set()

        return receive


class Scene:
    """One server, one engine that steps when it is told to, and one client after another."""

    def __init__(self, live: LiveServer, engine: Engine, turnstile: Turnstile) -> None:
        self._live, self._engine, self._turnstile = live, engine, turnstile
        self._witness = Witness(engine)

    def depart(self, phase: str, is_stream: bool, rng: random.Random) -> Departure:
        with self._crowd(N_ROWS if phase == "queued" else 0):
            n_prompt = rng.randrange(180, 230) if phase == "prefill" else rng.randrange(1, 12)
            client = self._post({"prompt": [7] * n_prompt, "stream": is_stream, "max_tokens": 24})
            self._advance_to(phase)
            client.close()
            assert self._witness.aborted.wait(WAIT_S), f"{phase}: nobody noticed"
            steps_before = self._engine.snapshot().n_steps
            self._turnstile.allow(2)
            assert self._witness.ended.wait(WAIT_S), f"{phase}: not free after two steps"
            n_steps = self._engine.snapshot().n_steps - steps_before
            self._turnstile.forbid()
        self._check_nothing_is_left()
        return Departure(phase, is_stream, n_steps)

    def _post(self, body: dict[str, object]) -> socket.socket:
        payload = json.dumps(body | {"ignore_eos": True}).encode()
        head = f"POST /v1/completions HTTP/1.1\r\nHost: localhost\r\nContent-Length: {len(payload)}"
        n_before = len(self._witness.requests)
        client = socket.create_connection(("127.0.0.1", self._live.port), timeout=10)
        client.sendall(head.encode() + b"\r\n\r\n" + payload)
        until(lambda: len(self._witness.requests) > n_before)
        return client

    def _advance_to(self, phase: str) -> None:
        """Step by step, until the last request is there."""
        request = self._witness.requests[-1]
        reached = {
            "queued": lambda: request.n_cached == 0,
            "prefill": lambda: 0 < request.n_cached < request.n_prompt,
            "decode": lambda: len(request.output_ids) >= 2,
        }[phase]
        self._turnstile.wait()
        for _ in range(1 if phase == "queued" else 0):  # it is not let in by another step
            self._step()
        while not reached():
            self._step()

    def _step(self) -> None:
        self._turnstile.allow(1)
        n_before = self._engine.snapshot().n_steps
        until(lambda: self._engine.snapshot().n_steps > n_before)
        self._turnstile.wait()

    @contextmanager
    def _crowd(self, n: int) -> Iterator[None]:
        """Others who take all rows meanwhile; straight from the engine."""
        requests, answers = requests_for([[3, 4]] * n, HOLDING, tag=f"crowd-{time.monotonic_ns()}-")
        if n:
            self._witness._submit(requests)
            self._turnstile.wait()
            self._step()
        yield
        for request in requests:
            self._witness._abort(request.request_id)
        if n:
            self._turnstile.allow(2)
            answers.wait(WAIT_S)
            self._turnstile.forbid()

    def _check_nothing_is_left(self) -> None:
        def idle() -> bool:
            now = self._engine.snapshot()
            return not (now.n_running or now.n_waiting or self._live.app.state.context.jobs)

        until(idle)
        assert self._engine.snapshot().kv_used_bytes == 0
        assert self._engine.snapshot().waiting_tokens == 0
        until(lambda: not self._live.server.server_state.connections)


def until(condition: Callable[[], object]) -> None:
    deadline_s = time.monotonic() + WAIT_S
    while not condition():
        assert time.monotonic() < deadline_s, "it does not come to that"
        time.sleep(0.0005)


def departures(folder: Path, n: int, seed: int) -> Iterator[Departure]:
    """`n` clients leave, in all phases, streamed and not. Raises AssertionError for one whose row
    is not free after two steps, or who leaves something behind."""
    rng, turnstile = random.Random(seed), Turnstile()
    with serving(folder, SETTINGS, turnstile.install) as (live, engine):
        scene = Scene(live, engine, turnstile)
        for i in range(n):
            yield scene.depart(PHASES[i % 3], i // 3 % 2 == 0, rng)
