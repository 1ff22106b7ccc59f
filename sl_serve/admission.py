"""What a request must be before it may wait for a row. Every front, HTTP or not, asks here."""

from __future__ import annotations

import math
from collections.abc import Collection
from numbers import Real
from typing import NamedTuple

from sl_serve.core import Request, SamplingParams
from sl_serve.errors import RequestError


class Range(NamedTuple):
    """Both ends included."""

    lowest: float
    highest: float = math.inf

    def __str__(self) -> str:
        if self.highest == math.inf:
            return f"at least {self.lowest}"
        return f"from {self.lowest} to {self.highest}"


# What the numbers of SamplingParams may be; float32 logits stay finite under all of them.
RANGES = {
    "temperature": Range(0, 2),
    "top_p": Range(0, 1),
    "min_p": Range(0, 1),
    "presence_penalty": Range(-2, 2),
    "frequency_penalty": Range(-2, 2),
    "repetition_penalty": Range(0.01, 10),
}
LOGIT_BIAS = Range(-100, 100)
INTEGERS = {
    "max_tokens": Range(0),
    "min_tokens": Range(0),
    "top_k": Range(0),
    "seed": Range(-(2**63), 2**63 - 1),
    "logprobs": Range(0),
    "prompt_logprobs": Range(0),
}
MAY_BE_NONE = {"max_tokens", "seed", "logprobs", "prompt_logprobs"}


def check_request(request: Request, vocab_size: int, max_model_len: int) -> None:
    """Raise RequestError, with the numbers, for what could never run."""
    n_prompt = request.n_prompt
    if n_prompt == 0:
        raise RequestError("the prompt is empty; it needs at least one token", "prompt")
    check_vocabulary(request.prompt_ids, vocab_size, "prompt")
    check_sampling(request.sampling, vocab_size)
    needs = n_prompt + (0 if request.sampling.max_tokens == 0 else 1)
    if needs > max_model_len:
        raise RequestError(
            f"the prompt has {n_prompt} tokens, the context {max_model_len}; shorten the prompt",
            "prompt",
            "context_length_exceeded",
        )


def check_sampling(sampling: SamplingParams, vocab_size: int) -> None:
    """Raise RequestError for numbers and ids that the sampler cannot work with."""
    for name, limits in RANGES.items():
        _check_number(name, getattr(sampling, name), limits)
    for name, limits in INTEGERS.items():
        value = getattr(sampling, name)
        if value is not None or name not in MAY_BE_NONE:
            _check_number(name, value, limits, integer=True)
    check_vocabulary(sampling.logit_bias, vocab_size, "logit_bias")
    for bias in sampling.logit_bias.values():
        _check_number("logit_bias", bias, LOGIT_BIAS)
    check_vocabulary(sampling.stop_token_ids, vocab_size, "stop_token_ids")
    for stop in sampling.stop:
        if not isinstance(stop, str) or not stop:
            raise RequestError(f"'stop' has {stop!r}; give texts that are not empty.", "stop")


def check_vocabulary(ids: Collection[int], vocab_size: int, param: str) -> None:
    """Raise RequestError unless all `ids` are token ids."""
    kinds = set(map(type, ids))
    if any(not hasattr(kind, "__index__") for kind in kinds):
        wrong: object = next(i for i in ids if not hasattr(i, "__index__"))
    elif ids and not (min(ids) >= 0 and max(ids) < vocab_size):
        wrong = next(i for i in ids if not 0 <= i < vocab_size)
    else:
        return
    raise RequestError(
        f"'{param}' has the token id {wrong}; the vocabulary has ids 0 to {vocab_size - 1}.", param
    )


def _check_number(name: str, value: object, limits: Range, integer: bool = False) -> None:
    """NaN is in no range."""
    is_number = hasattr(value, "__index__") if integer else isinstance(value, Real)
    if not is_number or not limits.lowest <= value <= limits.highest:  # type: ignore[operator]
        kind = "an integer" if integer else "a number"
        raise RequestError(f"'{name}' is {value}; it must be {kind}, {limits}.", name)
