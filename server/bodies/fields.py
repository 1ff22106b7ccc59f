"""What bodies are made of: how a field is read, and how it stands in the OpenAPI description."""

from __future__ import annotations

import math
from typing import Annotated, Any

import orjson
from pydantic import (
    BaseModel,
    BeforeValidator,
    ConfigDict,
    FailFast,
    Field,
    PlainValidator,
    StringConstraints,
    WithJsonSchema,
    model_validator,
)

from server.limits import nesting_exceeds
from sl_serve.admission import LOGIT_BIAS, Range

MAX_INNER_DEPTH = 64  # of JSON in a string

PROMPT_SCHEMA = {
    "anyOf": [
        {"type": "string"},
        {"type": "array", "items": {"type": "string"}},
        {"type": "array", "items": {"type": "integer"}},
        {"type": "array", "items": {"type": "array", "items": {"type": "integer"}}},
    ]
}
CONTENT_SCHEMA = {"anyOf": [{"type": "string"}, {"type": "array", "items": {"type": "object"}}]}
STOP_SCHEMA = {"anyOf": [{"type": "string"}, {"type": "array", "items": {"type": "string"}}]}


def read_token_ids(value: object) -> list[int]:
    """A list of integers; which of them exist is for the model to say."""
    if not isinstance(value, list) or not all(type(item) is int for item in value):
        raise ValueError("should be a list of token ids (integers)")
    return value


def read_prompts(value: object) -> list[str | list[int]]:
    """The four shapes of a prompt as one: a list of texts and token lists."""
    if isinstance(value, str):
        return [value]
    if not isinstance(value, list) or not value:
        raise ValueError(
            "should be a string, a list of strings, a list of token ids or a list of such lists, "
            "and not empty"
        )
    if type(value[0]) is int:
        return [read_token_ids(value)]
    return [item if isinstance(item, str) else read_token_ids(item) for item in value]


def read_content(value: object) -> str:
    """Text, or text parts joined by line breaks."""
    if isinstance(value, str):
        return value
    if not isinstance(value, list):
        raise ValueError("should be a string or a list of text parts")
    return "\n".join(_text_of(part) for part in value)


def _text_of(part: object) -> str:
    kind = part.get("type") if isinstance(part, dict) else None
    if kind != "text":
        raise ValueError(f"has a part of type {str(kind)[:40]!r}; only 'text' is built in")
    text = part.get("text") if isinstance(part, dict) else None
    if not isinstance(text, str):
        raise ValueError("has a text part whose 'text' is not a string")
    return text


def _as_list(value: object) -> object:
    return [value] if isinstance(value, str) else value


NonEmpty = Annotated[str, StringConstraints(min_length=1)]
TokenIds = Annotated[
    list[int],
    PlainValidator(read_token_ids),
    WithJsonSchema({"type": "array", "items": {"type": "integer"}}),
]
Prompts = Annotated[
    list[str | list[int]], PlainValidator(read_prompts), WithJsonSchema(PROMPT_SCHEMA)
]
Content = Annotated[str, PlainValidator(read_content), WithJsonSchema(CONTENT_SCHEMA)]
Bias = Annotated[float, Field(ge=LOGIT_BIAS.lowest, le=LOGIT_BIAS.highest)]
Stop = Annotated[list[NonEmpty], FailFast(), BeforeValidator(_as_list), WithJsonSchema(STOP_SCHEMA)]


class Body(BaseModel):
    model_config = ConfigDict(strict=True, extra="allow", allow_inf_nan=False)

    @model_validator(mode="before")
    @classmethod
    def _null_means_default(cls, value: Any) -> Any:
        if not isinstance(value, dict):
            return value
        return {name: item for name, item in value.items() if item is not None}


def within(limits: Range, default: float | None) -> Any:
    """A field with the limits that every front has."""
    highest = None if limits.highest == math.inf else limits.highest
    return Field(default, ge=limits.lowest, le=highest)


def parse_inner(text: str) -> Any:
    """JSON that came as a string; ValueError where it is none."""
    raw = text.encode()
    if nesting_exceeds(raw, MAX_INNER_DEPTH):
        raise ValueError(f"is nested deeper than {MAX_INNER_DEPTH} levels")
    return orjson.loads(raw)


def _read_json(value: object) -> object:
    """A schema may also come as its text."""
    return parse_inner(value) if isinstance(value, str) else value


SCHEMA_FIELD = {"anyOf": [{"type": "object"}, {"type": "boolean"}]}
JsonSchema = Annotated[Any, BeforeValidator(_read_json), WithJsonSchema(SCHEMA_FIELD)]
