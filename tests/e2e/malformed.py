"""Requests that no server should serve, by kind and seed, and what an answer to them must be."""

from __future__ import annotations

import json
import random
import re
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

COMPLETIONS, CHAT = "/v1/completions", "/v1/chat/completions"
GOOD: dict[str, dict[str, Any]] = {
    COMPLETIONS: {"prompt": "abc", "max_tokens": 4, "seed": 1, "temperature": 0.7},
    CHAT: {"messages": [{"role": "user", "content": "x"}], "max_tokens": 4, "seed": 1},
}
NUMBERS = (
    "n",
    "max_tokens",
    "min_tokens",
    "temperature",
    "top_p",
    "min_p",
    "presence_penalty",
    "frequency_penalty",
    "repetition_penalty",
    "seed",
)
SWITCHES = ("stream", "ignore_eos", "include_stop_str_in_output", "return_token_ids")
LISTS = ("stop", "stop_token_ids", "logit_bias", "stream_options")
WRONG: list[Any] = ["x" * 300, "5", [[]], [{"a": None}], {"a": {"b": []}}, 1e300, [None], ["", 1]]
ENDLESS = "(a+)+" * 20 + "$"
DEEP: dict[str, Any] = {"type": "object"}
for _ in range(30):
    DEEP = {"type": "object", "properties": {"a": DEEP, "b": {"$ref": "#"}}, "required": ["a"]}
HOSTILE: list[dict[str, Any]] = [
    {"structured_outputs": {"regex": ENDLESS}},
    {"structured_outputs": {"json": DEEP}},
    {"structured_outputs": {"grammar": "root ::= root root"}},
    {"response_format": {"type": "json_schema", "json_schema": {"name": "a", "schema": DEEP}}},
    {"response_format": {"type": "json_schema", "json_schema": {"schema": {"$ref": "#/x"}}}},
    {"response_format": {"type": "json_schema"}},
    {"response_format": {"type": ["json_object"]}},
    {"chat_template": "{{ ''.__class__.__mro__ }}"},
    {"chat_template": "{% for i in range(10**9) %}x{% endfor %}"},
    {"chat_template_kwargs": {"messages": [], "self": 1, "tools": "x" * 1000}},
    {"tools": [{"type": "function", "function": {"name": "f", "parameters": DEEP}}]},
    {"tools": [{"type": "function"}], "tool_choice": "required"},
    {"tool_choice": {"type": "function", "function": {"name": ENDLESS}}},
    {"user": "x" * 100_000, "metadata": {str(i): i for i in range(500)}},
]


@dataclass(frozen=True)
class Case:
    kind: str
    path: str
    raw: bytes
    may_pass: bool = False  # a server may also ignore what is odd about it
    method: str = "POST"


Maker = Callable[[random.Random], tuple[str, bytes]]


def truncated(rng: random.Random) -> tuple[str, bytes]:
    path, text = good(rng)
    return path, text[: rng.randrange(len(text))]


def not_utf8(rng: random.Random) -> tuple[str, bytes]:
    path, text = good(rng)
    at = rng.randrange(len(text))
    return path, text[:at] + rng.choice([b"\xff", b"\xc0\xaf", b"\xed\xa0\x80", b"\x00"]) + text[
        at:
    ]


def half_a_character(rng: random.Random) -> tuple[str, bytes]:
    return COMPLETIONS, b'{"prompt": "a\\ud8' + rng.choice([b"00", b"0f"]) + b' b"}'


def unbalanced(rng: random.Random) -> tuple[str, bytes]:
    path, text = good(rng)
    at = rng.choice([i for i, c in enumerate(text) if c in b"{}:,"])
    return path, text[:at] + rng.choice([b"]", b"}}", b"[["]) + text[at:]


def deep(rng: random.Random) -> tuple[str, bytes]:
    depth = rng.choice([65, 100, 1000, 30_000])
    inside = b"[" * depth + b"]" * rng.choice([depth, 0])
    if rng.random() < 0.5:
        inside = b'{"a":' * depth + b"1" + b"}" * depth
    return rng.choice([COMPLETIONS, CHAT]), b'{"prompt": "a", "odd": ' + inside + b"}"


def no_number(rng: random.Random) -> tuple[str, bytes]:
    path, text = good(rng)
    numbers = [b"NaN", b"Infinity", b"-Infinity", b"1" + b"0" * 400, b"1e400", b"0x10", b"01"]
    field = rng.choice(NUMBERS).encode()
    return path, text[:-1] + b', "%s": %s}' % (field, rng.choice(numbers))


def no_object(rng: random.Random) -> tuple[str, bytes]:
    bodies = [b"", b"null", b"[]", b'"text"', b"5", b"true", b"a=b", b"{'a': 1}", b"[{}]", b"{}{}"]
    return rng.choice([COMPLETIONS, CHAT, "/tokenize", "/detokenize"]), rng.choice(bodies)


def wrong_type(rng: random.Random) -> tuple[str, bytes]:
    field = rng.choice(NUMBERS + SWITCHES + LISTS)
    fitting = [v for v in WRONG if not (field == "stop" and isinstance(v, str))]
    return with_fields(rng, {field: rng.choice(fitting)})


def out_of_range(rng: random.Random) -> tuple[str, bytes]:
    field = rng.choice([f for f in NUMBERS if f != "seed"])
    return with_fields(rng, {field: rng.choice([-3, 10**9, 10**30, -(10**18)])})


def too_many(rng: random.Random) -> tuple[str, bytes]:
    return with_fields(
        rng,
        rng.choice(
            [
                {"stop": ["s"] * rng.choice([17, 1000, 100_000])},
                {"stop": "s" * 1001},
                {"stop_token_ids": [1] * 1025},
                {"logit_bias": {str(i): 1 for i in range(1025)}},
                {"logit_bias": {"9" * 5000: 1}},
                {"n": rng.choice([129, 10**6, 10**9])},
                {"max_tokens": rng.choice([10**4, 10**12])},
            ]
        ),
    )


def strange_ids(rng: random.Random) -> tuple[str, bytes]:
    ids = rng.choice(
        [[-1], [10**6], [10**30], [True], [1.0], [None], [[1], [-5]], [[[1]]], ["a", 1]]
    )
    return rng.choice(
        [
            with_fields(rng, {"stop_token_ids": ids}),
            (COMPLETIONS, encoded(GOOD[COMPLETIONS] | {"prompt": ids})),
            ("/detokenize", encoded({"tokens": ids})),
            with_fields(rng, {"logit_bias": {str(rng.choice([-1, 10**6, "x"])): 1}}),
        ]
    )


def too_many_logprobs(rng: random.Random) -> tuple[str, bytes]:
    many = rng.choice([21, 10**6, -1, 10**18])
    chat = {"logprobs": True, "top_logprobs": many}
    return rng.choice(
        [
            (COMPLETIONS, encoded(GOOD[COMPLETIONS] | {"logprobs": many})),
            (CHAT, encoded(GOOD[CHAT] | chat)),
        ]
    )


def nothing_to_say(rng: random.Random) -> tuple[str, bytes]:
    prompts: list[Any] = ["", [], [[]], [""], None, 5, {"a": 1}, [["a"]], [[1], ""], ["a"] * 2000]
    messages: list[Any] = [[], None, "x", [{}], [{"role": "user", "content": 5}], [None], [[]]]
    messages += [[{"role": "nobody", "content": "x"}], [{"content": "x"}]]
    return rng.choice(
        [
            (COMPLETIONS, encoded(GOOD[COMPLETIONS] | {"prompt": rng.choice(prompts)})),
            (CHAT, encoded(GOOD[CHAT] | {"messages": rng.choice(messages)})),
        ]
    )


def too_long(rng: random.Random) -> tuple[str, bytes]:
    text = "ab" * rng.choice([200, 5000, 200_000])
    return rng.choice(
        [
            (COMPLETIONS, encoded({"prompt": text})),
            (CHAT, encoded({"messages": [{"role": "user", "content": text}]})),
        ]
    )


def no_such_model(rng: random.Random) -> tuple[str, bytes]:
    return with_fields(rng, {"model": rng.choice(["gpt-9", "", "../tiny", "x" * 5000, "TINY"])})


def good(rng: random.Random) -> tuple[str, bytes]:
    path = rng.choice([COMPLETIONS, CHAT])
    return path, encoded(GOOD[path])


def with_fields(rng: random.Random, fields: Mapping[str, Any]) -> tuple[str, bytes]:
    path = rng.choice([COMPLETIONS, CHAT])
    return path, encoded(GOOD[path] | fields)


def encoded(body: Mapping[str, Any]) -> bytes:
    return json.dumps(body).encode()


MAKERS: tuple[Maker, ...] = (
    truncated,
    not_utf8,
    half_a_character,
    unbalanced,
    deep,
    no_number,
    no_object,
    wrong_type,
    out_of_range,
    too_many,
    strange_ids,
    too_many_logprobs,
    nothing_to_say,
    too_long,
    no_such_model,
)


def case(seed: int, number: int) -> Case:
    """The same for the same two numbers. The first ones have a kind each, the others any."""
    rng = random.Random(f"{seed},{number}")
    if rng.random() < 0.1:
        path, raw = with_fields(rng, rng.choice(HOSTILE))
        return Case("hostile", path, raw, may_pass=True)
    if rng.random() < 0.05:
        method, path = rng.choice(
            [("GET", COMPLETIONS), ("POST", "/v1/models"), ("PUT", CHAT), ("POST", "/v1/../etc")]
        )
        return Case("route", path, encoded(GOOD[CHAT]), method=method)
    maker = MAKERS[number] if number < len(MAKERS) else rng.choice(MAKERS)
    return Case(maker.__name__, *maker(rng))


def complaint(case: Case, status: int, content_type: str, text: str) -> str | None:
    """What is wrong with the answer."""
    if status >= 500 or not (case.may_pass or status >= 400):
        return f"status {status}"
    if status < 400:
        return None
    if content_type != "application/json":
        return f"an error as {content_type}"
    body = json.loads(text)
    error = body.get("error") if isinstance(body, dict) else None
    if body.keys() != {"error"} or not isinstance(error, dict):
        return f"no error object: {text[:200]}"
    if error.keys() != {"message", "type", "param", "code"}:
        return f"fields {sorted(error)}"
    if not isinstance(error["message"], str) or "Traceback" in error["message"]:
        return f"message {error['message']!r}"
    return None


def without_ids(answer: bytes) -> bytes:
    """An answer's bytes but for its id and time."""
    text = re.sub(rb'"id":"[^"]*"', b'"id":""', answer)
    return re.sub(rb'"created":\d+', b'"created":0', text)
