from __future__ import annotations

import json

import httpx
import pytest

from clients.answers import StreamReader, parse_completion, parse_error
from clients.protocol import ApiError, UnreachableError


def event(**fields: object) -> bytes:
    return b"data: " + json.dumps(fields, ensure_ascii=False).encode() + b"\n\n"


def text_event(text: str, finish_reason: str | None = None) -> bytes:
    return event(model="m", choices=[{"text": text, "finish_reason": finish_reason}])


USAGE = event(model="m", choices=[], usage={"prompt_tokens": 4, "completion_tokens": 2})
DONE = b"data: [DONE]\n\n"


@pytest.mark.parametrize("size", [1, 2, 3, 5, 8, 1000])
def test_text_does_not_depend_on_how_the_bytes_are_cut(size: int) -> None:
    text = ["Grüße", " 日本", "\u2028\x85", "\n", "🙂"]
    raw = b": ping\n\n" + b"".join(map(text_event, text)) + text_event("", "stop") + USAGE + DONE
    reader = StreamReader()
    pieces = [p for i in range(0, len(raw), size) for p in reader.feed(raw[i : i + size])]
    assert pieces == text
    result = reader.result()
    assert result.text == "".join(text)
    assert (result.finish_reason, result.model) == ("stop", "m")
    assert (result.prompt_tokens, result.completion_tokens) == (4, 2)


def test_a_cut_stream_has_no_result() -> None:
    reader = StreamReader()
    assert reader.feed(text_event("half")) == ["half"]
    with pytest.raises(UnreachableError, match="before the answer was complete"):
        reader.result()


def test_an_error_inside_the_stream_is_raised() -> None:
    reader = StreamReader()
    with pytest.raises(ApiError, match="engine died") as caught:
        reader.feed(event(error={"message": "engine died", "type": "server_error", "param": None}))
    assert caught.value.kind == "server_error"


def test_null_content_of_a_message_is_no_text() -> None:
    body = {
        "model": "m",
        "choices": [{"message": {"role": "assistant", "content": None}, "finish_reason": "stop"}],
        "usage": {"prompt_tokens": 1, "completion_tokens": 0},
    }
    assert parse_completion(httpx.Response(200, json=body)).text == ""


@pytest.mark.parametrize("body", ["<html>", "[]", "{}", '{"choices": []}'])
def test_an_answer_of_another_kind_is_an_api_error(body: str) -> None:
    with pytest.raises(ApiError, match="not "):
        parse_completion(httpx.Response(200, text=body))


@pytest.mark.parametrize(
    ("body", "message"),
    [
        ('{"error": {"message": "too long", "type": "x", "param": "prompt"}}', "too long"),
        ('{"error": "Unauthorized"}', "Unauthorized"),
        ("<html>bad gateway</html>", "bad gateway"),
        ("", "Bad Gateway"),
        ("[1]", "[1]"),
    ],
)
def test_errors_of_any_shape_keep_their_message(body: str, message: str) -> None:
    error = parse_error(httpx.Response(502, text=body))
    assert message in str(error)
    assert error.status == 502
