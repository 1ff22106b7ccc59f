"""Requests that wait for a row: ordered, bounded, and safe to call from any thread."""

from __future__ import annotations

import heapq
import threading
from collections.abc import Sequence

from sl_serve.config import QueueConfig
from sl_serve.core import Request
from sl_serve.errors import QueueFullError, RequestError
from sl_serve.sched.residents import seniority


class WaitingQueue:
    """Priority first, then arrival. Checked and counted under one lock, so that a burst cannot
    slip past the limit. Background requests are bounded by whoever sends them: they neither meet
    the limits nor bring others to them."""

    def __init__(self, limits: QueueConfig) -> None:
        self._limits = limits
        self._lock = threading.Lock()
        self._heap: list[tuple[tuple[int, int], Request]] = []
        self._n_requests = 0  # without the background's, as _n_tokens
        self._n_tokens = 0
        self._next_sequence_no = 0

    def __len__(self) -> int:
        return len(self._heap)

    @property
    def n_requests(self) -> int:
        """That wait, without the background's."""
        return self._n_requests

    @property
    def n_tokens(self) -> int:
        """Prompt and requested output tokens of what waits, without the background's."""
        return self._n_tokens

    def push(self, requests: Sequence[Request], retry_after_s: int) -> None:
        """Add all or none. Raises QueueFullError, or RequestError for what could never fit."""
        counted = [r for r in requests if _counts(r)]
        n_requests, tokens = len(counted), sum(map(_cost_tokens, counted))
        limits = self._limits
        if n_requests > limits.max_requests or tokens > limits.max_tokens:
            raise RequestError(
                f"{n_requests} choices with {tokens} tokens are more than the queue ever holds "
                f"({limits.max_requests} requests, {limits.max_tokens} tokens); ask for fewer"
            )
        with self._lock:
            n_after, tokens_after = self._n_requests + n_requests, self._n_tokens + tokens
            if counted and (n_after > limits.max_requests or tokens_after > limits.max_tokens):
                raise QueueFullError(
                    f"the queue holds {self._n_requests} of {limits.max_requests} requests "
                    f"and {self._n_tokens} of {limits.max_tokens} tokens; "
                    f"{n_requests} more with {tokens} tokens do not fit",
                    retry_after_s,
                )
            for request in requests:
                request.sequence_no = self._next_sequence_no
                self._next_sequence_no += 1
                self._add(request)

    def push_back(self, requests: Sequence[Request]) -> None:
        """Return parked requests to their old place; never refused."""
        with self._lock:
            for request in requests:
                self._add(request)

    def peek(self) -> Request | None:
        with self._lock:
            return self._heap[0][1] if self._heap else None

    def pop(self, request: Request) -> None:
        """Take out a request, wherever it stands."""
        with self._lock:
            self._heap.remove((seniority(request), request))
            heapq.heapify(self._heap)
            self._count(request, -1)

    def drain(self) -> list[Request]:
        """Empty the queue."""
        with self._lock:
            requests = [r for _, r in self._heap]
            self._heap.clear()
            self._n_requests = self._n_tokens = 0
        return requests

    def _add(self, request: Request) -> None:
        heapq.heappush(self._heap, (seniority(request), request))
        self._count(request, 1)

    def _count(self, request: Request, sign: int) -> None:
        if _counts(request):
            self._n_requests += sign
            self._n_tokens += sign * _cost_tokens(request)


def _counts(request: Request) -> bool:
    return not request.is_background


def _cost_tokens(request: Request) -> int:
    return request.n_prompt + (request.sampling.max_tokens or 0)
