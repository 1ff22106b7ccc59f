"""Outputs under a constraint: sampled, delivered, parked. The constraint here is plain Python."""

from __future__ import annotations

import math
from collections.abc import Callable, Collection
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from transformers import LlamaForCausalLM

from sl_serve.constraints import PackedMask, allowed_ids
from sl_serve.core import FinishReason, Request, SamplingParams
from sl_serve.engine import Engine
from sl_serve.sampling import sample
from tests.engine.running import Answers, config, engine, requests_for

VOCAB = 272
END = 256
WORDS = [b"red", b"green", b"great", b"blueberry"]


def pack(ids: Collection[int], vocab_size: int = VOCAB) -> PackedMask:
    words = [0] * -(-vocab_size // 32)
    for i in ids:
        words[i // 32] |= 1 << (i % 32)
    return np.array(words, np.uint32).view(np.int32)


FIRST = ord("!")  # the tiny tokenizer's id 0


class OneOf:
    """The output is one of `words`, a letter a token; with `then_end` an end may follow each."""

    failure: str | None = None

    def __init__(self, words: list[bytes], then_end: bool = False) -> None:
        self._words = words
        self._then_end = then_end
        self._ended = False
        self.accepted: list[int] = []

    def _next(self) -> set[int]:
        so_far = bytes(i + FIRST for i in self.accepted)
        longer = [w for w in self._words if w.startswith(so_far) and w != so_far]
        may_end = {END} if so_far in self._words and self._then_end else set()
        return {w[len(so_far)] - FIRST for w in longer} | may_end

    def mask(self) -> PackedMask | None:
        return pack(self._next())

    def accept(self, token_id: int) -> None:
        assert token_id in self._next(), "a token that the mask forbids, or one accepted twice"
        self._ended = token_id == END
        if not self._ended:
            self.accepted.append(token_id)

    @property
    def is_done(self) -> bool:
        return self._ended or not self._next()


class Failing(OneOf):
    """Cannot go on after two tokens."""

    def accept(self, token_id: int) -> None:
        super().accept(token_id)
        if len(self.accepted) == 2:
            self.failure = "lost the thread"


def constrained(
    n: int, make: Callable[[], OneOf], tag: str = "", **params: Any
) -> tuple[list[Request], Answers]:
    prompts = [[7 * i % 250 + 1, 5, 9 + i] for i in range(n)]
    sampling = [SamplingParams(**{"max_tokens": 40, "seed": i, **params}) for i in range(n)]
    requests, answers = requests_for(prompts, sampling, tag)
    for request in requests:
        request.constraint = make()
    return requests, answers


def text_of(answers: Answers, i: int) -> str:
    return "".join(out.text for out in answers.news[i])


def run_constrained(running: Engine, n: int, make: Callable[[], OneOf], **params: Any) -> Answers:
    requests, answers = constrained(n, make, **params)
    running.submit(requests)
    answers.wait()
    return answers


@pytest.fixture(scope="module")
def running(folder: Path) -> Any:
    with engine(folder, config(max_rows=8, n_sub_batches=2)) as running:
        yield running


def test_masks_are_little_endian_bits() -> None:
    ids = [0, 1, 31, 32, 63, 64, 100, 271]
    assert np.flatnonzero(allowed_ids(pack(ids), VOCAB)).tolist() == ids
    assert len(allowed_ids(pack(ids), VOCAB)) == VOCAB


@pytest.fixture(scope="module")
def folder(tiny: tuple[Path, LlamaForCausalLM]) -> Path:
    return tiny[0]


@pytest.mark.parametrize("temperature", [0.0, 1.0])
@pytest.mark.parametrize(
    "params",
    [
        {},
        {"top_p": 0.3},
        {"top_k": 2},
        {"min_p": 0.5},
        {"repetition_penalty": 3.0, "presence_penalty": 2.0},
        {"logit_bias": dict.fromkeys(range(50), 100.0)},
        {"min_tokens": 30},
        {"ignore_eos": True},
        {"logprobs": 2},
    ],
)
def test_outputs_keep_to_the_constraint(
    running: Engine, temperature: float, params: dict[str, Any]
) -> None:
    answers = run_constrained(running, 6, lambda: OneOf(WORDS), temperature=temperature, **params)
    for i, news in enumerate(answers.news):
        assert text_of(answers, i).encode() in WORDS
        assert news[-1].finish_reason is FinishReason.STOP
        assert news[-1].usage.completion_tokens == len(text_of(answers, i))  # no step for an end


def test_an_end_that_the_model_draws(running: Engine) -> None:
    """Where the words may go on, the model's own end is needed; it wins over min_tokens."""
    words = [b"a", b"ab", b"abc"]
    for params in ({}, {"min_tokens": 20}, {"ignore_eos": True}):
        answers = run_constrained(running, 6, lambda: OneOf(words, then_end=True), **params)
        for i, news in enumerate(answers.news):
            assert text_of(answers, i).encode() in words
            assert news[-1].finish_reason is FinishReason.STOP


def test_stop_strings_and_lengths_cut_first(running: Engine) -> None:
    answers = run_constrained(running, 4, lambda: OneOf([b"green"]), stop=("ee",))
    assert {text_of(answers, i) for i in range(4)} == {"gr"}
    answers = run_constrained(running, 4, lambda: OneOf([b"green"]), max_tokens=3)
    assert {text_of(answers, i) for i in range(4)} == {"gre"}
    assert answers.news[0][-1].finish_reason is FinishReason.LENGTH


def test_a_constraint_that_fails_ends_its_own_request(running: Engine) -> None:
    requests, answers = constrained(4, lambda: OneOf(WORDS))
    requests[1].constraint = Failing(WORDS)
    running.submit(requests)
    answers.wait()
    assert answers.news[1][-1].finish_reason is FinishReason.ERROR
    assert answers.news[1][-1].error == "lost the thread"
    assert all(text_of(answers, i).encode() in WORDS for i in (0, 2, 3))


class Broken(OneOf):
    """Has a defect."""

    def accept(self, token_id: int) -> None:
        raise KeyError(token_id)


def test_a_constraint_that_raises_ends_its_own_request(running: Engine) -> None:
    requests, answers = constrained(4, lambda: OneOf(WORDS))
    requests[1].constraint = Broken(WORDS)
    running.submit(requests)
    answers.wait()
    assert answers.news[1][-1].finish_reason is FinishReason.ERROR
    assert str(answers.news[1][-1].error).startswith("KeyError: ")
    assert all(text_of(answers, i).encode() in WORDS for i in (0, 2, 3))


SCARCE_KV_BYTES = 400_000


def test_parked_requests_go_on_where_they_were(folder: Path) -> None:
    """`OneOf` asserts that no token is accepted twice. Outputs equal those with room for all."""
    words = [bytes(range(97 + i, 117 + i)) * 4 for i in range(5)]

    def texts(kv_bytes: int) -> tuple[list[str], int]:
        settings = replace(config(max_rows=16), kv_memory_bytes=kv_bytes, max_model_len=128)
        with engine(folder, settings) as running:
            requests, answers = constrained(16, lambda: OneOf(words), max_tokens=None)
            running.submit(requests)
            answers.wait()
            n_parked = running.snapshot().n_parked_total
        return [text_of(answers, i) for i in range(16)], n_parked

    plenty, _ = texts(4 << 20)
    scarce, n_parked = texts(SCARCE_KV_BYTES)
    assert n_parked > 0
    assert scarce == plenty
    assert set(plenty) <= {word.decode() for word in words}


# The sampler alone.


def ask(allowed: Collection[int], **params: Any) -> Request:
    request = Request("r", [0], SamplingParams(**{"seed": 7, **params}), lambda _: None)
    constraint = OneOf([])
    constraint.mask = lambda: pack(allowed, 100)  # type: ignore[method-assign]
    request.constraint = constraint
    return request


def random_logits(n: int) -> torch.Tensor:
    return torch.randn((n, 100), generator=torch.Generator().manual_seed(0)) * 3


def test_greedy_is_the_best_of_what_is_allowed() -> None:
    logits = random_logits(3)
    allowed = [3, 50, 51, 99]
    requests = [
        ask(allowed, temperature=0),
        ask([7], temperature=0),
        ask(range(100), temperature=0),
    ]
    drawn = [token.token_id for token in sample(logits.clone(), requests, ())]
    best = max(allowed, key=lambda i: float(logits[0, i]))
    assert drawn == [best, 7, int(logits[2].argmax())]


def test_draws_follow_the_distribution_over_what_is_allowed() -> None:
    logits = random_logits(1)
    allowed = [3, 50, 51, 99]
    weights = {i: math.exp(float(logits[0, i])) for i in allowed}
    n = 1500
    drawn = [sample(logits.clone(), [ask(allowed, seed=s)], ())[0].token_id for s in range(n)]
    for i in allowed:
        expected = weights[i] / sum(weights.values())
        assert abs(drawn.count(i) / n - expected) < 5 * math.sqrt(expected / n)
    assert set(drawn) <= set(allowed)


@pytest.mark.parametrize("temperature", [0.0, 1.0])
def test_log_probabilities_are_the_models_own(temperature: float) -> None:
    logits = random_logits(1)
    [token] = sample(logits.clone(), [ask([5], temperature=temperature, logprobs=3)], ())
    expected = torch.log_softmax(logits[0], -1)
    assert token.token_id == 5
    assert token.logprob is not None
    assert token.logprob.logprob == float(expected[5])
    assert [i for i, _ in token.logprob.top] == expected.topk(3).indices.tolist()
