"""Tools over HTTP, on the toy engine, which says what a test tells it to."""

from __future__ import annotations

import json
from collections.abc import Iterator
from dataclasses import replace
from typing import Any

import httpx
import openai
import pytest

from sl_serve.grammar.compiler import Grammars
from tests.server.conftest import SETTINGS, LiveServer, MakeClient
from tests.server.fake_engine import FakeEngine
from tests.server.test_completions import events

PATH = "/v1/chat/completions"
HI: Any = [{"role": "user", "content": "hi"}]
PARAMETERS = {"type": "object", "properties": {"city": {"type": "string", "maxLength": 5}}}
PARAMETERS |= {"required": ["city"], "additionalProperties": False}
TOOLS: Any = [
    {
        "type": "function",
        "function": {"name": "weather", "description": "tells", "parameters": PARAMETERS},
    },
    {"type": "function", "function": {"name": "stop"}},
]
CALL = '<tool_call>\n{"name": "weather", "arguments": {"city": "Rome"}}\n</tool_call>'
STOP = '<tool_call>\n{"name": "stop", "arguments": {}}\n</tool_call>'


@pytest.fixture
def hermes(make_client: MakeClient) -> httpx.AsyncClient:
    return make_client(tool_parser="hermes")


async def ask(client: httpx.AsyncClient, **body: Any) -> dict[str, Any]:
    response = await client.post(PATH, json={"messages": HI, "tools": TOOLS, **body})
    assert response.status_code == 200, response.text
    answer: dict[str, Any] = response.json()
    return answer


def calls_of(message: dict[str, Any]) -> list[tuple[str, str]]:
    return [
        (call["function"]["name"], call["function"]["arguments"])
        for call in message.get("tool_calls", [])
    ]


async def test_a_call(hermes: httpx.AsyncClient, engine: FakeEngine) -> None:
    engine.script = CALL.encode()
    choice = (await ask(hermes))["choices"][0]
    [call] = choice["message"]["tool_calls"]
    assert call.pop("id").startswith("call_")
    assert call == {
        "type": "function",
        "function": {"name": "weather", "arguments": '{"city": "Rome"}'},
    }
    assert choice["message"]["content"] is None
    assert choice["finish_reason"] == "tool_calls"


async def test_the_template_gets_the_tools_as_they_were_sent(
    hermes: httpx.AsyncClient, engine: FakeEngine
) -> None:
    await ask(hermes, max_tokens=1)
    text = bytes(engine.submitted[-1].prompt_ids).decode()
    assert text == f"[tools]{json.dumps(TOOLS)}[user]hi[assistant]"
    assert not engine.submitted[-1].sampling.skip_special_tokens
    await ask(hermes, max_tokens=1, tool_choice="none")
    assert bytes(engine.submitted[-1].prompt_ids).decode() == "[user]hi[assistant]"


@pytest.mark.parametrize(
    ("said", "content", "calls"),
    [
        ("Just text.", "Just text.", []),
        (f"See:{CALL}\n{STOP}", "See:", [("weather", '{"city": "Rome"}'), ("stop", "{}")]),
        ("<tool_call>broken", "<tool_call>broken", []),
        (CALL.replace("weather", "unknown"), CALL.replace("weather", "unknown"), []),
    ],
)
async def test_streamed_and_whole_are_the_same(
    hermes: httpx.AsyncClient,
    engine: FakeEngine,
    said: str,
    content: str,
    calls: list[tuple[str, str]],
) -> None:
    engine.script = said.encode()
    choice = (await ask(hermes))["choices"][0]
    assert choice["message"]["content"] == content
    assert calls_of(choice["message"]) == calls
    reason = "tool_calls" if calls else "stop"
    assert choice["finish_reason"] == reason

    body = {"messages": HI, "tools": TOOLS, "stream": True, "logprobs": True}
    chunks = events((await hermes.post(PATH, json=body)).text)
    deltas = [chunk["choices"][0]["delta"] for chunk in chunks]
    assert deltas[0] == {"role": "assistant", "content": None}
    assert "".join(delta.get("content") or "" for delta in deltas) == content
    assert [chunk["choices"][0]["finish_reason"] for chunk in chunks[-2:]] == [None, reason]
    parts = [part for delta in deltas for part in delta.get("tool_calls", [])]
    for index, (name, arguments) in enumerate(calls):
        first, *rest = [part for part in parts if part["index"] == index]
        assert first["function"] == {"name": name, "arguments": ""}
        assert first["type"] == "function"
        assert first["id"]
        assert all(set(part) == {"index", "function"} for part in rest)
        assert "".join(part["function"]["arguments"] for part in rest) == arguments
    entries = [
        entry
        for chunk in chunks
        for entry in (chunk["choices"][0]["logprobs"] or {"content": []})["content"]
    ]
    assert len(entries) == len(said) + 1  # each token's, and the end's


async def test_one_call_where_no_more_are_wanted(
    hermes: httpx.AsyncClient, engine: FakeEngine
) -> None:
    engine.script = (CALL + STOP).encode()
    message = (await ask(hermes, parallel_tool_calls=False))["choices"][0]["message"]
    assert [name for name, _ in calls_of(message)] == ["weather"]


async def test_a_call_that_is_cut_off(hermes: httpx.AsyncClient, engine: FakeEngine) -> None:
    engine.script = CALL.encode()
    choice = (await ask(hermes, max_tokens=CALL.index("Rome") + 2))["choices"][0]
    assert choice["finish_reason"] == "length"
    assert calls_of(choice["message"]) == [("weather", '{"city": "Ro')]


REFUSED: list[tuple[dict[str, Any], str]] = [
    ({"tools": [{"type": "retrieval"}]}, "tools[0].type"),
    ({"tools": [{"type": "function", "function": {"name": "a b"}}]}, "tools[0].function.name"),
    ({"tools": [{"type": "function", "function": {"name": "a" * 65}}]}, "tools[0].function.name"),
    ({"tools": [TOOLS[0], TOOLS[0]]}, "tools"),
    ({"tools": TOOLS * 65}, "tools"),
    ({"tools": 5}, "tools"),
    ({"tool_choice": "perhaps"}, "tool_choice"),
    ({"tool_choice": {"type": "function", "function": {"name": "other"}}}, "tool_choice"),
    ({"tool_choice": ["weather"]}, "tool_choice"),
    ({"tools": [], "tool_choice": "required"}, "tool_choice"),
    ({"parallel_tool_calls": "yes"}, "parallel_tool_calls"),
    (
        {"messages": [{"role": "assistant", "tool_calls": [{"id": "x"}]}]},
        "messages[0].tool_calls[0].function",
    ),
    (
        {
            "tool_choice": "required",
            "tools": [
                {
                    "type": "function",
                    "function": {"name": "f", "parameters": {"$ref": "http://x/y"}},
                }
            ],
        },
        "tools",
    ),
]


@pytest.mark.parametrize(("wrong", "param"), REFUSED)
async def test_refused_with_the_field_named(
    hermes: httpx.AsyncClient, wrong: dict[str, Any], param: str
) -> None:
    response = await hermes.post(PATH, json={"messages": HI, "tools": TOOLS, **wrong})
    assert response.status_code == 400, response.text
    assert response.json()["error"]["param"] == param


async def test_a_model_whose_calls_are_not_known(make_client: MakeClient) -> None:
    for parser in ("auto", "none"):
        response = await make_client(tool_parser=parser).post(
            PATH, json={"messages": HI, "tools": TOOLS}
        )
        assert response.status_code == 400
        assert "--tool-parser" in response.json()["error"]["message"]


@pytest.fixture(scope="module", params=["hermes", "llama3", "mistral"])
def sdk(request: pytest.FixtureRequest, toy_grammars: Grammars) -> Iterator[openai.OpenAI]:
    engine = FakeEngine()
    settings = replace(SETTINGS, tool_parser=request.param)
    with (
        LiveServer(engine, settings, toy_grammars) as server,
        openai.OpenAI(base_url=server.url + "/v1", api_key="none", max_retries=0) as sdk,
    ):
        yield sdk
    engine.close()


NAMED: Any = {"type": "function", "function": {"name": "weather"}}


@pytest.mark.parametrize("choice", ["required", NAMED])
@pytest.mark.parametrize("parallel", [True, False])
def test_forced_calls_with_the_openai_package(
    sdk: openai.OpenAI, choice: Any, parallel: bool
) -> None:
    """The toy model knows nothing of tools: the grammar makes every answer a valid call."""
    asked: Any = {
        "model": "toy/one",
        "messages": HI,
        "tools": TOOLS,
        "tool_choice": choice,
        "parallel_tool_calls": parallel,
        "max_tokens": 200,
        "n": 3,
        "seed": 5,
    }
    answer = sdk.chat.completions.create(**asked)
    for said in answer.choices:
        calls = said.message.tool_calls or []
        assert said.finish_reason == "tool_calls" or (parallel and said.finish_reason == "length")
        assert said.message.content is None
        assert calls
        if choice == NAMED or not parallel:
            assert len(calls) == 1
        for call in calls if said.finish_reason == "tool_calls" else []:
            assert call.type == "function"
            arguments = json.loads(call.function.arguments)
            if choice == NAMED or call.function.name == "weather":
                assert call.function.name == "weather"
                assert len(arguments.pop("city")) <= 5
            assert arguments == {}
    whole = arguments_of(answer)
    assert streamed_arguments(sdk.chat.completions.create(**asked, stream=True)) == whole
    if choice == NAMED or not parallel:  # the package's helper refuses answers that are cut off
        with sdk.chat.completions.stream(**asked) as stream:
            final = stream.get_final_completion()
        assert arguments_of(final) == whole


def arguments_of(answer: Any) -> list[list[str]]:
    return [
        [call.function.arguments for call in choice.message.tool_calls or []]
        for choice in answer.choices
    ]


def streamed_arguments(chunks: Any) -> list[list[str]]:
    found: dict[int, dict[int, str]] = {}
    for chunk in chunks:
        for choice in chunk.choices:
            for call in choice.delta.tool_calls or []:
                calls = found.setdefault(choice.index, {})
                calls[call.index] = calls.get(call.index, "") + (call.function.arguments or "")
    return [list(found[index].values()) for index in sorted(found)]


def test_a_form_or_a_call(sdk: openai.OpenAI) -> None:
    """With both asked for the answer is one of them."""
    schema = {"type": "object", "properties": {"a": {"enum": [1, 2]}}, "required": ["a"]}
    answer = sdk.chat.completions.create(
        model="toy/one",
        messages=HI,
        tools=TOOLS[:1],
        parallel_tool_calls=False,
        response_format={"type": "json_schema", "json_schema": {"name": "n", "schema": schema}},
        n=8,
        seed=2,
        max_tokens=400,
    )
    for choice in answer.choices:
        assert choice.finish_reason in ("stop", "tool_calls")
        if choice.finish_reason == "stop":
            assert json.loads(choice.message.content or "")["a"] in (1, 2)
        else:
            assert choice.message.tool_calls
