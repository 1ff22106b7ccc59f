from __future__ import annotations

import json
import random
import time

import pytest

from server.limits import SLICE_BYTES, nesting_exceeds, parse_object
from server.settings import ServerSettings
from sl_serve.errors import RequestError, UserError


def depth_of(value: object) -> int:
    if isinstance(value, dict):
        return 1 + max(map(depth_of, [*value.values()]), default=0)
    if isinstance(value, list):
        return 1 + max(map(depth_of, value), default=0)
    return 0


def random_json(rng: random.Random, depth: int) -> object:
    kind = rng.randrange(4) if depth else 0
    if kind == 0:
        return rng.choice(["", '"', "\\", '\\"', "[[{", "}]", 'a\\\\"[', "ü{"]) * rng.randrange(3)
    if kind == 1:
        return {str(i) + "[": random_json(rng, depth - 1) for i in range(rng.randrange(3))}
    return [random_json(rng, depth - 1) for _ in range(rng.randrange(4))]


@pytest.mark.parametrize("seed", range(40))
def test_depth_agrees_with_the_parsed_value(seed: int) -> None:
    rng = random.Random(seed)
    value = {"": random_json(rng, 9)}
    depth = depth_of(value)
    text = json.dumps(value, ensure_ascii=False).encode()
    assert not nesting_exceeds(text, depth)
    assert nesting_exceeds(text, depth - 1)


@pytest.mark.parametrize("shift", range(-3, 4))
def test_strings_over_slice_borders(shift: int) -> None:
    filler = "a" * (SLICE_BYTES - 8 + shift)
    text = json.dumps({"k": [filler, '"[[[', [1]]}).encode()
    assert not nesting_exceeds(text, 3)
    assert nesting_exceeds(text, 2)


@pytest.mark.parametrize(
    "body",
    [b'"' * 8_000_000, b'["' + b'\\"' * 4_000_000, b"[]" * 2_000_000, b'"' + b"\\" * 8_000_001],
    ids=["quotes", "escaped quotes", "brackets", "backslashes"],
)
def test_hostile_bodies_take_linear_time(body: bytes) -> None:
    started_s = time.monotonic()
    assert not nesting_exceeds(body, 1)
    assert time.monotonic() - started_s < 4


def test_parse_object_says_what_is_wrong() -> None:
    with pytest.raises(RequestError, match="deeper than 2 levels"):
        parse_object(b'{"a": {"b": {}}}', 2)
    with pytest.raises(RequestError, match="not valid JSON"):
        parse_object(b'{"a": }', 2)
    with pytest.raises(RequestError, match="should be a JSON object"):
        parse_object(b"[]", 2)
    assert parse_object(b'{"a": {"b": 1}}', 2) == {"a": {"b": 1}}


@pytest.mark.parametrize(
    ("changes", "complaint"),
    [
        ({"ping_s": 15.5}, "at most 15"),
        ({"ping_s": 0}, "above 0"),
        ({"served_model_names": ()}, "at least one name"),
        ({"served_model_names": ("a", "")}, "none may be empty"),
        ({"api_keys": ("",)}, "empty"),
        ({"port": 65536}, "65536"),
    ],
)
def test_settings_are_checked(changes: dict[str, object], complaint: str) -> None:
    with pytest.raises(UserError, match=complaint):
        ServerSettings(**{"served_model_names": ("m",), **changes})  # type: ignore[arg-type]


@pytest.mark.parametrize(
    ("host", "loopback"),
    [
        ("localhost", True),
        ("127.0.0.1", True),
        ("127.8.0.1", True),
        ("::1", True),
        ("0.0.0.0", False),
        ("::", False),
        ("10.0.0.5", False),
        ("example.org", False),
    ],
)
def test_on_loopback(host: str, loopback: bool) -> None:
    assert ServerSettings(served_model_names=("m",), host=host).on_loopback is loopback
