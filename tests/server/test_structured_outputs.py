"""Forms asked for over HTTP, on the toy engine, whose sampler asks the request's constraint."""

from __future__ import annotations

import asyncio
import json
from collections.abc import AsyncIterator, Iterator
from typing import Any

import httpx
import jsonschema
import pytest

from server.app import create_app
from server.context import ServerContext
from sl_serve.grammar.compiler import Grammars
from tests.server.conftest import SETTINGS
from tests.server.fake_engine import FakeEngine
from tests.server.test_completions import events

CHAT, COMPLETIONS = "/v1/chat/completions", "/v1/completions"
HI = [{"role": "user", "content": "hi"}]
SCHEMA = {
    "type": "object",
    "properties": {"city": {"enum": ["Paris", "Rome"]}, "big": {"type": "boolean"}},
    "required": ["city", "big"],
    "additionalProperties": False,
}
NAMED = {"name": "city", "schema": SCHEMA, "strict": True}


@pytest.fixture(scope="module")
def shared(toy_grammars: Grammars) -> Iterator[tuple[FakeEngine, Any]]:
    engine = FakeEngine()
    app = create_app(engine, SETTINGS)
    app.state.context.grammars = toy_grammars
    yield engine, app
    app.state.context.close()
    engine.close()


@pytest.fixture
async def client(shared: tuple[FakeEngine, Any]) -> AsyncIterator[httpx.AsyncClient]:
    transport = httpx.ASGITransport(shared[1])
    async with httpx.AsyncClient(transport=transport, base_url="http://localhost") as client:
        yield client


@pytest.fixture
def context(shared: tuple[FakeEngine, Any]) -> ServerContext:
    found: ServerContext = shared[1].state.context
    return found


async def texts(client: httpx.AsyncClient, path: str, **body: Any) -> list[str]:
    """Of all choices, streamed and not; checks that both are the same."""
    start: dict[str, Any] = {"messages": HI} if path == CHAT else {"prompt": "p"}
    asked = start | {"max_tokens": 300, "n": 4, "seed": 1} | body
    response = await client.post(path, json=asked)
    assert response.status_code == 200, response.text
    choices = response.json()["choices"]
    assert {choice["finish_reason"] for choice in choices} == {"stop"}
    whole = [c["message"]["content"] if path == CHAT else c["text"] for c in choices]
    streamed = [""] * 4
    for chunk in events((await client.post(path, json=asked | {"stream": True})).text):
        for choice in chunk["choices"]:
            said = choice["delta"].get("content", "") if path == CHAT else choice["text"]
            streamed[choice["index"]] += said
    assert streamed == whole
    return whole


@pytest.mark.parametrize("path", [CHAT, COMPLETIONS])
@pytest.mark.parametrize(
    "asked",
    [
        {"response_format": {"type": "json_schema", "json_schema": NAMED}},
        {"structured_outputs": {"json": SCHEMA}},
        {"structured_outputs": {"json": json.dumps(SCHEMA), "regex": None}},
    ],
)
async def test_answers_follow_the_schema(
    client: httpx.AsyncClient, path: str, asked: dict[str, Any]
) -> None:
    for text in await texts(client, path, **asked):
        jsonschema.validate(json.loads(text), SCHEMA)


@pytest.mark.parametrize("path", [CHAT, COMPLETIONS])
@pytest.mark.parametrize(
    ("asked", "possible"),
    [
        ({"choice": ["yes", "no", "maybe so"]}, {"yes", "no", "maybe so"}),
        ({"regex": "(a|b)c{2}"}, {"acc", "bcc"}),
        ({"grammar": 'root ::= "x" tail\ntail ::= "1" | "2"'}, {"x1", "x2"}),
    ],
)
async def test_other_forms(
    client: httpx.AsyncClient, path: str, asked: dict[str, Any], possible: set[str]
) -> None:
    assert set(await texts(client, path, structured_outputs=asked)) <= possible


async def test_any_json_object(client: httpx.AsyncClient) -> None:
    body = {"messages": HI, "max_tokens": 60, "response_format": {"type": "json_object"}}
    answer = (await client.post(CHAT, json=body)).json()
    assert answer["choices"][0]["message"]["content"].startswith("{")


async def test_text_is_no_constraint(
    client: httpx.AsyncClient, shared: tuple[FakeEngine, Any]
) -> None:
    body = {"prompt": "p", "max_tokens": 3, "response_format": {"type": "text"}}
    assert (await client.post(COMPLETIONS, json=body)).status_code == 200
    assert shared[0].submitted[-1].constraint is None


async def test_every_choice_has_a_constraint_of_its_own(
    client: httpx.AsyncClient, shared: tuple[FakeEngine, Any]
) -> None:
    body = {"prompt": ["p", "q"], "n": 2, "structured_outputs": {"choice": ["yes", "no"]}}
    await client.post(COMPLETIONS, json=body)
    constraints = [request.constraint for request in shared[0].submitted[-4:]]
    assert None not in constraints
    assert len(set(map(id, constraints))) == 4


REFUSED: list[tuple[dict[str, Any], str]] = [
    ({"response_format": {"type": "json_schema"}}, "response_format.json_schema"),
    (
        {"response_format": {"type": "json_schema", "json_schema": {}}},
        "response_format.json_schema.schema",
    ),
    ({"response_format": {"type": "grammar"}}, "response_format.type"),
    ({"structured_outputs": {}}, "structured_outputs"),
    ({"structured_outputs": {"regex": "a", "choice": ["a"]}}, "structured_outputs"),
    ({"structured_outputs": 5}, "structured_outputs"),
    ({"structured_outputs": {"regex": 5}}, "structured_outputs.regex"),
    ({"structured_outputs": {"choice": ["a", 5]}}, "structured_outputs.choice[1]"),
    ({"structured_outputs": {"choice": []}}, "structured_outputs.choice"),
    ({"structured_outputs": {"regex": "((("}}, "structured_outputs.regex"),
    ({"structured_outputs": {"grammar": "nonsense"}}, "structured_outputs.grammar"),
    ({"structured_outputs": {"json": "{"}}, "structured_outputs.json"),
    ({"structured_outputs": {"json": "[" * 100_000}}, "structured_outputs.json"),
    ({"structured_outputs": {"json": {"$ref": "http://x/y"}}}, "structured_outputs.json"),
    (
        {
            "structured_outputs": {"regex": "a"},
            "response_format": {"type": "json_object"},
        },
        "structured_outputs",
    ),
]


@pytest.mark.parametrize(("wrong", "param"), REFUSED)
@pytest.mark.parametrize("stream", [False, True])
async def test_refused_with_the_field_named(
    client: httpx.AsyncClient, wrong: dict[str, Any], param: str, stream: bool
) -> None:
    response = await client.post(COMPLETIONS, json={"prompt": "p", "stream": stream, **wrong})
    assert response.status_code == 400, response.text
    error = response.json()["error"]
    assert error["param"] == param
    assert error["type"] == "invalid_request_error"


async def test_the_loop_and_others_go_on_while_a_grammar_compiles(
    client: httpx.AsyncClient, context: ServerContext, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A compiler that is stuck holds up neither plain requests nor grammars known before."""
    known = {"prompt": "p", "max_tokens": 3, "structured_outputs": {"choice": ["a", "b"]}}
    assert (await client.post(COMPLETIONS, json=known)).status_code == 200
    entered, leave = asyncio.Event(), asyncio.Event()
    loop = asyncio.get_running_loop()
    ask = context.grammars._ask

    def stuck(source: str) -> bytes:
        loop.call_soon_threadsafe(entered.set)
        asyncio.run_coroutine_threadsafe(leave.wait(), loop).result(30)
        return ask(source)

    monkeypatch.setattr(context.grammars, "_ask", stuck)
    monkeypatch.setattr("server.context.MAX_COMPILING", 1)
    new = {"prompt": "p", "structured_outputs": {"choice": ["new"]}}
    waiting = asyncio.create_task(client.post(COMPLETIONS, json=new))
    await entered.wait()
    assert (await client.post(COMPLETIONS, json=known)).status_code == 200
    assert (await client.post(COMPLETIONS, json={"prompt": "p"})).status_code == 200
    full = await client.post(
        COMPLETIONS, json={"prompt": "p", "structured_outputs": {"choice": ["other"]}}
    )
    assert full.status_code == 429
    assert full.headers["retry-after"] == "5"
    leave.set()
    assert (await waiting).json()["choices"][0]["text"] == "new"
