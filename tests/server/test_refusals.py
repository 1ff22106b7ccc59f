"""Requests that cannot be served: a 4xx in OpenAI's shape, and nothing reaches the engine."""

from __future__ import annotations

import random
from typing import Any

import httpx
import orjson
import pytest

from tests.server.conftest import MakeClient
from tests.server.fake_engine import VOCAB, FakeEngine

PATHS = ("/v1/completions", "/v1/chat/completions")
GOOD: dict[str, dict[str, Any]] = {
    PATHS[0]: {"prompt": "abc", "max_tokens": 4, "seed": 1},
    PATHS[1]: {"messages": [{"role": "user", "content": "x"}], "max_tokens": 4, "seed": 1},
}


def assert_error(response: httpx.Response, status: int | None = None) -> dict[str, Any]:
    assert 400 <= response.status_code < 500
    assert status in (None, response.status_code), response.text
    assert response.headers["content-type"] == "application/json"
    assert response.headers["x-request-id"]
    body = response.json()
    assert body.keys() == {"error"}
    error = body["error"]
    assert error.keys() == {"message", "type", "param", "code"}
    assert isinstance(error["message"], str)
    assert len(error["message"]) > 10
    assert "Traceback" not in error["message"]
    return dict(error)


@pytest.mark.parametrize("path", PATHS)
@pytest.mark.parametrize(
    ("wrong", "param"),
    [
        ({"n": True}, "n"),
        ({"n": "5"}, "n"),
        ({"n": 1.0}, "n"),
        ({"n": 0}, "n"),
        ({"n": 10**9}, "n"),
        ({"n": 129}, "n"),
        ({"temperature": -0.1}, "temperature"),
        ({"temperature": 2.1}, "temperature"),
        ({"temperature": True}, "temperature"),
        ({"temperature": "1"}, "temperature"),
        ({"top_p": -0.01}, "top_p"),
        ({"top_p": 1.01}, "top_p"),
        ({"top_k": -2}, "top_k"),
        ({"min_p": 1.5}, "min_p"),
        ({"presence_penalty": 2.5}, "presence_penalty"),
        ({"frequency_penalty": -2.5}, "frequency_penalty"),
        ({"repetition_penalty": 0}, "repetition_penalty"),
        ({"repetition_penalty": 11}, "repetition_penalty"),
        ({"seed": 2**63}, "seed"),
        ({"seed": -(2**63) - 1}, "seed"),
        ({"seed": 1.5}, "seed"),
        ({"max_tokens": -1}, "max_tokens"),
        ({"max_tokens": 10**12}, "max_tokens"),
        ({"max_tokens": [5]}, "max_tokens"),
        ({"min_tokens": 5}, "min_tokens"),
        ({"min_tokens": -1}, "min_tokens"),
        ({"stop": ""}, "stop[0]"),
        ({"stop": ["a", ""]}, "stop[1]"),
        ({"stop": ["a", None]}, "stop[1]"),
        ({"stop": 5}, "stop"),
        ({"stop": ["s"] * 17}, "stop"),
        ({"stop": "s" * 1001}, "stop"),
        ({"stop_token_ids": [VOCAB]}, "stop_token_ids"),
        ({"stop_token_ids": [-1]}, "stop_token_ids"),
        ({"stop_token_ids": [True]}, "stop_token_ids"),
        ({"stop_token_ids": [1] * 1025}, "stop_token_ids"),
        ({"logit_bias": {str(VOCAB): 1}}, "logit_bias"),
        ({"logit_bias": {"-1": 1}}, "logit_bias"),
        ({"logit_bias": {"1.0": 1}}, "logit_bias"),
        ({"logit_bias": {"²": 1}}, "logit_bias"),
        ({"logit_bias": {"9" * 5000: 1}}, "logit_bias"),
        ({"logit_bias": {"1": 101}}, "logit_bias.1"),
        ({"logit_bias": {"1": "1"}}, "logit_bias.1"),
        ({"logit_bias": {str(i): 1 for i in range(1025)}}, "logit_bias"),
        ({"logit_bias": [1]}, "logit_bias"),
        ({"stream": 1}, "stream"),
        ({"stream": "true"}, "stream"),
        ({"stream_options": {"include_usage": True}}, "stream_options"),
        ({"stream": True, "stream_options": {"include_usage": 1}}, "stream_options.include_usage"),
        ({"stream": True, "stream_options": []}, "stream_options"),
        ({"ignore_eos": 0}, "ignore_eos"),
        ({"model": 5}, "model"),
    ],
)
async def test_shared_fields(
    client: httpx.AsyncClient, engine: FakeEngine, path: str, wrong: dict[str, Any], param: str
) -> None:
    error = assert_error(await client.post(path, json=GOOD[path] | wrong), 400)
    assert error["param"] == param
    assert error["type"] == "invalid_request_error"
    assert engine.submitted == []


@pytest.mark.parametrize(
    ("wrong", "param"),
    [
        ({"prompt": ""}, "prompt"),
        ({"prompt": []}, "prompt"),
        ({"prompt": [[]]}, "prompt"),
        ({"prompt": [""]}, "prompt"),
        ({"prompt": None}, "prompt"),
        ({"prompt": 5}, "prompt"),
        ({"prompt": {"a": 1}}, "prompt"),
        ({"prompt": [1, "a"]}, "prompt"),
        ({"prompt": [1, True]}, "prompt"),
        ({"prompt": [True]}, "prompt"),
        ({"prompt": [[1], [2.0]]}, "prompt"),
        ({"prompt": [[[1]]]}, "prompt"),
        ({"prompt": [-1]}, "prompt"),
        ({"prompt": [[1], [VOCAB]]}, "prompt"),
        ({"prompt": [10**30]}, "prompt"),
        ({"prompt": [[1]] * 600, "n": 2}, "n"),
        ({"logprobs": 21}, "logprobs"),
        ({"logprobs": 10**6}, "logprobs"),
        ({"logprobs": -1}, "logprobs"),
        ({"logprobs": True}, "logprobs"),
        ({"logprobs": "1"}, "logprobs"),
        ({"best_of": 2}, "best_of"),
        ({"suffix": "end"}, "suffix"),
        ({"echo": 1}, "echo"),
    ],
)
async def test_completion_fields(
    client: httpx.AsyncClient, engine: FakeEngine, wrong: dict[str, Any], param: str
) -> None:
    error = assert_error(await client.post(PATHS[0], json=GOOD[PATHS[0]] | wrong), 400)
    assert error["param"] == param
    assert engine.submitted == []


async def test_message_names_field_problem_and_value(client: httpx.AsyncClient) -> None:
    error = assert_error(await client.post(PATHS[0], json={"prompt": "a", "temperature": 7}))
    assert error["message"] == "'temperature' should be less than or equal to 2, not 7."
    error = assert_error(await client.post(PATHS[0], json={}))
    assert error["message"] == "'prompt' is required."
    error = assert_error(await client.post(PATHS[0], json={"prompt": [1, 999]}))
    assert error["message"] == ("'prompt' has the token id 999; the vocabulary has ids 0 to 259.")


@pytest.mark.parametrize(
    ("n_prompt", "max_tokens", "refused"),
    [
        (9, 1, None),
        (9, 2, "max_tokens"),
        (10, 0, None),
        (10, 1, "prompt"),
        (10, None, "prompt"),
        (11, 0, "prompt"),
        (10_000, 1, "prompt"),
    ],
)
async def test_context_length(
    client: httpx.AsyncClient,
    engine: FakeEngine,
    n_prompt: int,
    max_tokens: int | None,
    refused: str | None,
) -> None:
    engine.max_model_len = 10
    body = {"prompt": [97] * n_prompt, "max_tokens": max_tokens}
    response = await client.post(PATHS[0], json=body)
    if refused is None:
        assert response.status_code == 200
        return
    error = assert_error(response, 400)
    assert (error["param"], error["code"]) == (refused, "context_length_exceeded")
    assert "10" in error["message"]
    assert str(n_prompt) in error["message"]
    assert engine.submitted == []


async def test_unknown_model(client: httpx.AsyncClient) -> None:
    for path, body in (
        *GOOD.items(),
        ("/tokenize", {"prompt": "a"}),
        ("/detokenize", {"tokens": []}),
    ):
        error = assert_error(await client.post(path, json=body | {"model": "gpt-9"}), 404)
        assert (error["code"], error["param"]) == ("model_not_found", "model")


@pytest.mark.parametrize(
    ("method", "path", "status", "code"),
    [
        ("GET", "/nothing", 404, "not_found"),
        ("GET", "/docs", 404, "not_found"),
        ("GET", "/v1/nothing", 404, "not_found"),
        ("POST", "/v1/completions/", 404, "not_found"),
        ("GET", "/v1/completions", 405, "method_not_allowed"),
        ("DELETE", "/v1/models", 405, "method_not_allowed"),
        ("GET", "/v1/models/none", 404, "model_not_found"),
    ],
)
async def test_paths_and_methods(
    client: httpx.AsyncClient, method: str, path: str, status: int, code: str
) -> None:
    response = await client.request(method, path)
    assert assert_error(response, status)["code"] == code
    if status == 405:
        assert response.headers["allow"]


RAW = [
    b"",
    b"null",
    b"[]",
    b'"text"',
    b"5",
    b"true",
    b"{",
    b'{"prompt": "a"',
    b'{"prompt": "a",}',
    b'{"prompt": NaN}',
    b'{"prompt": "a", "temperature": Infinity}',
    b'{"prompt": "a", "temperature": -Infinity}',
    b'{"prompt": "a", "seed": 1' + b"0" * 400 + b"}",
    b'{"prompt": "a", "temperature": 1e999}',
    b'{"prompt": "\xff\xfe"}',
    b'{"prompt": "\\ud800"}',
    b'{"prompt": ' + b"[" * 100_000,
    b'{"prompt": ' + b"[" * 65 + b"]" * 65 + b"}",
    b'{"a":' * 500 + b"1" + b"}" * 500,
    b"{'prompt': 'a'}",
    b"prompt=a",
    b"\x00",
    b"\xef\xbb\xbf{}",
]


@pytest.mark.parametrize("path", PATHS)
@pytest.mark.parametrize("raw", RAW, ids=range(len(RAW)))
async def test_raw_bodies(
    client: httpx.AsyncClient, engine: FakeEngine, path: str, raw: bytes
) -> None:
    assert_error(await client.post(path, content=raw), 400)
    assert engine.submitted == []


# each is wrong for every one of FIELDS, but for FITTING
WRONG_VALUES: list[Any] = [
    "x" * 300,
    "5",
    [[]],
    [{"a": None}],
    {"a": {"b": []}},
    -(10**18),
    1e300,
    [None],
    ["", 1],
]
FIELDS = (
    "n",
    "max_tokens",
    "min_tokens",
    "temperature",
    "top_p",
    "top_k",
    "min_p",
    "presence_penalty",
    "frequency_penalty",
    "repetition_penalty",
    "seed",
    "stream",
    "logprobs",
    "logit_bias",
    "stop_token_ids",
    "ignore_eos",
    "include_stop_str_in_output",
)
FITTING = {("seed", 5)}  # -10**18 is one


def malformed(rng: random.Random) -> bytes:
    """A body that no server should accept."""
    path = rng.choice(PATHS)
    text = orjson.dumps(GOOD[path])
    kind = rng.randrange(4)
    if kind == 0:  # cut off anywhere
        return text[: rng.randrange(len(text))]
    if kind == 1:  # a byte that is never valid UTF-8
        at = rng.randrange(len(text))
        return text[:at] + b"\xff" + text[at:]
    if kind == 2:  # an unbalanced bracket
        at = rng.choice([i for i, c in enumerate(text) if c in b"{}:,"])
        return text[:at] + rng.choice([b"]", b"}}", b"[["]) + text[at:]
    field, value = rng.choice(FIELDS), rng.randrange(len(WRONG_VALUES))
    if (field, value) in FITTING:
        value = 0
    return orjson.dumps(GOOD[path] | {field: WRONG_VALUES[value]})


async def test_malformed_requests_leave_no_trace(
    client: httpx.AsyncClient, engine: FakeEngine
) -> None:
    async def good_answers() -> list[bytes]:
        answers = [(await client.post(path, json=body)).json() for path, body in GOOD.items()]
        return [orjson.dumps(a | {"id": "", "created": 0}) for a in answers]

    before = await good_answers()
    rng = random.Random(20_250)
    n_submitted = len(engine.submitted)
    for _ in range(600):
        body = malformed(rng)
        response = await client.post(rng.choice(PATHS), content=body)
        assert response.status_code == 400, body
        assert_error(response)
    assert len(engine.submitted) == n_submitted
    assert await good_answers() == before


async def test_huge_numbers_of_things_are_refused_quickly(
    client: httpx.AsyncClient, engine: FakeEngine
) -> None:
    for wrong in (
        {"stop": ["s"] * 100_000},
        {"prompt": ["p"] * 100_000},
        {"prompt": [0.5] * 1_000_000},
        {"stop_token_ids": [0] * 1_000_000},
    ):
        assert_error(await client.post(PATHS[0], json=GOOD[PATHS[0]] | wrong), 400)
    wrong_messages = {"messages": [{"role": 5}] * 100_000}
    assert_error(await client.post(PATHS[1], json=wrong_messages), 400)
    assert engine.submitted == []


async def test_too_many_choices_are_refused_before_anything_is_made_of_them(
    client: httpx.AsyncClient, engine: FakeEngine, monkeypatch: pytest.MonkeyPatch
) -> None:
    def never(*_: object) -> list[int]:
        raise AssertionError("tokenised")

    monkeypatch.setattr(engine.tokenizer, "encode", never)
    for wrong in ({"prompt": ["a"] * 9, "n": 128}, {"prompt": "a", "n": 10**9}):
        error = assert_error(await client.post(PATHS[0], json=GOOD[PATHS[0]] | wrong), 400)
        assert error["param"] == "n"


async def test_queue_full_is_429_with_retry_after(
    client: httpx.AsyncClient, engine: FakeEngine
) -> None:
    engine.max_queue = 3
    response = await client.post(PATHS[0], json={"prompt": "a", "n": 4})
    error = assert_error(response, 429)
    assert (error["type"], error["code"]) == ("rate_limit_error", "queue_full")
    assert response.headers["retry-after"] == "120"  # the engine said 3600
    streamed = await client.post(PATHS[0], json={"prompt": "a", "n": 4, "stream": True})
    assert_error(streamed, 429)
    assert engine.active == {}
    assert not client.app.state.context.jobs  # type: ignore[attr-defined]
    assert (await client.post(PATHS[0], json={"prompt": "a", "n": 3})).status_code == 200


async def test_body_limit(make_client: MakeClient) -> None:
    client = make_client(max_body_bytes=1000)
    body = orjson.dumps({"prompt": "a" * 1200})

    async def pieces() -> Any:
        for start in range(0, len(body), 100):
            yield body[start : start + 100]

    declared = await client.post(PATHS[0], content=body)
    counted = await client.post(PATHS[0], content=pieces())
    for response in (declared, counted):
        assert "1,000 bytes" in assert_error(response, 413)["message"]
    lying = {"content-length": "9" * 5000}
    assert_error(await client.post(PATHS[0], content=b"{}", headers=lying), 413)
    assert (await client.post(PATHS[0], content=body[:300] + b'"}')).status_code == 200
