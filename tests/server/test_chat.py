from __future__ import annotations

from typing import Any

import httpx
import pytest

from tests.server.fake_engine import FakeEngine, expected_output
from tests.server.test_completions import events, text_of

PATH = "/v1/chat/completions"
HI = [{"role": "user", "content": "hi"}]

CALL = {"id": "1", "type": "function", "function": {"name": "f", "arguments": "{}"}}

CALL_OF_ARGUMENTS = {"id": "2", "function": {"name": "f", "arguments": '{"a": null}'}}
# A template writes arguments as JSON itself, so it is given what they mean.
MADE = {"id": "2", "type": "function", "function": {"name": "f", "arguments": {"a": None}}}


def ids_of(text: str) -> list[int]:
    return list(text.encode())


async def test_answer(client: httpx.AsyncClient, engine: FakeEngine) -> None:
    answer = (await client.post(PATH, json={"messages": HI, "max_tokens": 6, "seed": 1})).json()
    prompt = ids_of("[user]hi[assistant]")
    assert engine.submitted[0].prompt_ids == prompt  # the template's own special tokens alone
    assert answer["object"] == "chat.completion"
    assert answer["id"].startswith("chatcmpl-")
    assert answer["choices"] == [
        {
            "index": 0,
            "message": {
                "role": "assistant",
                "content": text_of(expected_output(prompt, 6, seed=1)),
                "refusal": None,
            },
            "logprobs": None,
            "finish_reason": "length",
            "stop_reason": None,
        }
    ]
    assert answer["usage"] == {"prompt_tokens": 19, "completion_tokens": 6, "total_tokens": 25}


async def test_roles_and_contents(client: httpx.AsyncClient, engine: FakeEngine) -> None:
    messages = [
        {"role": "system", "content": "s"},
        {"role": "developer", "content": [{"type": "text", "text": "d1"}]},
        {"role": "user", "content": [{"type": "text", "text": "a"}, {"type": "text", "text": "b"}]},
        {"role": "assistant", "content": None, "tool_calls": [CALL]},
        {"role": "tool", "content": "t", "tool_call_id": "1"},
    ]
    response = await client.post(PATH, json={"messages": messages, "max_tokens": 1})
    assert response.status_code == 200, response.text
    text = "[system]s[developer]d1[user]a\nb[assistant][tool]t[assistant]"
    assert engine.submitted[0].prompt_ids == ids_of(text)


async def test_only_named_fields_reach_the_template(
    client: httpx.AsyncClient, engine: FakeEngine, monkeypatch: pytest.MonkeyPatch
) -> None:
    seen: list[Any] = []

    def render(messages: Any, **_: object) -> str:
        seen.extend(messages)
        return "x"

    monkeypatch.setattr(engine.tokenizer, "render_chat", render)
    messages = [
        {"role": "user", "content": "a", "name": "n", "evil": "{{x}}"},
        {"role": "assistant", "content": None, "tool_calls": [CALL_OF_ARGUMENTS]},
        {"role": "tool", "content": "t", "tool_call_id": "1"},
    ]
    await client.post(PATH, json={"messages": messages, "max_tokens": 1})
    assert seen == [
        {"role": "user", "content": "a", "name": "n"},
        {"role": "assistant", "content": "", "tool_calls": [MADE]},
        {"role": "tool", "content": "t", "tool_call_id": "1"},
    ]


@pytest.mark.parametrize(
    ("limits", "n_tokens"),
    [
        ({}, 81),
        ({"max_tokens": 5}, 5),
        ({"max_completion_tokens": 4}, 4),
        ({"max_tokens": 9, "max_completion_tokens": 3}, 3),
        ({"max_tokens": 0}, 0),
    ],
)
async def test_token_limits(
    client: httpx.AsyncClient, engine: FakeEngine, limits: dict[str, int], n_tokens: int
) -> None:
    engine.max_model_len = 100  # 19 of them are the prompt
    answer = (await client.post(PATH, json={"messages": HI, **limits})).json()
    assert answer["usage"]["completion_tokens"] == n_tokens


async def test_stream_says_the_same_as_the_whole_answer(client: httpx.AsyncClient) -> None:
    body = {"messages": HI, "n": 3, "seed": 9, "max_tokens": 7, "logprobs": True, "top_logprobs": 2}
    whole = (await client.post(PATH, json=body)).json()
    options = {"stream": True, "stream_options": {"include_usage": True}}
    response = await client.post(PATH, json=body | options)
    *chunks, last = events(response.text)
    assert (last["choices"], last["usage"]) == ([], whole["usage"])
    for chunk in (*chunks, last):
        assert chunk["object"] == "chat.completion.chunk"
        for key in ("id", "created", "model", "system_fingerprint"):
            assert chunk[key] == chunks[0][key]
    for choice in whole["choices"]:
        pieces = [c["choices"][0] for c in chunks if c["choices"][0]["index"] == choice["index"]]
        assert pieces[0]["delta"] == {"role": "assistant", "content": ""}
        assert not any("role" in piece["delta"] for piece in pieces[1:])
        text = "".join(piece["delta"].get("content", "") for piece in pieces)
        assert text == choice["message"]["content"]
        logprobs = [e for p in pieces if p["logprobs"] for e in p["logprobs"]["content"]]
        assert logprobs == choice["logprobs"]["content"]
        assert pieces[-1]["finish_reason"] == choice["finish_reason"]
        assert all(piece["finish_reason"] is None for piece in pieces[:-1])


async def test_stream_without_usage_has_no_usage_chunk(client: httpx.AsyncClient) -> None:
    body = {"messages": HI, "max_tokens": 3, "stream": True}
    chunks = events((await client.post(PATH, json=body)).text)
    assert all(chunk["choices"] and "usage" not in chunk for chunk in chunks)


async def test_return_token_ids(client: httpx.AsyncClient) -> None:
    body = {"messages": HI, "max_tokens": 4, "return_token_ids": True}
    answer = (await client.post(PATH, json=body)).json()
    prompt = ids_of("[user]hi[assistant]")
    assert answer["prompt_token_ids"] == prompt
    assert answer["choices"][0]["token_ids"] == expected_output(prompt, 4)
    chunks = events((await client.post(PATH, json=body | {"stream": True})).text)
    pieces = [chunk["choices"][0] for chunk in chunks]
    assert pieces[0]["prompt_token_ids"] == prompt
    assert [i for piece in pieces[1:] for i in piece["token_ids"]] == expected_output(prompt, 4)


@pytest.mark.parametrize(
    "harmless",
    [
        {"tools": []},
        {"tools": None, "tool_choice": "auto"},
        {"tool_choice": "none"},
        {"response_format": {"type": "text"}},
        {"top_logprobs": 0},
        {"top_logprobs": None, "logprobs": False},
    ],
)
async def test_accepted_though_without_effect(
    client: httpx.AsyncClient, harmless: dict[str, object]
) -> None:
    response = await client.post(PATH, json={"messages": HI, "max_tokens": 1, **harmless})
    assert response.status_code == 200, response.text


@pytest.mark.parametrize(
    ("wrong", "param", "code"),
    [
        ({"tools": [{"type": "function"}]}, "tools[0].function", None),
        ({"tools": [{"type": "function", "function": {"name": "f"}}]}, "tools", "not_supported"),
        ({"tool_choice": "required"}, "tool_choice", None),
        ({"tool_choice": {"type": "function"}}, "tool_choice", None),
        ({"response_format": {"type": "xml"}}, "response_format.type", None),
        ({"response_format": {"type": "json_schema"}}, "response_format.json_schema", None),
        ({"response_format": {}}, "response_format.type", None),
        ({"top_logprobs": 2}, "top_logprobs", None),
        ({"logprobs": True, "top_logprobs": 21}, "top_logprobs", None),
        ({"logprobs": 1}, "logprobs", None),
        ({"messages": []}, "messages", None),
        ({"messages": [{"role": "wizard", "content": "x"}]}, "messages[0].role", None),
        ({"messages": [{"content": "x"}]}, "messages[0].role", None),
        ({"messages": ["hi"]}, "messages[0]", None),
        ({"messages": [HI[0], {"role": "user", "content": 5}]}, "messages[1].content", None),
        (
            {"messages": [{"role": "user", "content": [{"type": "image_url"}]}]},
            "messages[0].content",
            None,
        ),
        (
            {"messages": [{"role": "user", "content": [{"type": "text"}]}]},
            "messages[0].content",
            None,
        ),
        ({"messages": [{"role": "user", "content": "refuse me"}]}, "messages", None),
    ],
)
async def test_refused_with_the_field_named(
    client: httpx.AsyncClient, wrong: dict[str, object], param: str, code: str | None
) -> None:
    response = await client.post(PATH, json={"messages": HI, **wrong})
    assert response.status_code == 400
    error = response.json()["error"]
    assert (error["param"], error["code"]) == (param, code)
    assert error["type"] == "invalid_request_error"


async def test_switches_of_the_template(client: httpx.AsyncClient, engine: FakeEngine) -> None:
    body = {"messages": HI, "max_tokens": 1, "chat_template_kwargs": {"enable_thinking": False}}
    await client.post(PATH, json=body)
    assert engine.submitted[0].prompt_ids == ids_of(
        '[settings]{"enable_thinking": false}[user]hi[assistant]'
    )
    await client.post(PATH, json={"messages": HI, "max_tokens": 1, "reasoning_effort": "low"})
    assert engine.submitted[1].prompt_ids == ids_of(
        '[settings]{"reasoning_effort": "low"}[user]hi[assistant]'
    )
    counted = await client.post("/tokenize", json=body)
    assert counted.json()["tokens"] == engine.submitted[0].prompt_ids


@pytest.mark.parametrize("given", [{"messages": []}, {"tools": []}, [], "x"])
async def test_switches_cannot_stand_for_other_fields(
    client: httpx.AsyncClient, given: object
) -> None:
    for path in (PATH, "/tokenize"):
        response = await client.post(path, json={"messages": HI, "chat_template_kwargs": given})
        assert response.status_code == 400
        assert response.json()["error"]["param"] == "chat_template_kwargs"
