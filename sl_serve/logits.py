"""From hidden states to sampled tokens, a few lines of the vocabulary matrix's product at a time.

A full (tokens, vocabulary) matrix would be the largest buffer of a step; blocks of lines keep it
small and in cache, and one buffer serves them all.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from contextlib import closing
from typing import NamedTuple

import torch

from sl_serve.core import Request, RowWork, SubBatchPlan, TokenLogprob
from sl_serve.errors import SlServeError
from sl_serve.ops import Ops
from sl_serve.sampling import NonFiniteLogitsError, SampledToken, prompt_logprobs, sample
from sl_serve.weights.head import HeadWeight

HeadInput = Callable[[torch.Tensor], torch.Tensor]


class FailedRowsError(SlServeError):
    """Of some rows the model makes nothing; the others are well."""

    def __init__(self, requests: Sequence[Request], reason: Exception) -> None:
        super().__init__(f"{type(reason).__name__}: {reason}")
        self.requests = requests


class RowResult(NamedTuple):
    """What one row of a step gave: prompt log probabilities in order, and perhaps a token."""

    work: RowWork
    prompt_logprobs: list[TokenLogprob]  # of prompt tokens work.start + 1 .. work.stop
    sampled: SampledToken | None


class Head:
    """`weight`: the vocabulary matrix; `head_input`: what comes before it, the final norm;
    `block_lines`: of logits at a time, all in one buffer; `softcap`: as in ModelConfig; `bias`:
    (vocabulary,) on the device."""

    def __init__(
        self,
        ops: Ops,
        weight: HeadWeight,
        head_input: HeadInput,
        eos_token_ids: Sequence[int],
        block_lines: int,
        torch_device: torch.device,
        softcap: float | None = None,
        bias: torch.Tensor | None = None,
    ) -> None:
        self._ops = ops
        self._weight = weight
        self._head_input = head_input
        self._eos_token_ids = eos_token_ids
        self._block_lines = block_lines
        self._softcap = softcap
        self._bias = bias
        shape = (block_lines, weight.n_rows)
        self._buffer = torch.empty(shape, dtype=ops.dtype, device=torch_device)

    def results(self, plan: SubBatchPlan, hidden: torch.Tensor) -> list[RowResult]:
        """`hidden`: (T, hidden) of the sub-batch's tokens after the last layer.

        Raises FailedRowsError.
        """
        works = _with_first_lines(plan)
        lines = [first + w.n_new - 1 for first, w in works if _draws(w)]
        drawing = [w.request for _, w in works if _draws(w)]
        sampled: dict[str, SampledToken] = {}
        for start in range(0, len(lines), self._block_lines):
            block = slice(start, start + self._block_lines)
            logits = self.logits(hidden[lines[block]])
            tokens = self._sample(logits, drawing[block])
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

    def _sample(self, logits: torch.Tensor, requests: Sequence[Request]) -> list[SampledToken]:
        try:
            return sample(logits, requests, self._eos_token_ids)
        except NonFiniteLogitsError as error:
            raise FailedRowsError([requests[i] for i in error.lines], error) from None

    def _prompt_logprobs(self, work: RowWork, hidden: torch.Tensor) -> list[TokenLogprob]:
        n_top = work.request.sampling.prompt_logprobs
        if n_top is None:
            return []
        targets = work.request.prompt_ids[work.start + 1 : work.stop + 1]
        found: list[TokenLogprob] = []
        for start in range(0, len(targets), self._block_lines):
            block = targets[start : start + self._block_lines]
            logits = self.logits(hidden[start : start + len(block)])
            found += prompt_logprobs(logits, block, n_top)
        return found

    def close(self) -> None:
        self._weight.close()

    def logits(self, hidden: torch.Tensor) -> torch.Tensor:
        """(n, vocabulary) float32, n <= block_lines; valid until the next call."""
        out = self._buffer[: len(hidden)]
        x = self._head_input(hidden)
        with closing(self._weight.pieces()) as pieces:
            for first, rows in pieces:
                self._ops.logits(x, rows, out[:, first : first + len(rows)])
        logits = out.float()
        if self._bias is not None:
            logits += self._bias
        if self._softcap is not None:
            logits.div_(self._softcap).tanh_().mul_(self._softcap)
        return logits


def _draws(work: RowWork) -> bool:
    return work.samples and work.request.sampling.max_tokens != 0


def _with_first_lines(plan: SubBatchPlan) -> list[tuple[int, RowWork]]:
    works = []
    first = 0
    for work in plan.rows:
        works.append((first, work))
        first += work.n_new
    return works
