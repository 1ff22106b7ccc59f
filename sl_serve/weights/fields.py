"""Checked look-ups in a model's settings, so that a bad value is named with its file and key."""

from __future__ import annotations

import json
import math
import reprlib
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from sl_serve.errors import CheckpointError, ModelError

_MAX_INTEGER = 2**31 - 1  # sizes, ids and positions of any model stay far below
_MAX_JSON_BYTES = 64 << 20
MAX_LAYERS = 10_000


class Fields:
    """A mapping whose values are checked as they are taken. A null counts as absent.

    Every method raises ModelError when the value is absent without a default, or of another kind.
    """

    def __init__(self, values: Mapping[str, Any], source: str, prefix: str = "") -> None:
        self.values = values
        self.source = source  # named in messages
        self.prefix = prefix  # put in front of every key

    def __contains__(self, key: str) -> bool:
        return self.get(key) is not None

    def get(self, key: str) -> Any:
        return self.values.get(self.prefix + key)

    def with_values(self, values: Mapping[str, Any]) -> Fields:
        """The same, with these values instead of its own."""
        given = {self.prefix + key: value for key, value in values.items()}
        return Fields({**self.values, **given}, self.source, self.prefix)

    def or_else(self, values: Mapping[str, Any]) -> Fields:
        """The same, with these values where its own are absent."""
        return self.with_values({key: v for key, v in values.items() if key not in self})

    def with_defaults(self, **defaults: object) -> Fields:
        return self.or_else(defaults)

    def integer(
        self, key: str, default: int | None = None, *, low: int = 1, high: int = _MAX_INTEGER
    ) -> int:
        value = self._take(key, default)
        if type(value) is not int or not low <= value <= high:
            raise self._wrong(key, f"an integer from {low} to {high}", value)
        return value

    def number(self, key: str, default: float | None = None) -> float:
        value = self._take(key, default)
        if isinstance(value, bool) or not isinstance(value, int | float):
            raise self._wrong(key, "a positive number", value)
        if not 0 < value < 1e30 or not math.isfinite(value):
            raise self._wrong(key, "a positive number", value)
        return float(value)

    def boolean(self, key: str, default: bool | None = None) -> bool:
        value = self._take(key, default)
        if not isinstance(value, bool):
            raise self._wrong(key, "true or false", value)
        return value

    def text(self, key: str, default: str | None = None) -> str:
        value = self._take(key, default)
        if not isinstance(value, str):
            raise self._wrong(key, "a string", value)
        return value

    def only(self, key: str, supported: object) -> None:
        """Refuses a value that changes the arithmetic in a way the engine does not know."""
        value = self.get(key)
        same = isinstance(value, str | int | float) and value == supported
        if value is not None and not same:
            raise ModelError(
                f"{self.source}: {self.prefix}{key} {shown(value)} is not supported "
                f"(only {supported!r})"
            )

    def _take(self, key: str, default: object) -> Any:
        value = self.get(key)
        if value is None:
            value = default
        if value is None:
            raise ModelError(f"{self.source}: {self.prefix}{key} is missing")
        return value

    def _wrong(self, key: str, wanted: str, value: object) -> ModelError:
        return ModelError(f"{self.source}: {self.prefix}{key} must be {wanted}, not {shown(value)}")


def shown(value: object) -> str:
    """A value of a file for a message: short and on one line, however large or deep it is."""
    return " ".join(reprlib.repr(value).split())


def parse_json_object(text: str | bytes, source: str) -> dict[str, Any]:
    """A JSON object; a repeated key, another value or damage raises CheckpointError."""

    def unique(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
        found = dict(pairs)
        if len(found) != len(pairs):
            raise ValueError("a key is repeated")
        return found

    try:
        value = json.loads(text, object_pairs_hook=unique)
    except (ValueError, RecursionError) as error:
        raise CheckpointError(f"{source}: not valid JSON ({str(error)[:120]})") from None
    if not isinstance(value, dict):
        raise CheckpointError(f"{source}: a JSON object is expected, not {type(value).__name__}")
    return value


def read_json_object(path: Path) -> dict[str, Any]:
    """The JSON object in a small file of a model folder."""
    try:
        n_bytes = path.stat().st_size
        if n_bytes > _MAX_JSON_BYTES:
            raise CheckpointError(f"{path}: {n_bytes} bytes, more than {_MAX_JSON_BYTES} allowed")
        return parse_json_object(path.read_bytes(), str(path))
    except OSError as error:
        raise CheckpointError(f"{path}: cannot be read ({error.strerror})") from None
