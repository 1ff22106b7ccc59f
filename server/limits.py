"""Ceilings on what is read from a client, checked before anything is built from it."""

from __future__ import annotations

from collections.abc import Mapping
from itertools import accumulate
from typing import Any

import orjson
from starlette.datastructures import Headers
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from server.errors import ApiError
from sl_serve.errors import RequestError

SLICE_BYTES = 2**16  # between two slices other threads get their turn
STEPS = {ord("["): 1, ord("{"): 1, ord("]"): -1, ord("}"): -1}
NOT_BRACKETS = bytes(set(range(256)) - STEPS.keys())


class BodyLimit:
    """Refuses bodies over `max_bytes`, by their declared length or by counting what comes.

    `larger`: paths with a limit of their own, for what is never whole in memory."""

    def __init__(self, app: ASGIApp, max_bytes: int, larger: Mapping[str, int]) -> None:
        self._app = app
        self._max_bytes = max_bytes
        self._larger = larger

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] != "http":
            await self._app(scope, receive, send)
            return
        max_bytes = self._larger.get(scope["path"], self._max_bytes)
        declared = Headers(scope=scope).get("content-length", "0")
        if _exceeds(declared, max_bytes):
            await _too_large(max_bytes).response()(scope, receive, send)
            return
        received_bytes = 0

        async def counted() -> Message:
            nonlocal received_bytes
            message = await receive()
            received_bytes += len(message.get("body", b""))
            if received_bytes > max_bytes:
                raise _too_large(max_bytes)
            return message

        await self._app(scope, counted, send)


def _too_large(max_bytes: int) -> ApiError:
    limit = f"{max_bytes:,} bytes"
    return ApiError(413, f"The body is over the limit of {limit}; send it in smaller parts.")


def _exceeds(digits: str, limit: int) -> bool:
    # Python refuses to convert thousands of digits, so the length is looked at first
    return digits.isdecimal() and (len(digits) > 18 or int(digits) > limit)


def nesting_exceeds(body: bytes, limit: int) -> bool:
    """Whether brackets outside strings are nested deeper than `limit`. Linear in the length.

    Says nothing about whether the body is valid JSON; for a broken one the answer is a guess, and
    the parser refuses it anyway.
    """
    text = body.replace(b"\\\\", b"").replace(b'\\"', b"")  # now every quote begins or ends
    depth = 0
    in_string = False
    for start in range(0, len(text), SLICE_BYTES):
        parts = text[start : start + SLICE_BYTES].split(b'"')
        brackets = b"".join(parts[in_string::2]).translate(None, NOT_BRACKETS)
        levels = list(accumulate(map(STEPS.__getitem__, brackets), initial=depth))
        if max(levels) > limit:
            return True
        depth = levels[-1]
        in_string ^= len(parts) % 2 == 0
    return False


def parse_object(body: bytes, max_depth: int) -> dict[str, Any]:
    """The JSON object in `body`; RequestError for anything else."""
    if nesting_exceeds(body, max_depth):
        raise RequestError(f"The JSON body is nested deeper than {max_depth} levels.")
    try:
        value = orjson.loads(body)
    except orjson.JSONDecodeError as error:
        raise RequestError(f"The body is not valid JSON: {error}.") from None
    if not isinstance(value, dict):
        raise RequestError("The body should be a JSON object: {...}.")
    return value
