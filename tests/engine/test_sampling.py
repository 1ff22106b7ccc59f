from __future__ import annotations

import math
from collections import Counter
from collections.abc import Sequence
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from numpy.typing import NDArray

from sl_serve import sampling
from sl_serve.core import Request, SamplingParams
from sl_serve.sampling import NUCLEUS_GUESS, NonFiniteLogitsError, prompt_logprobs, sample

FEW = settings(derandomize=True, max_examples=60, deadline=None)
EOS = (2, 5)
Array = NDArray[np.float64]
# Upper quantiles of chi-square at 1e-6; a fixed seed keeps the tests from ever crossing by chance.
CHI_SQUARE_LIMIT = {3: 30.7, 7: 40.5}


def ask(prompt: Sequence[int] = (0,), output: Sequence[int] = (), **params: Any) -> Request:
    request = Request(
        "r", list(prompt), SamplingParams(**{"seed": 7, **params}), on_output=lambda _: None
    )
    request.output_ids = list(output)
    return request


def greedy(**params: Any) -> Request:
    return ask(temperature=0, **params)


def random_logits(*shape: int, seed: int = 0, scale: float = 3.0) -> torch.Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed)) * scale


def drawn(logits: torch.Tensor, requests: Sequence[Request]) -> list[int]:
    return [token.token_id for token in sample(logits.clone(), requests, EOS)]


def log_softmax(logits: torch.Tensor) -> Array:
    """In float64, over the last axis."""
    x = logits.numpy().astype(np.float64)
    x = x - x.max(axis=-1, keepdims=True)
    out: Array = x - np.log(np.exp(x).sum(axis=-1, keepdims=True))
    return out


# Greedy.


@pytest.mark.parametrize("ties", [(3, 4), (0, 999), (17, 18, 500), tuple(range(1000))])
def test_greedy_takes_the_lowest_id_of_equals(ties: tuple[int, ...]) -> None:
    logits = torch.zeros(1, 1000)
    logits[0, list(ties)] = 5.0
    assert drawn(logits, [greedy()]) == [ties[0]]


@pytest.mark.parametrize("temperature", [5e-324, 1e-309, 1e-201, 1e-200, 1e-30])
@pytest.mark.parametrize("params", [{}, {"top_p": 0.5}, {"min_p": 0.1}])
def test_the_smallest_temperatures_are_greedy(temperature: float, params: dict[str, Any]) -> None:
    logits = random_logits(4, 50, scale=3e37)
    requests = [ask(temperature=temperature, seed=i, **params) for i in range(4)]
    assert drawn(logits, requests) == logits.argmax(dim=-1).tolist()


def test_greedy_depends_on_neither_seed_nor_truncation() -> None:
    logits = random_logits(1, 50).repeat(4, 1)
    requests = [greedy(seed=1), greedy(seed=2), greedy(top_k=1), greedy(top_p=0.1, min_p=0.5)]
    assert drawn(logits, requests) == [int(logits[0].argmax())] * 4


# Log probabilities.


def test_logprobs_are_those_of_a_float64_log_softmax() -> None:
    logits = random_logits(8, 300, scale=8.0)
    expected = log_softmax(logits)
    for row, token in enumerate(sample(logits.clone(), [ask(logprobs=5)] * 8, EOS)):
        assert token.logprob is not None
        assert token.logprob.token_id == token.token_id
        assert token.logprob.logprob == pytest.approx(expected[row, token.token_id], abs=1e-5)
        best = np.argsort(-expected[row])[:5]
        assert [i for i, _ in token.logprob.top] == best.tolist()
        assert [p for _, p in token.logprob.top] == pytest.approx(expected[row, best], abs=1e-5)


def test_the_chosen_tokens_logprob_and_its_entry_in_top_are_the_same_float() -> None:
    for token in sample(random_logits(20, 30), [ask(logprobs=30)] * 20, EOS):
        assert token.logprob is not None
        assert dict(token.logprob.top)[token.token_id] == token.logprob.logprob


def test_logprobs_are_the_models_own_before_bias_penalties_and_temperature() -> None:
    logits = random_logits(2, 12)
    twisted = ask(
        prompt=[1, 3],
        output=[4, 4],
        logprobs=12,
        temperature=0.3,
        top_k=2,
        logit_bias={1: 9.0},
        presence_penalty=1.0,
        repetition_penalty=2.0,
        min_tokens=5,
    )
    plain, adjusted = sample(logits[:1].repeat(2, 1), [ask(logprobs=12), twisted], EOS)
    assert plain.logprob is not None and adjusted.logprob is not None
    assert plain.logprob.top == adjusted.logprob.top


@pytest.mark.parametrize(("asked", "n_top"), [(0, 0), (3, 3), (99, 12)])
def test_as_many_alternatives_as_asked_for_and_as_there_are(asked: int, n_top: int) -> None:
    (token,) = sample(random_logits(1, 12), [ask(logprobs=asked)], EOS)
    assert token.logprob is not None and len(token.logprob.top) == n_top


def test_no_logprobs_unless_asked_for() -> None:
    assert sample(random_logits(1, 12), [ask()], EOS)[0].logprob is None


def test_prompt_logprobs_are_those_of_a_float64_log_softmax() -> None:
    logits, targets = random_logits(6, 200, scale=8.0), [5, 0, 199, 5, 77, 3]
    expected = log_softmax(logits)
    found = prompt_logprobs(logits.clone(), targets, 2)
    assert [entry.token_id for entry in found] == targets
    assert [entry.logprob for entry in found] == pytest.approx(
        expected[range(6), targets], abs=1e-5
    )
    assert [entry.top[0][0] for entry in found] == expected.argmax(axis=1).tolist()
    assert all(len(entry.top) == 2 for entry in found)


# Bias and penalties. The references restate the formulas; the greedy token shows the result.


def restated(logits: Array, request: Request) -> Array:
    params, x = request.sampling, logits.copy()
    for token_id, bias in params.logit_bias.items():
        x[token_id] += bias
    for token_id in set(request.prompt_ids) | set(request.output_ids):
        penalty = params.repetition_penalty  # CTRL, arXiv 1909.05858, section 4.1
        x[token_id] = x[token_id] / penalty if x[token_id] > 0 else x[token_id] * penalty
    for token_id, count in Counter(request.output_ids).items():
        # OpenAI: mu[j] -= c[j] * alpha_frequency + float(c[j] > 0) * alpha_presence
        x[token_id] -= count * params.frequency_penalty + params.presence_penalty
    return x


IDS = st.integers(0, 7)
ADJUSTED = st.builds(
    greedy,
    prompt=st.lists(IDS, min_size=1, max_size=8),
    output=st.lists(IDS, max_size=8),
    logit_bias=st.dictionaries(IDS, st.floats(-3, 3), max_size=4),
    presence_penalty=st.one_of(st.just(0.0), st.floats(-2, 2)),
    frequency_penalty=st.one_of(st.just(0.0), st.floats(-2, 2)),
    repetition_penalty=st.one_of(st.just(1.0), st.floats(0.5, 2)),
)


@settings(FEW, max_examples=150)
@given(ADJUSTED, st.integers(0, 1000), st.sampled_from([-4.0, 0.0]))
def test_bias_and_penalties_are_openais_and_ctrls(
    request_: Request, seed: int, offset: float
) -> None:
    logits = random_logits(1, 8, seed=seed, scale=1.5) + offset
    expected = restated(logits[0].numpy().astype(np.float64), request_)
    first, second = np.sort(expected)[::-1][:2]
    if first - second > 1e-4:  # else float32 may decide otherwise
        assert drawn(logits, [request_]) == [int(expected.argmax())]


def test_presence_and_frequency_do_not_count_the_prompt() -> None:
    logits = torch.tensor([[1.0, 0.9]])
    request = greedy(prompt=[0, 0], presence_penalty=2.0, frequency_penalty=2.0)
    assert drawn(logits, [request]) == [0]


def test_repetition_counts_the_prompt() -> None:
    logits = torch.tensor([[1.0, 0.9]])
    assert drawn(logits, [greedy(prompt=[0], repetition_penalty=1.5)]) == [1]


def test_a_bias_applies_to_its_row_alone() -> None:
    logits = torch.tensor([[1.0, 0.0]]).repeat(3, 1)
    assert drawn(logits, [greedy(), greedy(logit_bias={1: 5.0}), greedy()]) == [0, 1, 0]


@pytest.mark.parametrize(("n_output", "expected"), [(0, 0), (2, 0), (3, 5), (4, 5)])
def test_min_tokens_ban_eos_and_stop_ids_until_they_are_out(n_output: int, expected: int) -> None:
    logits = torch.tensor([[1.0, 0.0, 8.0, 7.0, 7.5, 9.0]])
    request = greedy(output=[1] * n_output, min_tokens=3, stop_token_ids=(3, 4))
    assert drawn(logits, [request]) == [expected]


def test_min_tokens_do_not_ban_an_eos_that_is_ignored() -> None:
    logits = torch.tensor([[1.0, 0.0, 8.0, 7.0, 7.5, 9.0]])
    assert drawn(logits, [greedy(min_tokens=3, ignore_eos=True)]) == [5]


def test_banned_tokens_are_never_drawn() -> None:
    logits = torch.tensor([[0.0, 0.0, 30.0, 30.0, 0.0, 30.0]])
    request = ask(min_tokens=10_000, stop_token_ids=(3,))
    assert set(sequence(logits, request, 300)) == {0, 1, 4}


@pytest.mark.parametrize("params", [{}, {"top_p": 0.9}, {"temperature": 0}])
def test_where_all_tokens_are_banned_one_of_them_is_drawn(params: dict[str, Any]) -> None:
    request = ask(min_tokens=10_000, stop_token_ids=tuple(range(6)), **params)
    assert set(sequence(random_logits(1, 6), request, 20)) <= set(range(6))


# Truncation.


def brute_force(probs: Array, params: SamplingParams) -> set[int]:
    """Token by token, most probable first."""
    order = np.argsort(-probs)[: params.top_k or None]
    enough = params.top_p * math.fsum(probs[order])
    found: set[int] = set()
    mass = 0.0
    for i in order:
        reached = params.top_p < 1 and mass >= enough
        if found and (reached or probs[i] < params.min_p * probs[order[0]]):
            break
        found.add(int(i))
        mass += probs[i]
    return found


def kept(probs: Array, params: SamplingParams) -> set[int]:
    _, ids = sampling._truncate(torch.from_numpy(probs), params)
    assert len(set(ids.tolist())) == len(ids)
    return set(ids.tolist())


def probabilities(n: int, spread: float, seed: int = 0) -> Array:
    weights: Array = np.exp(np.random.default_rng(seed).normal(size=n) * spread)
    return weights / weights.sum()


TOP_P = st.one_of(st.just(1.0), st.floats(0.01, 0.999))
MIN_P = st.one_of(st.just(0.0), st.floats(0.001, 1.0))


@settings(FEW, max_examples=150)
@given(
    n=st.sampled_from([5, 100, 256, 257, 700]),
    spread=st.sampled_from([0.05, 1.0, 4.0]),
    top_k=st.sampled_from([0, 1, 3, 40, 255, 256, 257, 300, 699]),
    top_p=TOP_P,
    min_p=MIN_P,
    seed=st.integers(0, 100),
)
def test_truncation_keeps_exactly_the_right_set(
    n: int, spread: float, top_k: int, top_p: float, min_p: float, seed: int
) -> None:
    probs = probabilities(n, spread, seed)
    params = SamplingParams(top_k=top_k, top_p=top_p, min_p=min_p)
    assert kept(probs, params) == brute_force(probs, params)


@pytest.mark.parametrize(
    "params",
    [
        SamplingParams(top_p=0.9),
        SamplingParams(min_p=0.5),
        SamplingParams(top_k=600),
        SamplingParams(top_p=0.99, min_p=0.6),
        SamplingParams(top_k=650, top_p=0.95),
    ],
)
def test_a_nucleus_larger_than_the_guess_is_kept_whole(params: SamplingParams) -> None:
    probs = probabilities(700, spread=0.1)
    expected = brute_force(probs, params)
    assert len(expected) > NUCLEUS_GUESS
    assert kept(probs, params) == expected


def test_top_p_is_a_share_of_all_that_top_k_leaves() -> None:
    probs = np.full(300, 1 / 300)
    assert len(kept(probs, SamplingParams(top_k=300, top_p=0.799))) == 240


def test_top_p_is_measured_after_top_k() -> None:
    probs = np.array([0.4, 0.3, 0.2, 0.1])
    # Of the best two, 0.57 and 0.43, the first alone is enough for a half.
    assert kept(probs, SamplingParams(top_k=2, top_p=0.5)) == {0}
    assert kept(probs, SamplingParams(top_p=0.5)) == {0, 1}


@pytest.mark.parametrize("params", [{"top_p": 1e-9}, {"min_p": 1.0}, {"top_k": 1}])
def test_the_best_token_is_always_left(params: dict[str, Any]) -> None:
    logits = random_logits(1, 40)
    assert set(sequence(logits, ask(**params), 20)) == {int(logits.argmax())}


# Drawing.


def sequence(logits: torch.Tensor, request: Request, n: int) -> list[int]:
    """Tokens 0 .. n - 1 of a request that sees the same logits (1, V) every time."""
    for _ in range(n):
        request.output_ids += drawn(logits, [request])
    return request.output_ids


def chi_square(counts: Counter[int], probs: Array) -> float:
    n = counts.total()
    return math.fsum((counts[i] - n * p) ** 2 / (n * p) for i, p in enumerate(probs))


@pytest.mark.parametrize("temperature", [0.5, 2.0])
def test_token_numbers_draw_from_the_exact_distribution(temperature: float) -> None:
    logits = random_logits(1, 8, scale=0.7)
    counts = Counter(sequence(logits, ask(temperature=temperature), 4000))
    expected = np.exp(log_softmax(logits / temperature))[0]
    assert chi_square(counts, expected) < CHI_SQUARE_LIMIT[7]


def test_seeds_draw_from_the_exact_distribution() -> None:
    logits = random_logits(1, 8, seed=3, scale=0.7)
    requests = [ask(seed=seed) for seed in range(4000)]
    counts = Counter(drawn(logits.repeat(4000, 1), requests))
    assert chi_square(counts, np.exp(log_softmax(logits))[0]) < CHI_SQUARE_LIMIT[7]


def test_what_truncation_leaves_is_drawn_in_proportion() -> None:
    logits = random_logits(1, 30, seed=4)
    counts = Counter(sequence(logits, ask(top_k=4, temperature=1.5), 2000))
    best = logits[0].topk(4)
    assert counts.keys() == set(best.indices.tolist())
    ranked = Counter({rank: counts[i] for rank, i in enumerate(best.indices.tolist())})
    expected = np.exp(log_softmax(best.values / 1.5))
    assert chi_square(ranked, expected) < CHI_SQUARE_LIMIT[3]


def crowd() -> tuple[torch.Tensor, list[Request]]:
    rules: list[dict[str, Any]] = [
        {},
        {"top_k": 7},
        {"top_p": 0.8, "temperature": 1.7},
        {"min_p": 0.1, "logprobs": 4},
        {"temperature": 0},
        {"presence_penalty": 1.5, "logit_bias": {3: 2.0}},
    ]
    requests = [
        ask(output=[i % 5] * (i % 4), seed=i // 3 - 3, **rules[i % len(rules)]) for i in range(24)
    ]
    return random_logits(24, 60, scale=2.0), requests


def test_a_draw_does_not_depend_on_the_rows_beside_it_or_on_their_order() -> None:
    logits, requests = crowd()
    together = drawn(logits, requests)
    alone = [drawn(logits[i : i + 1], [r])[0] for i, r in enumerate(requests)]
    order = np.random.default_rng(1).permutation(24).tolist()
    shuffled = drawn(logits[order], [requests[i] for i in order])
    assert together == alone
    assert shuffled == [together[i] for i in order]
    assert len(set(together)) > 5


def test_seed_and_token_number_alone_choose() -> None:
    logits = random_logits(1, 500, scale=0.1)
    first = sequence(logits, ask(seed=11), 40)
    assert sequence(logits, ask(seed=11, prompt=[4, 5]), 40) == first
    assert sequence(logits, ask(seed=12), 40) != first
    assert len(set(first)) > 20


@pytest.mark.parametrize("seed", [0, -1, 2**63 - 1, -(2**63)])
def test_every_64_bit_seed_draws(seed: int) -> None:
    logits = random_logits(1, 500, scale=0.1)
    assert sequence(logits, ask(seed=seed), 3) == sequence(logits, ask(seed=seed), 3)


@pytest.mark.parametrize("uniform", [0.0, 1 - 2**-53])
@pytest.mark.parametrize("params", [{}, {"top_k": 3}])
def test_tokens_without_probability_are_not_drawn_at_the_ends(
    monkeypatch: pytest.MonkeyPatch, uniform: float, params: dict[str, Any]
) -> None:
    monkeypatch.setattr(sampling, "_uniform", lambda seed, number: uniform)
    logits = torch.full((1, 6), -torch.inf)
    logits[0, 2:4] = torch.tensor([0.3, 0.1])
    assert drawn(logits, [ask(**params)]) == [2 if uniform == 0 else 3]


@pytest.mark.parametrize("bad", [torch.nan, torch.inf])
def test_logits_that_are_no_numbers_are_an_error(bad: float) -> None:
    logits = random_logits(3, 20)
    logits[1, 4] = bad
    with pytest.raises(NonFiniteLogitsError):
        sample(logits, [greedy()] * 3, EOS)


def test_a_row_without_any_possible_token_is_an_error() -> None:
    logits = random_logits(2, 20)
    logits[1] = -torch.inf
    with pytest.raises(NonFiniteLogitsError):
        sample(logits, [ask()] * 2, EOS)
