from __future__ import annotations

import json
from typing import Any

import httpx
import pytest

from tests.server.fake_engine import BOS, FakeEngine, ToyTokenizer, expected_output

PATH = "/v1/completions"


def text_of(ids: list[int]) -> str:
    return ToyTokenizer().decode(ids)


def events(body: str) -> list[dict[str, Any]]:
    """The data events of a stream, which must end with [DONE]."""
    lines = [line for line in body.split("\n\n") if line and not line.startswith(":")]
    assert lines[-1] == "data: [DONE]"
    return [json.loads(line.removeprefix("data: ")) for line in lines[:-1]]


async def test_answer_has_the_models_text_and_usage(client: httpx.AsyncClient) -> None:
    answer = (await client.post(PATH, json={"prompt": "hello", "seed": 5, "max_tokens": 7})).json()
    expected = expected_output("hello", 7, seed=5)
    assert answer["choices"] == [
        {
            "index": 0,
            "text": text_of(expected),
            "logprobs": None,
            "finish_reason": "length",
            "stop_reason": None,
        }
    ]
    assert answer["usage"] == {"prompt_tokens": 6, "completion_tokens": 7, "total_tokens": 13}
    assert answer["object"] == "text_completion"
    assert answer["model"] == "toy/one"
    assert answer["id"].startswith("cmpl-")
    assert answer["system_fingerprint"].startswith("sl-serve-")


async def test_default_is_sixteen_tokens(client: httpx.AsyncClient) -> None:
    answer = (await client.post(PATH, json={"prompt": "hello"})).json()
    assert answer["usage"]["completion_tokens"] == 16


async def test_default_max_tokens_is_cut_to_what_is_left(
    client: httpx.AsyncClient, engine: FakeEngine
) -> None:
    engine.max_model_len = 10
    answer = (await client.post(PATH, json={"prompt": "hello"})).json()
    assert answer["usage"]["completion_tokens"] == 4


@pytest.mark.parametrize(
    ("prompt", "ids"),
    [
        ("ab", [[BOS, 97, 98]]),
        (["ab", "c"], [[BOS, 97, 98], [BOS, 99]]),
        ([97, 98], [[97, 98]]),
        ([[97], [98, 99]], [[97], [98, 99]]),
    ],
)
async def test_four_shapes_of_prompt(
    client: httpx.AsyncClient, engine: FakeEngine, prompt: object, ids: list[list[int]]
) -> None:
    answer = (await client.post(PATH, json={"prompt": prompt, "max_tokens": 3, "seed": 1})).json()
    assert [r.prompt_ids for r in engine.submitted] == ids
    assert [c["text"] for c in answer["choices"]] == [
        text_of(expected_output(i, 3, seed=1)) for i in ids
    ]
    assert answer["usage"]["prompt_tokens"] == sum(map(len, ids))


async def test_add_special_tokens_false(client: httpx.AsyncClient, engine: FakeEngine) -> None:
    await client.post(PATH, json={"prompt": "ab", "add_special_tokens": False})
    assert engine.submitted[0].prompt_ids == [97, 98]


async def test_choice_index_is_prompt_times_n_plus_i(
    client: httpx.AsyncClient, engine: FakeEngine
) -> None:
    body = {"prompt": ["ab", "xyz"], "n": 3, "best_of": 3, "seed": 40, "max_tokens": 5}
    answer = (await client.post(PATH, json=body)).json()
    assert [c["index"] for c in answer["choices"]] == list(range(6))
    assert [c["text"] for c in answer["choices"]] == [
        text_of(expected_output(prompt, 5, seed=40 + i))
        for prompt in ("ab", "xyz")
        for i in range(3)
    ]
    assert answer["usage"] == {"prompt_tokens": 7, "completion_tokens": 30, "total_tokens": 37}
    assert len({r.request_id for r in engine.submitted}) == 6


async def test_seed_wraps_at_int64(client: httpx.AsyncClient, engine: FakeEngine) -> None:
    await client.post(PATH, json={"prompt": "a", "n": 2, "seed": 2**63 - 1, "max_tokens": 1})
    assert [r.sampling.seed for r in engine.submitted] == [2**63 - 1, -(2**63)]


async def test_every_sampling_field_reaches_the_engine(
    client: httpx.AsyncClient, engine: FakeEngine
) -> None:
    body = {
        "prompt": "a",
        "max_tokens": 9,
        "min_tokens": 2,
        "temperature": 0.5,
        "top_p": 0.25,
        "top_k": 7,
        "min_p": 0.125,
        "presence_penalty": -1,
        "frequency_penalty": 1.5,
        "repetition_penalty": 1.25,
        "logit_bias": {"97": -100, "98": 2.5},
        "stop": ["xx", "yy"],
        "stop_token_ids": [EOS := 257],
        "include_stop_str_in_output": True,
        "ignore_eos": True,
        "logprobs": 4,
    }
    await client.post(PATH, json=body)
    sampling = engine.submitted[0].sampling
    for name in ("max_tokens", "min_tokens", "temperature", "top_p", "top_k", "min_p", "logprobs"):
        assert getattr(sampling, name) == body[name], name
    for name in ("presence_penalty", "frequency_penalty", "repetition_penalty", "ignore_eos"):
        assert getattr(sampling, name) == body[name], name
    assert sampling.logit_bias == {97: -100.0, 98: 2.5}
    assert (sampling.stop, sampling.stop_token_ids) == (("xx", "yy"), (EOS,))
    assert sampling.include_stop_str_in_output is True
    assert sampling.prompt_logprobs is None


@pytest.mark.parametrize(("asked", "given"), [(-1, 0), (0, 0), (5, 5), (10**9, 260)])
async def test_top_k_off_and_beyond_the_vocabulary(
    client: httpx.AsyncClient, engine: FakeEngine, asked: int, given: int
) -> None:
    await client.post(PATH, json={"prompt": "a", "top_k": asked})
    assert engine.submitted[0].sampling.top_k == given


async def test_stop_as_a_string(client: httpx.AsyncClient) -> None:
    expected = text_of(expected_output("hello", 12))
    stop = expected[5]
    answer = (await client.post(PATH, json={"prompt": "hello", "stop": stop})).json()
    choice = answer["choices"][0]
    assert choice["text"] == expected[: expected.index(stop)]
    assert (choice["finish_reason"], choice["stop_reason"]) == ("stop", stop)


async def test_echo_puts_the_prompt_first(client: httpx.AsyncClient) -> None:
    body = {"prompt": ["héllo", [104, 105]], "echo": True, "max_tokens": 2}
    choices = (await client.post(PATH, json=body)).json()["choices"]
    assert choices[0]["text"] == "héllo" + text_of(expected_output("héllo", 2))
    assert choices[1]["text"] == "hi" + text_of(expected_output([104, 105], 2))


@pytest.mark.parametrize("echo", [True, False])
async def test_max_tokens_zero(client: httpx.AsyncClient, echo: bool) -> None:
    body = {"prompt": "abc", "echo": echo, "max_tokens": 0}
    answer = (await client.post(PATH, json=body)).json()
    assert answer["choices"][0]["text"] == ("abc" if echo else "")
    assert answer["choices"][0]["finish_reason"] == "length"
    assert answer["usage"] == {"prompt_tokens": 4, "completion_tokens": 0, "total_tokens": 4}


async def test_return_token_ids(client: httpx.AsyncClient) -> None:
    body = {"prompt": "ab", "max_tokens": 3, "return_token_ids": True}
    whole = (await client.post(PATH, json=body)).json()["choices"][0]
    assert whole["prompt_token_ids"] == [BOS, 97, 98]
    assert whole["token_ids"] == expected_output("ab", 3)
    stream = events((await client.post(PATH, json=body | {"stream": True})).text)
    pieces = [chunk["choices"][0] for chunk in stream]
    assert pieces[0]["prompt_token_ids"] == [BOS, 97, 98]
    assert all("prompt_token_ids" not in piece for piece in pieces[1:])
    assert [i for piece in pieces for i in piece["token_ids"]] == whole["token_ids"]


async def test_stream_says_the_same_as_the_whole_answer(client: httpx.AsyncClient) -> None:
    body = {
        "prompt": ["abc", "de"],
        "n": 2,
        "seed": 3,
        "max_tokens": 9,
        "echo": True,
        "logprobs": 2,
    }
    whole = (await client.post(PATH, json=body)).json()
    options = {"stream": True, "stream_options": {"include_usage": True}}
    response = await client.post(PATH, json=body | options)
    assert response.headers["content-type"].startswith("text/event-stream")
    assert response.headers["x-accel-buffering"] == "no"
    assert response.headers["cache-control"] == "no-cache"
    *chunks, last = events(response.text)
    for chunk in (*chunks, last):
        same = {k: v for k, v in chunk.items() if k not in ("choices", "usage")}
        assert same == {k: chunks[0][k] for k in same}
        assert chunk["object"] == "text_completion"
    assert last["choices"] == []
    assert last["usage"] == whole["usage"]
    assert all(chunk["usage"] is None for chunk in chunks)
    for choice in whole["choices"]:
        pieces = [c["choices"][0] for c in chunks if c["choices"][0]["index"] == choice["index"]]
        assert "".join(piece["text"] for piece in pieces) == choice["text"]
        assert [piece["finish_reason"] for piece in pieces[:-1]] == [None] * (len(pieces) - 1)
        assert pieces[-1]["finish_reason"] == choice["finish_reason"]
        for key, values in choice["logprobs"].items():
            assert [v for piece in pieces for v in piece["logprobs"][key]] == values, key


async def test_continuous_usage_counts_up(client: httpx.AsyncClient, engine: FakeEngine) -> None:
    engine.step_s = 0.01
    options = {"include_usage": True, "continuous_usage_stats": True}
    body = {"prompt": "abc", "max_tokens": 5, "stream": True, "stream_options": options}
    chunks = events((await client.post(PATH, json=body)).text)
    counts = [chunk["usage"]["completion_tokens"] for chunk in chunks]
    assert counts == sorted(counts)
    assert counts[-1] == 5
    assert len(set(counts)) > 1


async def test_held_back_text_makes_no_empty_chunks(
    client: httpx.AsyncClient, engine: FakeEngine
) -> None:
    engine.holds_text = True
    body = {"prompt": "abc", "max_tokens": 5, "stream": True, "echo": True}
    chunks = events((await client.post(PATH, json=body)).text)
    assert [c["choices"][0]["text"] for c in chunks] == ["abc" + text_of(expected_output("abc", 5))]


async def test_alias_and_missing_model(client: httpx.AsyncClient) -> None:
    for asked, told in (("alias", "alias"), ("toy/one", "toy/one"), (None, "toy/one")):
        answer = (await client.post(PATH, json={"model": asked, "prompt": "a"})).json()
        assert answer["model"] == told


async def test_unknown_fields_are_accepted(client: httpx.AsyncClient) -> None:
    body = {"prompt": "a", "max_tokens": 1, "made_up": {"x": [1]}, "user": "me", "model_dump": 3}
    assert (await client.post(PATH, json=body)).status_code == 200
