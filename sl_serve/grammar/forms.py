"""The forms that clients may ask for -> the source of a grammar: xgrammar's structural tags, which
hold all of them. What can be told to be wrong without compiling is refused here."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from typing import Any

from sl_serve.errors import RequestError
from sl_serve.grammar.schema_check import check_schema

Form = dict[str, Any]

MAX_SCHEMA_CHARS = 1 << 16
MAX_GRAMMAR_CHARS = 1 << 16
MAX_REGEX_CHARS = 1 << 12
MAX_CHOICES = 1000
# In a row, between the parts of a JSON text: enough to indent, too little to go on for ever.
MAX_WHITESPACE = 16


def source_of(form: Form) -> str:
    """The order of properties is part of it."""
    return json.dumps({"type": "structural_tag", "format": form}, ensure_ascii=False)


def is_json(source: str) -> bool:
    """Whether all that follows it is JSON, perhaps with fixed text around."""
    return '"type": "json_schema"' in source  # quotes within strings are escaped


def json_schema(schema: object, param: str) -> Form:
    check_schema(schema, param)
    _at_most(len(json.dumps(schema)), MAX_SCHEMA_CHARS, "characters", param)
    return {"type": "json_schema", "json_schema": schema, "max_whitespace_cnt": MAX_WHITESPACE}


def json_object() -> Form:
    return json_schema({"type": "object", "additionalProperties": True}, "response_format")


def regex(pattern: str, param: str) -> Form:
    _at_most(len(pattern), MAX_REGEX_CHARS, "characters", param)
    return {"type": "regex", "pattern": pattern}


def ebnf(grammar: str, param: str) -> Form:
    """Rules in the notation of GBNF; the first is `root`."""
    _at_most(len(grammar), MAX_GRAMMAR_CHARS, "characters", param)
    return {"type": "grammar", "grammar": grammar}


def choice(texts: Sequence[str], param: str) -> Form:
    _at_most(len(texts), MAX_CHOICES, "texts", param)
    _at_most(sum(map(len, texts)), MAX_GRAMMAR_CHARS, "characters", param)
    if not texts or not all(texts):
        raise RequestError(f"'{param}' needs at least one text, and none may be empty.", param)
    return one_of([text(each) for each in texts])


def text(value: str) -> Form:
    return {"type": "const_string", "value": value}


def one_of(forms: Sequence[Form]) -> Form:
    return forms[0] if len(forms) == 1 else {"type": "or", "elements": list(forms)}


def tag(begin: str | Mapping[str, Any], content: Form, end: str) -> Form:
    return {"type": "tag", "begin": begin, "content": content, "end": end}


def _at_most(n: int, limit: int, unit: str, param: str) -> None:
    if n > limit:
        raise RequestError(f"'{param}' has {n} {unit}; the limit is {limit}.", param)
