"""What is refused without being compiled."""

from __future__ import annotations

import json
from collections.abc import Callable
from typing import Any

import pytest

from sl_serve.errors import RequestError
from sl_serve.grammar import forms


def nested(depth: int) -> dict[str, Any]:
    schema: dict[str, Any] = {"type": "integer"}
    for _ in range(depth):
        schema = {"type": "array", "items": schema}
    return schema


REFUSED: list[tuple[Callable[[], object], str]] = [
    (lambda: forms.json_schema(5, "p"), "'5' where a schema"),
    (lambda: forms.json_schema({"type": "array", "items": [5]}, "p"), "where a schema"),
    (lambda: forms.json_schema({"properties": []}, "p"), "'properties' that is no object"),
    (lambda: forms.json_schema({"anyOf": {}}, "p"), "'anyOf' that is no list"),
    (lambda: forms.json_schema(nested(49), "p"), "nested deeper than 48"),
    (lambda: forms.json_schema({"enum": ["x" * 70_000]}, "p"), "the limit is 65536"),
    (lambda: forms.json_schema({"$ref": "http://127.0.0.1/x"}, "p"), "into the schema itself"),
    (lambda: forms.json_schema({"$ref": "file:///etc/passwd"}, "p"), "into the schema itself"),
    (lambda: forms.json_schema({"$ref": 7}, "p"), "into the schema itself"),
    (lambda: forms.json_schema({"$ref": "#anchor"}, "p"), "into the schema itself"),
    (lambda: forms.json_schema({"$ref": "#/$defs/no"}, "p"), "does not exist"),
    (lambda: forms.json_schema({"$ref": "#"}, "p"), "refers to itself"),
    (
        lambda: forms.json_schema(
            {
                "$ref": "#/$defs/a",
                "$defs": {"a": {"$ref": "#/$defs/b"}, "b": {"$ref": "#/$defs/a"}},
            },
            "p",
        ),
        "refers to itself",
    ),
    (lambda: forms.json_schema({"type": "array", "uniqueItems": True}, "p"), "'uniqueItems'"),
    (lambda: forms.json_schema({"not": {"type": "string"}}, "p"), "'not'"),
    (lambda: forms.json_schema({"properties": {"a": {"multipleOf": 3}}}, "p"), "'multipleOf'"),
    (lambda: forms.json_schema({"minimum": 3}, "p"), "'minimum' without a 'type'"),
    (
        lambda: forms.json_schema({"$ref": "#/$defs/a", "$defs": {"a": {}}, "minimum": 3}, "p"),
        "beside",
    ),
    (
        lambda: forms.json_schema({"anyOf": [{}], "properties": {"a": {}}}, "p"),
        "'properties' beside",
    ),
    (lambda: forms.json_schema({"enum": [1, 2], "minimum": 2}, "p"), "'minimum' beside 'enum'"),
    (lambda: forms.json_schema({"enum": ["a", 1], "type": "string"}, "p"), "the value '1'"),
    (lambda: forms.json_schema({"const": True, "type": "integer"}, "p"), "the value 'True'"),
    (lambda: forms.json_schema({"enum": 5}, "p"), "'enum' that is no list"),
    (lambda: forms.json_schema({"properties": {"a": {}}, "required": ["b"]}, "p"), "requires 'b'"),
    (lambda: forms.json_schema({"properties": {}, "required": "b"}, "p"), "no list of names"),
    (lambda: forms.json_schema({"type": "object", "minProperties": 2}, "p"), "above 1"),
    (lambda: forms.regex("a" * 5000, "p"), "5000 characters; the limit is 4096"),
    (lambda: forms.ebnf("x" * 70_000, "p"), "70000 characters"),
    (lambda: forms.choice([], "p"), "at least one text"),
    (lambda: forms.choice(["a", ""], "p"), "none may be empty"),
    (lambda: forms.choice(["a"] * 1001, "p"), "1001 texts; the limit is 1000"),
]


@pytest.mark.parametrize(("make", "words"), REFUSED)
def test_refused_with_the_field_named(make: Callable[[], object], words: str) -> None:
    with pytest.raises(RequestError, match=words) as refusal:
        make()
    assert refusal.value.param == "p"


@pytest.mark.parametrize(
    "schema",
    [
        True,
        {},
        nested(48),
        {"properties": {"not": {"type": "string"}, "$ref": {"type": "integer"}}},
        {"enum": [{"$ref": "http://elsewhere"}], "uniqueItems": False},
        {"$ref": "#/$defs/a~1b/anyOf/0", "$defs": {"a/b": {"anyOf": [{"type": "null"}]}}},
        {"type": "object", "properties": {"next": {"$ref": "#"}}},
        {"enum": [1, None, "a"], "type": ["integer", "null", "string"], "title": "T"},
        {"$ref": "#/$defs/a", "$defs": {"a": {}}, "description": "noted", "x-own": 5},
    ],
)
def test_accepted(schema: object) -> None:
    assert forms.json_schema(schema, "p")["json_schema"] == schema


def test_the_order_of_properties_is_part_of_the_source() -> None:
    first = forms.json_schema({"properties": {"a": {}, "b": {}}}, "p")
    second = forms.json_schema({"properties": {"b": {}, "a": {}}}, "p")
    assert forms.source_of(first) != forms.source_of(second)
    assert json.loads(forms.source_of(first))["format"] == first
