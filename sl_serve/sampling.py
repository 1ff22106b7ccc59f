"""Logits to token ids, each row by its own rules, whatever stands beside it.

A draw depends on (seed, number of the token) alone, through a counter-based generator, so the
same request gives the same tokens alone, in a crowd, and after it was parked.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import torch

from sl_serve.constraints import allowed_ids
from sl_serve.core import Request, SamplingParams, TokenLogprob
from sl_serve.errors import SlServeError

# A nucleus is nearly always among this many tokens; only when it is not, the whole row is sorted.
NUCLEUS_GUESS = 256
# Below it a float32 logit divided by it may leave the range of float64; greedy is the limit.
MIN_TEMPERATURE = 1e-200


class NonFiniteLogitsError(SlServeError):
    """The model produced NaN or infinity: no token can be drawn from that. `lines`: where."""

    def __init__(self, lines: Sequence[int]) -> None:
        super().__init__("the model produced logits that are not finite numbers")
        self.lines = lines


@dataclass(frozen=True, slots=True)
class SampledToken:
    token_id: int
    logprob: TokenLogprob | None


def sample(
    logits: torch.Tensor, requests: Sequence[Request], eos_token_ids: Sequence[int]
) -> list[SampledToken]:
    """Draw one token per row of `logits` (n, vocabulary), float32; the tensor is used up.

    The best token of each row is found where the logits are; rows that need more than that go to
    the host one by one.
    """
    greedy = best_tokens(logits)
    for i, request in enumerate(requests):
        if request.constraint is not None and _takes_the_best(request):
            greedy[i] = int(_constrain(logits[i], request).argmax())
    return [
        SampledToken(greedy[i], None)
        if _takes_the_best(request)
        else _sample_row(logits[i].cpu(), request, eos_token_ids)
        for i, request in enumerate(requests)
    ]


def best_tokens(logits: torch.Tensor) -> list[int]:
    """Of each row (n, vocabulary); raises NonFiniteLogitsError."""
    finite = torch.isfinite(logits.amax(dim=-1))
    if not finite.all():
        raise NonFiniteLogitsError((~finite).nonzero().flatten().tolist())
    ids: list[int] = logits.argmax(dim=-1).tolist()
    return ids


def _takes_the_best(request: Request) -> bool:
    """Whether the largest of the model's own logits is all that is asked for."""
    params = request.sampling
    return (
        params.temperature < MIN_TEMPERATURE
        and params.logprobs is None
        and not params.logit_bias
        and params.repetition_penalty == 1.0
        and not (params.presence_penalty or params.frequency_penalty)
        and len(request.output_ids) >= params.min_tokens
    )


def _sample_row(
    logits: torch.Tensor, request: Request, eos_token_ids: Sequence[int]
) -> SampledToken:
    n_top = request.sampling.logprobs
    logprobs = None if n_top is None else torch.log_softmax(logits, dim=-1)
    _constrain(logits, request)
    _adjust(logits, request, eos_token_ids)
    if request.sampling.temperature < MIN_TEMPERATURE:
        token_id = int(logits.argmax())
    else:
        token_id = _draw(logits, request)
    if logprobs is None:
        return SampledToken(token_id, None)
    return SampledToken(token_id, token_logprob(logprobs, token_id, n_top or 0))


def token_logprob(logprobs: torch.Tensor, token_id: int, n_top: int) -> TokenLogprob:
    """`logprobs`: (vocabulary,). The token's own value and those in `top` are the same floats."""
    top: tuple[tuple[int, float], ...] = ()
    if n_top:
        values, ids = logprobs.topk(min(n_top, len(logprobs)))
        top = tuple(zip(ids.tolist(), values.tolist(), strict=True))
    return TokenLogprob(token_id, float(logprobs[token_id]), top)


def prompt_logprobs(logits: torch.Tensor, targets: Sequence[int], n_top: int) -> list[TokenLogprob]:
    """What the model thought of the tokens that follow: logits (n, vocabulary), targets (n,)."""
    logprobs = torch.log_softmax(logits, dim=-1).cpu()
    return [token_logprob(row, t, n_top) for row, t in zip(logprobs, targets, strict=True)]


def _constrain(logits: torch.Tensor, request: Request) -> torch.Tensor:
    """`logits` (vocabulary,), in place: no token that the request's constraint forbids."""
    mask = None if request.constraint is None else request.constraint.mask()
    if mask is None:
        return logits
    allowed = torch.from_numpy(allowed_ids(mask, len(logits))).to(logits.device)
    return logits.masked_fill_(~allowed, -torch.inf)


def _adjust(logits: torch.Tensor, request: Request, eos_token_ids: Sequence[int]) -> None:
    """Bias, bans and penalties, in place."""
    params = request.sampling
    if params.logit_bias:
        biased = torch.tensor(list(params.logit_bias))
        logits[biased] += torch.tensor(list(params.logit_bias.values()))
    if params.repetition_penalty != 1.0:
        _penalise_repetition(logits, request, params.repetition_penalty)
    if (params.presence_penalty or params.frequency_penalty) and request.output_ids:
        ids, counts = np.unique(request.output_ids, return_counts=True)
        penalty = params.presence_penalty + params.frequency_penalty * counts
        logits[torch.from_numpy(ids)] -= torch.from_numpy(penalty).float()
    if len(request.output_ids) < params.min_tokens:
        banned = {*params.stop_token_ids, *(() if params.ignore_eos else eos_token_ids)}
        # Not infinity: where every token is banned, one of them is drawn all the same.
        logits[list(banned)] = logits[list(banned)].clamp(max=torch.finfo(logits.dtype).min)


def _penalise_repetition(logits: torch.Tensor, request: Request, penalty: float) -> None:
    ids = torch.from_numpy(np.unique(request.token_ids(0, request.n_tokens)))
    seen = logits[ids]
    logits[ids] = torch.where(seen > 0, seen / penalty, seen * penalty)


def _draw(logits: torch.Tensor, request: Request) -> int:
    params = request.sampling
    assert params.seed is not None, "the engine draws one at submission"
    uniform = _uniform(params.seed, len(request.output_ids))
    probs = torch.softmax(logits.double() / params.temperature, dim=-1)
    if params.top_k or params.top_p < 1.0 or params.min_p > 0.0:
        probs, ids = _truncate(probs, params)
        return int(ids[_inverse_cdf(probs, uniform)])
    return _inverse_cdf(probs, uniform)


def _truncate(probs: torch.Tensor, params: SamplingParams) -> tuple[torch.Tensor, torch.Tensor]:
    """The tokens that top_k, top_p and min_p leave, most probable first; not renormalised.

    top_p keeps the smallest set that reaches its mass (arXiv 1904.09751), measured after top_k;
    min_p keeps what has at least that share of the best token's probability (arXiv 2407.01082).
    """
    best, ids = probs.topk(min(params.top_k or NUCLEUS_GUESS, len(probs)))
    if not params.top_k and len(best) < len(probs) and not _closed(best, params):
        best, ids = probs.sort(descending=True)
    before = best.cumsum(0) - best
    total = best.sum() if params.top_k else 1.0
    keep = (before < params.top_p * total) & (best >= params.min_p * best[0])
    keep[0] = True
    return best[keep], ids[keep]


def _closed(best: torch.Tensor, params: SamplingParams) -> bool:
    """Whether what is left out could not have been kept either. `best` is sorted."""
    reached = params.top_p < 1.0 and bool(best.sum() >= params.top_p)
    return reached or bool(best[-1] < params.min_p * best[0])


def _inverse_cdf(probs: torch.Tensor, uniform: float) -> int:
    cumulative = probs.cumsum(0)
    # uniform <= 1 - 2**-53, so the product stays below the total, whatever is rounded.
    return int(torch.searchsorted(cumulative, uniform * cumulative[-1], right=True))


def _uniform(seed: int, token_number: int) -> float:
    """In [0, 1), a function of both numbers alone (Philox, Salmon et al., SC 2011)."""
    key = np.array([int(seed) & (2**64 - 1), token_number], dtype=np.uint64)
    return float(np.random.Generator(np.random.Philox(key=key)).random())
