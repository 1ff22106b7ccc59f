"""A JSON schema that can be kept to while generating, or the reason why it cannot.

What the grammar would silently leave out is refused: an answer that is said to follow a schema
does. (What the compiler itself says it leaves out is refused by `worker`.)
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

from sl_serve.errors import RequestError

MAX_DEPTH = 48

# Where a schema holds others: as a map of names, as a list, or alone.
MAPS = ("properties", "patternProperties", "$defs", "definitions")
LISTS = ("anyOf", "oneOf", "allOf", "prefixItems")
SINGLES = frozenset(
    {
        "items",
        "additionalProperties",
        "additionalItems",
        "unevaluatedProperties",
        "unevaluatedItems",
        "propertyNames",
    }
)

NOT_FOLLOWED = frozenset(
    {
        "not",
        "if",
        "then",
        "else",
        "contains",
        "minContains",
        "maxContains",
        "uniqueItems",
        "multipleOf",
        "dependentRequired",
        "dependentSchemas",
        "dependencies",
        "$dynamicRef",
        "$recursiveRef",
        "$anchor",
    }
)

NOTES = frozenset(
    {
        "title",
        "description",
        "default",
        "examples",
        "example",
        "deprecated",
        "readOnly",
        "writeOnly",
        "discriminator",
        "$comment",
        "$schema",
        "$id",
        "$defs",
        "definitions",
    }
)
# Beside one of these everything but notes is left out; beside the last two, all but the type.
ALONE = ("$ref", "anyOf", "oneOf", "allOf", "enum", "const")
TYPED = ("enum", "const")
# Taken up only where the type is written, too.
NEED_TYPE = frozenset(
    {
        "minimum",
        "maximum",
        "exclusiveMinimum",
        "exclusiveMaximum",
        "pattern",
        "format",
        "minLength",
        "maxLength",
        "minItems",
        "maxItems",
        "items",
        "prefixItems",
        "minProperties",
        "maxProperties",
        "patternProperties",
        "propertyNames",
        "required",
    }
)

KINDS: dict[str, tuple[type, ...]] = {
    "string": (str,),
    "integer": (int,),
    "number": (int, float),
    "boolean": (bool,),
    "null": (type(None),),
    "array": (list,),
    "object": (dict,),
}


def check_schema(schema: object, param: str) -> None:
    """RequestError for what cannot be followed, and for references that lead nowhere."""
    _Check(param, schema).whole()


class _Check:
    def __init__(self, param: str, root: object) -> None:
        self._root = root
        self._param = param

    def whole(self) -> None:
        waiting: list[tuple[Any, int]] = [(self._root, 0)]
        while waiting:
            part, depth = waiting.pop()
            if not isinstance(part, dict | bool):
                self._refuse(f"has {str(part)[:40]!r} where a schema, an object, should be")
            if depth > MAX_DEPTH:
                self._refuse(f"is nested deeper than {MAX_DEPTH} levels")
            if isinstance(part, dict):
                waiting += [(inner, depth + 1) for inner in self._inside(part)]
                self._check_keywords(part)
                self._check_values(part)
                self._check_reference(part)

    def _refuse(self, what: str) -> None:
        raise RequestError(f"'{self._param}' {what}.", self._param)

    def _inside(self, part: dict[str, Any]) -> Iterator[Any]:
        for keyword in MAPS:
            inner = part.get(keyword, {})
            if not isinstance(inner, dict):
                self._refuse(f"has a {keyword!r} that is no object")
            yield from inner.values()
        for keyword in LISTS:
            inner = part.get(keyword, [])
            if not isinstance(inner, list):
                self._refuse(f"has an {keyword!r} that is no list")
            yield from inner
        yield from (part[keyword] for keyword in SINGLES if keyword in part)

    def _check_keywords(self, part: dict[str, Any]) -> None:
        for keyword in NOT_FOLLOWED:
            if part.get(keyword, False) is not False:
                self._refuse(
                    f"uses {keyword!r}, which cannot be kept to while generating; leave it out and "
                    "check the answer for it"
                )
        alone = next((keyword for keyword in ALONE if keyword in part), None)
        allowed = {alone, *NOTES, *(["type"] if alone in TYPED else [])}
        known = {*MAPS, *LISTS, *SINGLES, *NEED_TYPE, *ALONE, "type"}
        for keyword in part:
            if alone is not None and keyword in known and keyword not in allowed:
                self._refuse(f"has {keyword!r} beside {alone!r}; only one of them can be kept to")
            if alone is None and keyword in NEED_TYPE and not {"type", "properties"} & part.keys():
                self._refuse(f"has {keyword!r} without a 'type'; write the type beside it")

    def _check_values(self, part: dict[str, Any]) -> None:
        required = part.get("required", [])
        if not isinstance(required, list) or not all(isinstance(name, str) for name in required):
            self._refuse("has a 'required' that is no list of names")
        for name in required:
            if name not in part.get("properties", {}):
                self._refuse(f"requires {name[:64]!r}, which is not among the 'properties'")
        if isinstance(part.get("minProperties"), int) and part["minProperties"] > 1:
            self._refuse("has 'minProperties' above 1; name what is 'required' instead")
        values = [part["const"]] if "const" in part else part.get("enum", [])
        if not isinstance(values, list):
            self._refuse("has an 'enum' that is no list")
        kinds = part.get("type", [])
        for value in values:
            if kinds and not any(
                _is_a(value, k) for k in ([kinds] if isinstance(kinds, str) else kinds)
            ):
                self._refuse(f"has the value {str(value)[:40]!r}, which is not of its 'type'")

    def _check_reference(self, part: Any) -> None:
        """It must end at a schema of the same document."""
        seen: list[str] = []
        while isinstance(part, dict) and "$ref" in part:
            reference = part["$ref"]
            if not isinstance(reference, str) or not f"{reference}/".startswith("#/"):
                self._refuse(
                    f"refers to {str(reference)[:80]!r}; only references into the schema itself, "
                    "like '#/$defs/name', are followed"
                )
            if reference in seen:
                self._refuse(f"has {reference[:80]!r}, which refers to itself")
            seen.append(reference)
            part = self._target(reference)

    def _target(self, reference: str) -> Any:
        """JSON pointer (RFC 6901)."""
        found: Any = self._root
        for name in reference.split("/")[1:]:
            key = name.replace("~1", "/").replace("~0", "~")
            if isinstance(found, dict) and key in found:
                found = found[key]
            elif isinstance(found, list) and key in map(str, range(len(found))):
                found = found[int(key)]
            else:
                self._refuse(f"refers to {reference[:80]!r}, which does not exist")
        return found


def _is_a(value: object, kind: object) -> bool:
    if isinstance(value, bool):
        return kind == "boolean"
    return isinstance(value, KINDS.get(str(kind), ()))
