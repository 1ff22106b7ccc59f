from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from server.bodies.chat import ChatBody
from server.bodies.generation import CompletionBody
from sl_serve.admission import INTEGERS, LOGIT_BIAS, RANGES, check_request, check_sampling
from sl_serve.core import Request, SamplingParams
from sl_serve.errors import RequestError
from sl_serve.sampling import sample

VOCAB = 40
FEW = settings(derandomize=True, max_examples=200, deadline=None)


def refusal(**params: Any) -> RequestError:
    with pytest.raises(RequestError) as hit:
        check_sampling(SamplingParams(**params), VOCAB)
    return hit.value


@pytest.mark.parametrize(
    ("wrong", "message"),
    [
        (
            {"stop_token_ids": (3, 40)},
            "'stop_token_ids' has the token id 40; the vocabulary has ids 0 to 39.",
        ),
        ({"stop_token_ids": (-1,)}, "'stop_token_ids' has the token id -1; "),
        ({"stop_token_ids": (1.5,)}, "'stop_token_ids' has the token id 1.5; "),
        ({"logit_bias": {40: 1.0}}, "'logit_bias' has the token id 40; "),
        ({"logit_bias": {-1: 1.0}}, "'logit_bias' has the token id -1; "),
        ({"logit_bias": {"3": 1.0}}, "'logit_bias' has the token id 3; "),
        ({"logit_bias": {3: math.nan}}, "'logit_bias' is nan; it must be a number, from -100 to"),
        ({"logit_bias": {3: -math.inf}}, "'logit_bias' is -inf; "),
        ({"top_k": -1}, "'top_k' is -1; it must be an integer, at least 0."),
        ({"top_k": 2.5}, "'top_k' is 2.5; it must be an integer"),
        ({"temperature": -0.5}, "'temperature' is -0.5; it must be a number, from 0 to 2."),
        ({"temperature": "1"}, "'temperature' is 1; it must be a number"),
        ({"temperature": None}, "'temperature' is None; "),
        ({"repetition_penalty": 0}, "'repetition_penalty' is 0; it must be a number, from 0.01"),
        ({"logprobs": -1}, "'logprobs' is -1; "),
        ({"prompt_logprobs": -1}, "'prompt_logprobs' is -1; "),
        ({"max_tokens": -1}, "'max_tokens' is -1; "),
        ({"min_tokens": -1}, "'min_tokens' is -1; "),
        ({"min_tokens": None}, "'min_tokens' is None; "),
        ({"seed": 2**63}, "'seed' is 9223372036854775808; it must be an integer, from -92"),
        ({"seed": 1.0}, "'seed' is 1.0; it must be an integer"),
        ({"stop": ("a", "")}, "'stop' has ''; give texts that are not empty."),
        ({"stop": (5,)}, "'stop' has 5; "),
    ],
)
def test_what_the_sampler_cannot_work_with_is_refused(wrong: dict[str, Any], message: str) -> None:
    error = refusal(**wrong)
    assert str(error).startswith(message)
    assert error.param == next(iter(wrong))


@pytest.mark.parametrize("name", RANGES)
@pytest.mark.parametrize("value", [math.nan, math.inf, -math.inf, 1e300])
def test_no_number_may_be_nan_or_without_bounds(name: str, value: float) -> None:
    assert refusal(**{name: value}).param == name


@pytest.mark.parametrize("ids", [[1.0, 2.0], ["a"], [1, None]])
def test_prompts_of_anything_but_integers_are_refused(ids: list[Any]) -> None:
    request = Request("r", ids, SamplingParams(), lambda _: None)
    with pytest.raises(RequestError, match="'prompt' has the token id"):
        check_request(request, VOCAB, 100)


def between(name: str) -> st.SearchStrategy[Any]:
    lowest, highest = RANGES[name]
    ends = st.sampled_from([lowest, highest])
    return st.one_of(ends, st.floats(lowest, highest), st.just(np.float32(1)))


TOKEN_IDS = st.integers(0, VOCAB - 1)
ACCEPTED = st.builds(
    dict,
    **{name: between(name) for name in RANGES},
    logit_bias=st.dictionaries(TOKEN_IDS, st.floats(*LOGIT_BIAS), max_size=5),
    stop_token_ids=st.one_of(st.lists(TOKEN_IDS, max_size=5), st.just(range(VOCAB))).map(tuple),
    top_k=st.one_of(st.just(0), st.integers(0, 2**70), st.just(np.int64(3))),
    min_tokens=st.sampled_from([0, 1, 2**70]),
    seed=st.one_of(st.integers(*map(int, INTEGERS["seed"])), st.just(np.int64(-5))),
    logprobs=st.sampled_from([None, 0, 5, 2**70]),
    ignore_eos=st.booleans(),
)


@FEW
@given(ACCEPTED, st.sampled_from([0.1, 3.0, 1e30]), st.integers(0, 100))
def test_whatever_is_accepted_gives_a_token(
    params: Mapping[str, Any], scale: float, seed: int
) -> None:
    request = Request("r", [1, 2, 2], SamplingParams(**params), lambda _: None)
    request.output_ids = [2, 3, 3, 3]
    check_request(request, VOCAB, 100)
    logits = torch.randn(1, VOCAB, generator=torch.Generator().manual_seed(seed)) * scale
    (token,) = sample(logits, [request], (5,))
    assert 0 <= token.token_id < VOCAB


@pytest.mark.parametrize("body", [ChatBody, CompletionBody])
def test_the_http_fields_have_the_same_limits(body: type[ChatBody | CompletionBody]) -> None:
    fields = body.model_json_schema()["properties"]
    for name, limits in RANGES.items():
        assert (fields[name]["minimum"], fields[name]["maximum"]) == limits
