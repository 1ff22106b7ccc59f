"""From a line of a file to what the engine is asked: the translation of the HTTP handlers."""

from __future__ import annotations

import hashlib
from typing import Any

import orjson

from server.chat import ChatCompletions
from server.completions import Completions
from server.context import ServerContext
from server.generation import Dialect
from server.limits import parse_object
from server.params import Work

ENDPOINTS = ("/v1/chat/completions", "/v1/completions")


class Translator:
    """Thread-safe, as the handlers' translation is."""

    def __init__(self, context: ServerContext) -> None:
        self._max_depth = context.settings.max_json_depth
        self.max_line_bytes = context.settings.max_body_bytes
        self._dialects: dict[str, Dialect] = {
            "/v1/chat/completions": ChatCompletions(context),
            "/v1/completions": Completions(context),
        }

    def dialect(self, endpoint: str) -> Dialect:
        return self._dialects[endpoint]

    def parse(self, raw: bytes) -> dict[str, Any]:
        """A line's object. Raises RequestError."""
        return parse_object(raw, self._max_depth + 1)  # the body lies one level deeper

    def work(self, endpoint: str, body: dict[str, Any], seed: int) -> Work:
        """Raises RequestError or ApiError, as over HTTP. `seed`: if the body has none."""
        seeded = body if body.get("seed") is not None else body | {"seed": seed}
        return self._dialects[endpoint].convert(orjson.dumps(seeded))


def line_seed(batch_seed: int, custom_id: str) -> int:
    """The same line of the same batch draws the same, whenever and beside whatever it runs."""
    text = f"{batch_seed}:{custom_id}".encode()
    return int.from_bytes(hashlib.blake2b(text, digest_size=8).digest()) >> 1  # 63 bits
