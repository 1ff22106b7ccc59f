"""The grammars that make a model call tools, read back by the parsers of the same formats."""

from __future__ import annotations

import json
import random
from typing import Any

import jsonschema
import pytest

from sl_serve.errors import RequestError
from sl_serve.grammar import forms
from sl_serve.grammar.compiler import Grammars
from sl_serve.tools.formats import FORMATS
from tests.grammar.walking import MARK, VOCABULARY, next_ids, walk
from tests.tools.test_parsers import read, summed

SCHEMAS: dict[str, Any] = {
    "add": {
        "type": "object",
        "properties": {"a": {"type": "integer"}, "exact": {"type": "boolean"}},
        "required": ["a"],
    },
    "get_weather": {"properties": {"city": {"enum": ["Paris", "Rome"]}}, "required": ["city"]},
}


class Tokens:
    """Knows one special token."""

    def encode(self, text: str, add_special_tokens: bool = True) -> list[int]:
        return [MARK] if text == "[TOOL_CALLS]" else list(text.encode())

    def shown_bytes(self, token_id: int) -> bytes:
        return b"" if token_id == MARK else VOCABULARY.tokens[token_id]


@pytest.mark.parametrize("only_one", [False, True])
@pytest.mark.parametrize("name", FORMATS)
def test_all_outputs_are_valid_calls(grammars: Grammars, name: str, only_one: bool) -> None:
    form = FORMATS[name].form(SCHEMAS, Tokens(), only_one=only_one, param="tools")
    grammar = grammars.compile(forms.source_of(form), "tools")
    n_calls = []
    for seed in range(12):
        output = walk(grammar.start(), random.Random(seed))
        if output is None:
            continue
        text = output.removeprefix(b"\xff").decode()
        content, calls = summed(read(name, [text]))
        assert content == ""
        assert calls
        for called, arguments in calls:
            jsonschema.validate(json.loads(arguments), SCHEMAS[called])
        n_calls.append(len(calls))
    assert len(n_calls) > 6
    assert max(n_calls) == 1 if only_one else max(n_calls) > 1


def test_the_mark_is_the_vocabularys_own_token(grammars: Grammars) -> None:
    form = FORMATS["mistral"].form(SCHEMAS, Tokens(), only_one=True, param="tools")
    constraint = grammars.compile(forms.source_of(form), "tools").start()
    assert next_ids(constraint) == [MARK]


def test_tools_without_parameters(grammars: Grammars) -> None:
    form = FORMATS["llama3"].form({"stop": {}}, Tokens(), only_one=True, param="tools")
    text = walk(grammars.compile(forms.source_of(form), "tools").start(), random.Random(0))
    assert text is not None
    assert json.loads(text)["parameters"] == {}


def test_schemas_of_tools_are_checked() -> None:
    with pytest.raises(RequestError, match="does not exist") as refusal:
        FORMATS["hermes"].form({"f": {"$ref": "#/no"}}, Tokens(), only_one=True, param="tools")
    assert refusal.value.param == "tools"
