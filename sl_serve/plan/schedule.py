"""What each step of a workload has to do, by the packer's rule: every decoding row one token, the
prefill budget shared, oldest first; a row is recycled in the step after its request ended.

Requests are equal, so nothing needs to be played step by step. Prompt tokens lie on one line, cut
into steps of the budget: request i is read from start[i] to end[i] on it, where

    start[i] = max(end[i - 1], budget * step in which request i - rows gave its row back)

The step that reads its last prompt token gives its first token; output_tokens - 1 steps follow.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

from sl_serve.plan.hardware import Floats
from sl_serve.plan.placement import Workload

Ints = npt.NDArray[np.int64]

# A longer workload is taken as a multiple of this many times the rows: its steps repeat.
MAX_ROUNDS = 6
MAX_STEPS = 256  # more are averaged over neighbours


@dataclass(frozen=True, slots=True)
class Steps:
    """Loads of steps, one array element each; `n_repeats` says how many steps it stands for."""

    n_repeats: Floats
    n_decode: Floats  # rows that decode
    n_prefill: Floats  # prompt tokens
    n_samples: Floats  # rows through the head
    n_rows: Floats
    prefix_tokens: Floats  # cached before the step, of the rows that take part
    attended_tokens: Floats  # sum over new tokens of the context they attend to

    @property
    def n_tokens(self) -> Floats:
        return self.n_decode + self.n_prefill


def decode_step(workload: Workload, n_rows: int) -> Steps:
    """All rows decode, on average half through their output."""
    context = workload.prompt_tokens + workload.output_tokens / 2
    return _one(n_rows, 0, n_rows, n_rows, n_rows * context, n_rows * (context + 1))


def prefill_step(workload: Workload, n_tokens: int) -> Steps:
    """Nothing but n_tokens of prompts."""
    n_prompts = n_tokens / workload.prompt_tokens
    pairs = n_prompts * _pairs(np.float64(workload.prompt_tokens))
    return _one(0, n_tokens, n_prompts, np.ceil(n_prompts), 0, float(pairs))


def _one(*loads: float) -> Steps:
    return Steps(np.ones(1), *(np.array([load], dtype=np.float64) for load in loads))


def steps_of(workload: Workload, n_rows: int, prefill_tokens: int) -> Steps:
    """All steps of the workload, with at most n_rows requests at once."""
    n_rows = min(n_rows, workload.n_requests)
    n = min(workload.n_requests, MAX_ROUNDS * n_rows)
    start, end = _prompt_lines(workload, n, n_rows, prefill_tokens)
    first = (end - 1) // prefill_tokens  # the step that gives a request's first token
    last = first + workload.output_tokens - 1
    n_steps = int(last[-1]) + 1
    n_decode = np.cumsum(_count(first + 1, n_steps) - _count(last + 1, n_steps))
    firsts = np.cumsum(_sum(first + 1, first, n_steps) - _sum(last + 1, first, n_steps))
    # In step t a row whose first token came in step f attends to prompt + (t - f) tokens.
    decode_context = n_decode * (workload.prompt_tokens + np.arange(n_steps)) - firsts
    prompt = _read_prompts(start, end, np.arange(n_steps + 1) * prefill_tokens)
    steps = Steps(
        n_repeats=np.full(n_steps, workload.n_requests / n),
        n_decode=n_decode,
        n_prefill=np.diff(prompt.tokens),
        n_samples=n_decode + _count(first, n_steps),
        n_rows=n_decode + _overlaps(start, end, n_steps, prefill_tokens),
        prefix_tokens=decode_context - n_decode + prompt.of_unfinished[:-1],
        attended_tokens=decode_context + np.diff(prompt.pairs),
    )
    return _thinned(steps)


def _prompt_lines(workload: Workload, n: int, n_rows: int, budget: int) -> tuple[Ints, Ints]:
    """start and end of n prompts, round by round: the rows of one are given back in the last.

    In a round, end[i] = max(end[i - 1], free[i]) + prompt is a running maximum in disguise.
    """
    prompt = workload.prompt_tokens
    ends: list[Ints] = []
    free_at, busy_until = np.zeros(n_rows, dtype=np.int64), 0
    for begin in range(0, n, n_rows):
        free = np.maximum(free_at[: min(n_rows, n - begin)], busy_until)
        before = prompt * np.arange(len(free))
        end = np.maximum.accumulate(free - before) + before + prompt
        ends.append(end)
        busy_until = int(end[-1])
        free_at = budget * ((end - 1) // budget + workload.output_tokens)
    end = np.concatenate(ends)
    return end - prompt, end


@dataclass(frozen=True, slots=True)
class _Read:
    """Of the prompts, up to points of the line: tokens read, tokens attended to, and how much of
    the prompt that is being read."""

    tokens: Floats
    pairs: Floats
    of_unfinished: Floats


def _read_prompts(start: Ints, end: Ints, points: Ints) -> _Read:
    prompt = int(end[0] - start[0])
    n_done = np.searchsorted(end, points, side="right")
    beginning = np.append(start, np.iinfo(np.int64).max)[n_done]
    part = np.maximum(points - np.minimum(beginning, points), 0).astype(np.float64)
    return _Read(n_done * prompt + part, n_done * _pairs(np.float64(prompt)) + _pairs(part), part)


def _overlaps(start: Ints, end: Ints, n_steps: int, budget: int) -> Floats:
    """How many prompts each step reads from."""
    opened = _count(start // budget, n_steps)
    closed = _count((end - 1) // budget + 1, n_steps)
    return np.asarray(np.cumsum(opened - closed))


def _pairs(n: Floats | np.float64) -> Floats:
    """1 + 2 + ... + n: what n tokens from the beginning attend to."""
    return np.asarray(n * (n + 1) / 2)


def _count(at: Ints, n_steps: int) -> Floats:
    return np.bincount(at, minlength=n_steps)[:n_steps].astype(np.float64)


def _sum(at: Ints, values: Ints, n_steps: int) -> Floats:
    sums = np.bincount(at, weights=values.astype(np.float64), minlength=n_steps)
    return sums[:n_steps].astype(np.float64)


def _thinned(steps: Steps) -> Steps:
    """At most MAX_STEPS elements: means over runs of equal length, sums unchanged."""
    run = -(-len(steps.n_repeats) // MAX_STEPS)
    if run == 1:
        return steps
    begins = np.arange(0, len(steps.n_repeats), run)
    lengths = np.diff(np.append(begins, len(steps.n_repeats)))

    def mean(values: Floats) -> Floats:
        return np.asarray(np.add.reduceat(values, begins) / lengths)

    return Steps(
        n_repeats=mean(steps.n_repeats) * lengths,
        n_decode=mean(steps.n_decode),
        n_prefill=mean(steps.n_prefill),
        n_samples=mean(steps.n_samples),
        n_rows=mean(steps.n_rows),
        prefix_tokens=mean(steps.prefix_tokens),
        attended_tokens=mean(steps.attended_tokens),
    )
