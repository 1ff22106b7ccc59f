"""The openai package against a real server: what most clients are built on."""

from __future__ import annotations

import threading
import time
from collections.abc import Iterator
from typing import Any

import openai
import pytest

from tests.server.conftest import LiveServer
from tests.server.fake_engine import FakeEngine, expected_output
from tests.server.test_completions import text_of

MESSAGES: Any = [{"role": "user", "content": "hi"}]
PROMPT = list(b"[user]hi[assistant]")
ANY_KEY = "none"


@pytest.fixture
def sdk(live: LiveServer) -> Iterator[openai.OpenAI]:
    with openai.OpenAI(base_url=live.url + "/v1", api_key=ANY_KEY, max_retries=0) as sdk:
        yield sdk


def test_models(sdk: openai.OpenAI) -> None:
    assert [model.id for model in sdk.models.list()] == ["toy/one", "alias"]
    assert sdk.models.retrieve("toy/one").id == "toy/one"


def test_chat(sdk: openai.OpenAI) -> None:
    answer = sdk.chat.completions.create(
        model="alias",
        messages=MESSAGES,
        max_completion_tokens=8,
        seed=1,
        n=2,
        logprobs=True,
        top_logprobs=2,
    )
    for i, choice in enumerate(answer.choices):
        assert choice.message.content == text_of(expected_output(PROMPT, 8, seed=1 + i))
        assert choice.finish_reason == "length"
        assert choice.logprobs is not None
        assert [len(entry.top_logprobs) for entry in choice.logprobs.content or []] == [2] * 8
    assert answer.usage is not None
    assert answer.usage.total_tokens == 19 + 16
    assert answer._request_id


def test_chat_stream(sdk: openai.OpenAI) -> None:
    stream = sdk.chat.completions.create(
        model="toy/one",
        messages=MESSAGES,
        max_tokens=8,
        stream=True,
        stream_options={"include_usage": True},
    )
    chunks = list(stream)
    assert chunks[0].choices[0].delta.role == "assistant"
    text = "".join(c.choices[0].delta.content or "" for c in chunks[:-1])
    assert text == text_of(expected_output(PROMPT, 8))
    assert chunks[-1].choices == []
    assert chunks[-1].usage is not None
    assert chunks[-1].usage.completion_tokens == 8
    assert len({chunk.id for chunk in chunks}) == 1


def test_stream_helper(sdk: openai.OpenAI) -> None:
    said = text_of(expected_output(PROMPT, 9))
    stop = said[8]
    create = sdk.chat.completions.stream(model="toy/one", messages=MESSAGES, stop=stop)
    with create as stream:
        final = stream.get_final_completion()
    assert final.choices[0].message.content == said[: said.index(stop)]
    assert final.choices[0].finish_reason == "stop"


def test_completions(sdk: openai.OpenAI) -> None:
    answer = sdk.completions.create(
        model="toy/one", prompt=["ab", "c"], max_tokens=4, echo=True, logprobs=1, seed=3
    )
    assert [choice.text for choice in answer.choices] == [
        prompt + text_of(expected_output(prompt, 4, seed=3)) for prompt in ("ab", "c")
    ]
    assert answer.choices[0].logprobs is not None
    assert answer.choices[0].logprobs.token_logprobs is not None
    assert len(answer.choices[0].logprobs.token_logprobs) == 3 + 4


async def test_async_client(live: LiveServer) -> None:
    async with openai.AsyncOpenAI(base_url=live.url + "/v1", api_key=ANY_KEY) as sdk:
        chat = await sdk.chat.completions.create(model="toy/one", messages=MESSAGES, max_tokens=3)
        assert chat.choices[0].message.content == text_of(expected_output(PROMPT, 3))
        text = ""
        async for chunk in await sdk.chat.completions.create(
            model="toy/one", messages=MESSAGES, max_tokens=6, stream=True
        ):
            text += chunk.choices[0].delta.content or ""
        assert text == text_of(expected_output(PROMPT, 6))
        whole = await sdk.completions.create(model="toy/one", prompt="ab", max_tokens=5)
        assert whole.choices[0].text == text_of(expected_output("ab", 5))
        text = ""
        async for piece in await sdk.completions.create(
            model="toy/one", prompt="ab", max_tokens=5, stream=True
        ):
            text += piece.choices[0].text
        assert text == whole.choices[0].text


def test_errors_are_the_packages_own(sdk: openai.OpenAI, engine: FakeEngine) -> None:
    with pytest.raises(openai.NotFoundError) as missing:
        sdk.completions.create(model="gpt-9", prompt="a")
    assert missing.value.code == "model_not_found"
    with pytest.raises(openai.BadRequestError) as wrong:
        sdk.completions.create(model="toy/one", prompt="a", temperature=9)
    assert wrong.value.param == "temperature"
    engine.max_queue = 0
    with pytest.raises(openai.RateLimitError) as full:
        sdk.completions.create(model="toy/one", prompt="a")
    assert full.value.response.headers["retry-after"] == "120"


def test_error_in_a_stream_is_raised(sdk: openai.OpenAI, engine: FakeEngine) -> None:
    engine.gate.clear()
    stream = sdk.completions.create(model="toy/one", prompt="a", stream=True)
    engine.fail("x")
    with pytest.raises(openai.APIError, match="failed while handling"):
        list(stream)


def test_retries_get_through_a_full_queue(live: LiveServer, engine: FakeEngine) -> None:
    engine.max_queue, engine.retry_after_s = 0, 1
    make_room = threading.Timer(0.5, setattr, (engine, "max_queue", 10))
    make_room.start()
    started_s = time.monotonic()
    with openai.OpenAI(base_url=live.url + "/v1", api_key=ANY_KEY, max_retries=1) as sdk:
        answer = sdk.completions.create(model="toy/one", prompt="a", max_tokens=2)
    assert time.monotonic() - started_s >= 1  # as Retry-After said
    make_room.join()
    assert answer.choices[0].text == text_of(expected_output("a", 2))


def test_wrong_key(start_live: Any) -> None:
    with start_live(api_keys=("right",)) as live:
        base_url = live.url + "/v1"
        wrong = openai.OpenAI(base_url=base_url, api_key="wrong")
        with wrong as sdk, pytest.raises(openai.AuthenticationError):
            sdk.models.list()
        with openai.OpenAI(base_url=base_url, api_key="right") as sdk:
            assert sdk.models.list().data
