"""What evaluation harnesses compute from logprobs must come out exactly."""

from __future__ import annotations

from typing import Any

import httpx
import pytest

from server.logprobs import CompletionLogprobs
from sl_serve.core import TokenLogprob
from tests.server.fake_engine import BOS, TWIN_A, ToyTokenizer, logprobs_after

PATH = "/v1/completions"


async def ask(client: httpx.AsyncClient, **body: object) -> dict[str, Any]:
    response = await client.post(PATH, json=body)
    assert response.status_code == 200, response.text
    return response.json()


@pytest.mark.parametrize("max_tokens", [0, 1])
async def test_loglikelihood_request_of_an_evaluation_harness(
    client: httpx.AsyncClient, max_tokens: int
) -> None:
    prompts = [[BOS, 104, 105, 106], [120, 121], [97, TWIN_A, 97]]
    answer = await ask(
        client,
        prompt=prompts,
        max_tokens=max_tokens,
        logprobs=1,
        echo=True,
        temperature=0,
        seed=1234,
    )
    for prompt, choice in zip(prompts, answer["choices"], strict=True):
        logprobs = choice["logprobs"]
        assert {len(values) for values in logprobs.values()} == {len(prompt) + max_tokens}
        assert logprobs["token_logprobs"][0] is None
        assert logprobs["top_logprobs"][0] is None
        end = len(prompt)
        for i in range(1, end):
            exact = logprobs_after(prompt[:i])
            assert logprobs["token_logprobs"][i] == exact[prompt[i]]
            greedy = logprobs["token_logprobs"][i] == max(logprobs["top_logprobs"][i].values())
            assert greedy == (exact[prompt[i]] == max(exact))
        if max_tokens:  # drawn greedily, so it is the best there is
            assert logprobs["token_logprobs"][end] == max(logprobs["top_logprobs"][end].values())


async def test_top_holds_the_chosen_token_with_the_same_float(client: httpx.AsyncClient) -> None:
    for k in (0, 1, 5):
        answer = await ask(client, prompt="abc", max_tokens=20, logprobs=k, seed=2)
        logprobs = answer["choices"][0]["logprobs"]
        for token, value, top in zip(
            logprobs["tokens"], logprobs["token_logprobs"], logprobs["top_logprobs"], strict=True
        ):
            assert top[token] == value
            assert max(1, k) <= len(top) <= k + 1


async def test_text_offsets_point_into_the_text(client: httpx.AsyncClient) -> None:
    answer = await ask(client, prompt="héy", max_tokens=3, logprobs=0, echo=True)
    choice = answer["choices"][0]
    logprobs = choice["logprobs"]
    assert logprobs["tokens"][:5] == ["<s>", "h", "bytes:\\xc3", "bytes:\\xa9", "y"]
    assert logprobs["text_offset"] == [0, 0, 1, 2, 2, 3, 4, 5]
    for token, offset in list(zip(logprobs["tokens"], logprobs["text_offset"], strict=True))[4:]:
        assert choice["text"][offset] == token
    bare = await ask(client, prompt="héy", max_tokens=3, logprobs=0)
    assert bare["choices"][0]["logprobs"]["text_offset"] == [0, 1, 2]


def test_equal_texts_keep_the_chosen_float_and_the_greatest() -> None:
    top = ((TWIN_A, -0.5), (98, -1.0), (97, -2.0))
    shape = CompletionLogprobs(ToyTokenizer())
    (rival_wins,) = shape.output((TokenLogprob(97, -2.0, top),))["top_logprobs"]
    assert rival_wins == {"a": -2.0, f"token_id:{TWIN_A}": -0.5, "b": -1.0}
    (chosen_wins,) = shape.output((TokenLogprob(TWIN_A, -0.5, top),))["top_logprobs"]
    assert chosen_wins == {"a": -0.5, "b": -1.0, "token_id:97": -2.0}
    (neither,) = shape.output((TokenLogprob(98, -1.0, top),))["top_logprobs"]
    assert neither == {"b": -1.0, "a": -0.5}


def test_impossible_tokens_stay_json() -> None:
    shape = CompletionLogprobs(ToyTokenizer())
    rendered = shape.output((TokenLogprob(97, float("-inf"), ((98, 0.0),)),))
    assert rendered["token_logprobs"] == [-9999.0]
    assert rendered["top_logprobs"] == [{"a": -9999.0, "b": 0.0}]


async def test_chat_logprobs(client: httpx.AsyncClient) -> None:
    body = {
        "messages": [{"role": "user", "content": "hi"}],
        "max_tokens": 4,
        "logprobs": True,
        "top_logprobs": 3,
        "temperature": 0,
    }
    answer = (await client.post("/v1/chat/completions", json=body)).json()
    ids = list(b"[user]hi[assistant]")
    for item in answer["choices"][0]["logprobs"]["content"]:
        exact = logprobs_after(ids)
        best = sorted(exact, reverse=True)[:3]
        assert [top["logprob"] for top in item["top_logprobs"]] == best
        assert item["logprob"] == best[0]
        assert bytes(item["bytes"]).decode() == item["token"]
        ids.append(exact.index(best[0]))
    assert len(answer["choices"][0]["logprobs"]["content"]) == 4
