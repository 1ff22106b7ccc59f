"""The engine thread: the only place that composes queue, packer, sweep, sampler and delivery.

Any thread may submit and abort; everything else happens on the engine's own thread, at step
boundaries. One turn: take out aborted requests, make room for the running rows, admit waiting
ones, pack, step, deliver.
"""

from __future__ import annotations

import logging
import secrets
import sys
import threading
import time
from collections.abc import Callable, Sequence
from dataclasses import replace

import torch

from sl_serve.admission import check_request
from sl_serve.config import EngineConfig
from sl_serve.core import FinishReason, Request, StepPlan
from sl_serve.deliveries import Deliveries
from sl_serve.delivery import Delivery
from sl_serve.device.out_of_memory import is_out_of_memory
from sl_serve.errors import EngineClosedError, EngineDeadError, SlServeError
from sl_serve.loader import Parts
from sl_serve.logits import FailedRowsError, RowResult
from sl_serve.sched.packer import pack
from sl_serve.sched.queue import WaitingQueue
from sl_serve.sched.residents import TYPICAL_OUTPUT_TOKENS
from sl_serve.sched.step_limit import StepLimit
from sl_serve.stats import EngineSnapshot, EngineState, StepStats, Totals, step_stats
from sl_serve.tokenizer import Tokenizer

logger = logging.getLogger(__name__)

StepObserver = Callable[[StepStats], None]
CLOSE_TIMEOUT_S = 4  # a hung step must not keep the process; the thread is a daemon
MAX_RETRY_AFTER_S = 120  # OpenAI's client gives up at once beyond it


class Engine:
    """Runs requests until `close`. Starts its thread at once."""

    def __init__(self, parts: Parts, tokenizer: Tokenizer, config: EngineConfig) -> None:
        self.tokenizer = tokenizer
        self.plan = parts.plan
        self.max_model_len = parts.plan.max_model_len
        self.vocab_size = parts.sweep.config.vocab_size
        self.n_parameters = parts.n_parameters
        self.max_rows = parts.plan.max_rows
        self.n_sub_batches = parts.plan.n_sub_batches
        self.memory_tiers = parts.plan.tiers()
        self._parts = parts
        self._queue = WaitingQueue(config.queue)
        self._observers: list[StepObserver] = []
        self._totals = Totals()
        self._limit = StepLimit()
        self._background_waited = False  # in the last step
        self._state = EngineState.RUNNING
        self._reason: str | None = None
        self._changed = threading.Condition()  # guards what other threads touch
        self._deliveries = Deliveries(self._changed, self._release)
        self._thread = threading.Thread(target=self._run, name="engine", daemon=True)
        self._thread.start()

    # Called from any thread.

    def submit(self, requests: Sequence[Request]) -> None:
        """Queue all of them or none.

        Raises RequestError, QueueFullError, EngineClosedError, EngineDeadError.
        """
        for request in requests:
            check_request(request, self.vocab_size, self.max_model_len)
            sampling = request.sampling
            request.repeatable = sampling.seed is not None and sampling.temperature > 0
            if sampling.seed is None:
                request.sampling = replace(sampling, seed=secrets.randbits(63))
            most = self.max_model_len
            if sampling.max_tokens is not None:
                most = min(most, request.n_prompt + sampling.max_tokens)
            request.most_tokens, request.arrival_s = most, time.monotonic()
        deliveries = [Delivery(r, self.tokenizer, self.max_model_len) for r in requests]
        with self._changed:
            self._check_state()
            # The engine thread takes from the queue without this lock: whatever it finds there
            # must have its delivery.
            self._deliveries.add(deliveries)
            try:
                self._queue.push(requests, self._retry_after_s())
            except SlServeError:
                self._deliveries.remove(deliveries)
                raise
            self._changed.notify_all()

    def abort(self, request_id: str) -> None:
        """End a request at the next step boundary; unknown ids are ignored."""
        self._deliveries.abort(request_id)

    def on_step(self, observer: StepObserver) -> None:
        """`observer` is called on the engine thread after each step; it must not block or raise."""
        self._observers.append(observer)

    def snapshot(self) -> EngineSnapshot:
        residents = self._parts.residents
        n_requests = len(self._deliveries)
        return self._totals.snapshot(
            state=self._state,
            reason=self._reason,
            n_waiting=len(self._queue),
            n_waiting_requests=self._queue.n_requests,
            n_running=max(0, n_requests - len(self._queue)),
            waiting_tokens=self._queue.n_tokens,
            kv_used_bytes=residents.used_bytes,
            kv_total_bytes=self.plan.kv_bytes + self.plan.device_kv_bytes,
        )

    def drain(self, timeout_s: float) -> bool:
        """Refuse new requests and wait until the owners of the present ones have heard of their
        ends. True when all have."""
        with self._changed:
            if self._state is EngineState.RUNNING:
                self._state = EngineState.DRAINING
            return self._changed.wait_for(lambda: self._deliveries.all_heard, timeout_s)

    def close(self) -> None:
        """Stop at the next step boundary; requests that are left end with an error. Idempotent."""
        with self._changed:
            if self._state is not EngineState.DEAD:
                self._state = EngineState.CLOSED
            self._changed.notify_all()
        if threading.current_thread() is not self._thread:
            self._thread.join(CLOSE_TIMEOUT_S)
            if not self._thread.is_alive():
                self._parts.close()

    # The engine thread.

    def _run(self) -> None:
        try:
            with torch.inference_mode():
                while self._wait_for_work():
                    self._turn()
            self._end_all("the server is shutting down")
        except Exception as error:
            logger.exception("the engine failed")
            self._die(f"{type(error).__name__}: {error}")

    def _wait_for_work(self) -> bool:
        """False when the engine is to stop."""
        with self._changed:
            if not self._deliveries:
                self._parts.residents.check_integrity()
            self._changed.wait_for(lambda: self._deliveries or self._state is EngineState.CLOSED)
            self._totals.working()
            return self._state is not EngineState.CLOSED

    def _turn(self) -> None:
        self._take_out_aborted()
        parked = self._parts.residents.make_room()
        self._queue.push_back(parked)
        self._admit(parked)
        self._totals.n_parked += len(parked)
        memory = self._parts.plan
        plan = pack(
            self._parts.residents,
            memory.prefill_tokens,
            memory.n_sub_batches,
            memory.max_sub_batch_tokens,
            self._limit.tokens,
            self._background_tokens(),
        )
        if plan.sub_batches:
            self._step(plan)

    def _background_tokens(self) -> int:
        """Where a step takes as long as it has tokens, one that reads an interactive prompt is no
        longer than one in which every row decodes; not twice in a row, or a stream of prompts would
        hold up the others. Where layers stream to a device, tokens more or less make no
        difference."""
        residents = self._parts.residents
        waits = self._parts.sweep.device.in_place and residents.has_waiting_prompt
        self._background_waited = waits and not self._background_waited
        n_rows = min(len(residents), residents.max_rows)
        return n_rows if self._background_waited else sys.maxsize

    def _take_out_aborted(self) -> None:
        for request in self._deliveries.take_aborted():
            if request not in self._parts.residents:
                self._queue.pop(request)
            self._deliveries.end(request, FinishReason.ABORT)

    def _admit(self, parked: list[Request]) -> None:
        """`parked`: this turn; grows by what gives way. What they left is for the rows that run and
        for better priorities."""
        residents = self._parts.residents
        while (request := self._queue.peek()) is not None:
            if parked and request.priority >= min(p.priority for p in parked):
                return
            while not residents.admit(request, self._expected_tokens(request)):
                gone = residents.give_way(request)
                if gone is None:
                    return
                self._queue.push_back([gone])
                parked.append(gone)
            self._queue.pop(request)

    def _expected_tokens(self, request: Request) -> int:
        """The request's probable final length. One that has outgrown the guess doubles it."""
        max_tokens = request.sampling.max_tokens
        output = TYPICAL_OUTPUT_TOKENS if max_tokens is None else max_tokens
        expected = request.n_prompt + output
        if request.n_tokens > expected:
            expected = 2 * request.n_tokens
        return min(expected, self.max_model_len)

    def _step(self, plan: StepPlan) -> None:
        sweep = self._parts.sweep
        started_s = time.monotonic()
        before = sweep.bytes_moved
        results = self._computed(plan)
        if results is None:
            return
        wall_s = time.monotonic() - started_s
        stats = step_stats(plan, wall_s, before, sweep.bytes_moved, sweep.device.stall_s())
        n_generated = sum(w.samples for s in plan.sub_batches for w in s.rows)
        self._totals.add(stats, n_generated)
        for observer in self._observers:
            observer(stats)
        for result in results:  # last: whoever has an answer finds all its steps counted
            result.work.request.n_cached = result.work.stop
            self._deliveries.feed(result)

    def _computed(self, plan: StepPlan) -> list[RowResult] | None:
        """None where the step failed and the engine goes on: `n_cached` has moved for no row, so
        the next turn packs them again, and their K and V are written again. A failure that may
        have spoiled more than the step is raised."""
        try:
            hidden = self._parts.sweep.run(plan, self._parts.residents.slabs)
            results = [
                result
                for sub_batch, states in zip(plan.sub_batches, hidden, strict=True)
                for result in self._parts.head.results(sub_batch, states)
            ]
            self._limit.passed()
            return results
        except FailedRowsError as error:
            for request in error.requests:
                logger.error("request %s: %s", request.request_id, error)
                self._deliveries.end(request, FinishReason.ERROR, str(error))
            self._parts.sweep.restart()  # hidden states that nobody took may be on their way
            return None
        except Exception as error:
            if not is_out_of_memory(error):
                raise
            reason = f"{type(error).__name__}: {error}"
        # Not in the handler: while an exception lives, so do the tensors of its frames.
        self._shrink(plan, reason)
        return None

    def _shrink(self, plan: StepPlan, reason: str) -> None:
        """Memory ran short in the step: smaller ones from here on, down to one token; where that
        is too much, its request ends."""
        self._totals.n_short_of_memory += 1
        self._parts.sweep.restart()
        if plan.n_tokens > 1:
            self._limit.halve(plan.n_tokens)
            logger.warning(
                "memory ran short in a step of %d tokens, the next ones have at most %d (%s)",
                plan.n_tokens,
                self._limit.tokens,
                reason,
            )
            return
        self._limit.lift()
        request = plan.sub_batches[0].rows[0].request
        logger.error("request %s: memory ran short for it alone (%s)", request.request_id, reason)
        self._deliveries.end(
            request, FinishReason.ERROR, f"memory ran short for it alone: {reason}"
        )

    def _release(self, request: Request) -> None:
        if request in self._parts.residents:
            self._parts.residents.release(request)

    def _end_all(self, reason: str) -> None:
        self._queue.drain()
        self._deliveries.end_all(reason)

    def _die(self, reason: str) -> None:
        """Every present and later request hears the reason."""
        with self._changed:
            self._state, self._reason = EngineState.DEAD, reason
        self._end_all(reason)

    def _check_state(self) -> None:
        if self._state is EngineState.DEAD:
            raise EngineDeadError(self._reason)
        if self._state is not EngineState.RUNNING:
            raise EngineClosedError("the server is shutting down and takes no new requests")

    def _retry_after_s(self) -> int:
        """When half of what waits will probably have run, at the rate seen so far."""
        rate = self._totals.tokens_per_s()
        wait_s = self._queue.n_tokens / 2 / rate if rate else 1.0
        return int(min(max(wait_s, 1), MAX_RETRY_AFTER_S))
