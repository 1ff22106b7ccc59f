"""Lists in OpenAI's shape, and the query parameters that ask for a part of one."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from starlette.datastructures import QueryParams

from sl_serve.errors import RequestError


def page(data: list[dict[str, Any]], has_more: bool) -> dict[str, Any]:
    return {
        "object": "list",
        "data": data,
        "first_id": data[0]["id"] if data else None,
        "last_id": data[-1]["id"] if data else None,
        "has_more": has_more,
    }


def limit_param(query: QueryParams, default: int, most: int) -> int:
    text = query.get("limit", str(default))
    is_number = text.isascii() and text.isdecimal() and len(text) < 10
    if not is_number or not 1 <= int(text) <= most:
        raise RequestError(f"'limit' is {text[:20]!r}; it should be from 1 to {most}.", "limit")
    return int(text)


def choice_param(query: QueryParams, name: str, choices: Sequence[str]) -> str:
    """The first choice is the default."""
    text = query.get(name, choices[0])
    if text not in choices:
        raise RequestError(f"{name!r} is {text[:20]!r}; it should be one of {choices}.", name)
    return text
