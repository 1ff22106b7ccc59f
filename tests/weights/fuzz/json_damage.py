"""Damage to the values of a JSON document, and to the header of a safetensors file, which is one.

A value or a key is taken out and hostile text put in its place, so that what no JSON library would
write (repeated keys, NaN, deep nesting) comes about too."""

from __future__ import annotations

import json
from random import Random
from typing import Any

from tests.weights.fuzz.byte_damage import BYTE_DAMAGE, NUMBERS

_PLACEHOLDER = "\0hostile"
_TEXTS = (
    *('""', '"F32"', '"BF16"', '"F8_E4M3"', '"U8"', '"BOOL"', '"F64"', '"llama"', '"opt"'),
    *('"float16"', '"float64"', '"llama3"', '"linear"', '"default"', '"silu"', '"../x"'),
    *(r'"\ud800"', r'"a\nb"', r'"a\u0000b"', r'"\u202e"', '"' + "x" * 5000 + '"'),
    *("null", "true", "false", "NaN", "Infinity", "-Infinity", "1e308", "1e400", "0.5", "-0.0"),
    *("[]", "{}", "[1]", "[[1]]", "[0, 0]", "[-1]", "[0, 4]", "[4, 0]", "[true, 2]", "[1.0, 2]"),
    *('{"a": {"b": [1]}}', '{"content": 5}', "[null]", '["a"]', "[" + "1, " * 2000 + "1]"),
    *("9" * 400, "9" * 5000, "-" + "9" * 400, "0" * 9, "[0, " + "9" * 400 + "]", "", ",", "}"),
)
# Around what the interpreter takes, and far beyond.
_DEPTHS = (30, 100, 300, *range(850, 1000), 2000, 100_000)


def damage_json(random: Random, text: bytes) -> bytes:
    """One value or key changed, in a document that may be damaged already."""
    try:
        document = {"": json.loads(text)}
    except (ValueError, RecursionError):
        return random.choice(BYTE_DAMAGE)(random, text)
    places = _places(document)
    holder, key = random.choice(places)
    hostile = random.choice((_other_value, _other_key, _no_value))(random, holder, key, places)
    try:
        written = json.dumps(document.get(""))
    except RecursionError:
        return random.choice(BYTE_DAMAGE)(random, text)
    return written.replace(json.dumps(_PLACEHOLDER), hostile, 1).encode("utf-8", "surrogatepass")


def damage_safetensors(random: Random, data: bytes) -> bytes:
    """The header alone, its length put right most of the time."""
    n_bytes = int.from_bytes(data[:8], "little")
    header = data[8 : 8 + n_bytes]
    new = random.choice((damage_json, damage_json, _add_tensor, *BYTE_DAMAGE[:3]))(random, header)
    length = len(new) if random.random() < 0.95 else n_bytes
    return length.to_bytes(8, "little") + new + data[8 + n_bytes :]


def _add_tensor(random: Random, header: bytes) -> bytes:
    """One without data, so that nothing about the file but its shape and its name is wrong."""
    sizes = [random.choice((1, *NUMBERS)) for _ in range(random.choice((0, 1, 1, 2, 3, 70)))]
    at = random.choice((0, 0, 4, 16, 256))
    entry = {"dtype": "F32", "shape": [0, *sizes], "data_offsets": [at, at]}
    name = random.choice(("x", "", "model.x.weight", "a\nb", "\ud800"))
    return (
        header.rstrip().removesuffix(b"}") + f", {json.dumps(name)}: {json.dumps(entry)}}}".encode()
    )


def _places(document: dict[str, Any]) -> list[tuple[Any, Any]]:
    """(container, key or index) of every value."""
    found, containers = [], [document]
    while containers:
        holder: Any = containers.pop()
        keys = list(holder) if isinstance(holder, dict) else range(len(holder))
        found += [(holder, key) for key in keys]
        containers += [holder[key] for key in keys if isinstance(holder[key], dict | list)]
    return found


def _other_value(random: Random, holder: Any, key: Any, places: list[tuple[Any, Any]]) -> str:
    """The text to stand for the placeholder, as all of these return."""
    old, (other_holder, other_key) = holder[key], random.choice(places)
    holder[key] = _PLACEHOLDER
    if isinstance(old, int) and random.random() < 0.5:
        return str(random.choice((old + 1, old - 1, -old, 2 * old, old // 2, old + 2**32)))
    if random.random() < 0.2:
        other = other_holder[other_key]
        return json.dumps(old if _nested(other) else other)
    if random.random() < 0.15:
        depth = random.choice(_DEPTHS)
        return "[" * depth + "1" + "]" * depth
    if random.random() < 0.3:
        return str(random.choice((1, 1, 1, -1)) * random.choice(NUMBERS))
    return random.choice(_TEXTS)


def _nested(value: object) -> bool:
    return isinstance(value, dict | list) and any(isinstance(x, dict | list) for x in value)


def _other_key(random: Random, holder: Any, key: Any, places: list[tuple[Any, Any]]) -> str:
    """Renamed, or the value given a second time under a key that is there already."""
    if not isinstance(holder, dict):
        return _other_value(random, holder, key, places)
    holder[_PLACEHOLDER] = holder[key] if random.random() < 0.5 else holder.pop(key)
    keys = [json.dumps(k) for k in holder]
    return random.choice((*keys, r'"\ud800"', '"' + "k" * 70_000 + '"', '""', "5"))


def _no_value(random: Random, holder: Any, key: Any, places: list[tuple[Any, Any]]) -> str:
    del holder[key]
    return ""
