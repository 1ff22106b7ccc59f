"""A body from what a client sent, or the first thing that is wrong with it."""

from __future__ import annotations

from typing import Any, TypeVar

from pydantic import ValidationError
from pydantic_core import ErrorDetails

from server.bodies.fields import Body
from sl_serve.errors import RequestError

BodyT = TypeVar("BodyT", bound=Body)


def validate(kind: type[BodyT], value: dict[str, Any]) -> BodyT:
    """RequestError names the first field that is wrong."""
    try:
        return kind.model_validate(value)
    except ValidationError as error:
        raise _request_error(error.errors(include_url=False)[0]) from None


def _request_error(error: ErrorDetails) -> RequestError:
    param = _dotted(error["loc"])
    if error["type"] == "missing":
        return RequestError(f"'{param}' is required.", param)
    complaint = error["msg"]
    for opening in ("Input ", "Value error, ", "String ", "List ", "Dictionary "):
        complaint = complaint.removeprefix(opening)
    given = error["input"]
    seen = f", not {str(given).lower()[:40]}" if isinstance(given, int | float) else ""
    return RequestError(f"'{param}' {complaint}{seen}.", param)


def _dotted(location: tuple[int | str, ...]) -> str:
    """messages[0].role"""
    text = "".join(f"[{part}]" if isinstance(part, int) else f".{part}" for part in location)
    return text.removeprefix(".")[:200]
