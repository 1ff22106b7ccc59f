"""From hidden states to sampled tokens, a few lines of the vocabulary matrix's product at a time.

A full (tokens, vocabulary) matrix would be the largest buffer of a step; blocks of lines keep it
small and in cache, and one buffer serves them all.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import NamedTuple

import torch

from sl_serve.config import LOGITS_BLOCK_LINES as BLOCK_LINES
from sl_serve.core import RowWork, SubBatchPlan, TokenLogprob
from sl_serve.ops import Ops
from sl_serve.sampling import SampledToken, prompt_logprobs, sample

HeadInput = Callable[[torch.Tensor], torch.Tensor]


class RowResult(NamedTuple):
    """What one row of a step gave: prompt log probabilities in order, and perhaps a token."""

    work: RowWork
    prompt_logprobs: list[TokenLogprob]  # of prompt tokens work.start + 1 .. work.stop
    sampled: SampledToken | None


class Head:
    """`weight`: (vocabulary, hidden); `head_input`: what comes before it, the final norm."""

    def __init__(
        self,
        ops: Ops,
        weight: torch.Tensor,
        head_input: HeadInput,
        eos_token_ids: Sequence[int],
    ) -> None:
        self._ops = ops
        self._weight = weight
        self._head_input = head_input
        self._eos_token_ids = eos_token_ids
        self._buffer = torch.empty(BLOCK_LINES, weight.shape[0], dtype=weight.dtype)

    def results(self, plan: SubBatchPlan, hidden: torch.Tensor) -> list[RowResult]:
        """`hidden`: (T, hidden) of the sub-batch's tokens after the last layer."""
        works = _with_first_lines(plan)
        lines = [first + w.n_new - 1 for first, w in works if _draws(w)]
        drawing = [w.request for _, w in works if _draws(w)]
        sampled: dict[str, SampledToken] = {}
        for start in range(0, len(lines), BLOCK_LINES):
            block = slice(start, start + BLOCK_LINES)
            logits = self._logits(hidden[lines[block]])
            tokens = sample(logits, drawing[block], self._eos_token_ids)
            for request, token in zip(drawing[block], tokens, strict=True):
                sampled[request.request_id] = token
        return [
            RowResult(
                w,
                self._prompt_logprobs(w, hidden[first : first + w.n_new]),
                sampled.get(w.request.request_id),
            )
            for first, w in works
        ]

    def _prompt_logprobs(self, work: RowWork, hidden: torch.Tensor) -> list[TokenLogprob]:
        n_top = work.request.sampling.prompt_logprobs
        if n_top is None:
            return []
        targets = work.request.prompt_ids[work.start + 1 : work.stop + 1]
        found: list[TokenLogprob] = []
        for start in range(0, len(targets), BLOCK_LINES):
            block = targets[start : start + BLOCK_LINES]
            logits = self._logits(hidden[start : start + len(block)])
            found += prompt_logprobs(logits, block, n_top)
        return found

    def _logits(self, hidden: torch.Tensor) -> torch.Tensor:
        """(n, vocabulary) float32, n <= BLOCK_LINES; valid until the next call."""
        out = self._buffer[: len(hidden)]
        self._ops.logits(self._head_input(hidden), self._weight, out)
        return out.float()


def _draws(work: RowWork) -> bool:
    return work.samples and work.request.sampling.max_tokens != 0


def _with_first_lines(plan: SubBatchPlan) -> list[tuple[int, RowWork]]:
    works = []
    first = 0
    for work in plan.rows:
        works.append((first, work))
        first += work.n_new
    return works
