"""Grammars that are compiled in a process of their own, against packages that know the forms."""

from __future__ import annotations

import json
import random
import re
import threading
from typing import Any

import jsonschema
import pytest

from sl_serve.errors import RequestError
from sl_serve.grammar import forms
from sl_serve.grammar.compiler import Grammars, Wanted
from sl_serve.grammar.vocabulary import Vocabulary
from tests.grammar.walking import END, VOCABULARY, next_ids, walk

N_WALKS = 8

PERSON = {
    "type": "object",
    "properties": {"name": {"type": "string"}, "age": {"type": "integer", "minimum": 0}},
    "required": ["name", "age"],
}
SCHEMAS: dict[str, Any] = {
    "person": PERSON,
    "closed": PERSON | {"additionalProperties": False},
    "optional": PERSON | {"required": ["age"]},
    "enum": {"enum": ["red", 5, None, {"a": [1]}]},
    "const": {"const": {"exact": True}},
    "bounds": {"type": "integer", "minimum": -3, "maximum": 120},
    "text lengths": {"type": "string", "minLength": 2, "maxLength": 5},
    "long text": {"type": "string", "maxLength": 4000},
    "number": {"type": "number", "minimum": 0.5, "exclusiveMaximum": 2},
    "names": {"type": "object", "additionalProperties": {"type": "boolean"}, "minProperties": 1},
    "one of several": {"oneOf": [{"type": "integer"}, {"type": "string"}]},
    "pattern": {"type": "string", "pattern": "^[a-c]{2,4}$"},
    "list": {"type": "array", "items": {"type": "boolean"}, "minItems": 1, "maxItems": 3},
    "tuple": {
        "type": "array",
        "prefixItems": [{"type": "integer"}, {"type": "string"}],
        "items": False,
        "minItems": 2,
    },
    "either": {"anyOf": [PERSON, {"type": "null"}, {"type": "array", "items": PERSON}]},
    "types": {"type": ["integer", "null"]},
    "references": {
        "$defs": {
            "node": {
                "type": "object",
                "properties": {
                    "value": {"type": "integer"},
                    "next": {"anyOf": [{"$ref": "#/$defs/node"}, {"type": "null"}]},
                },
                "required": ["value", "next"],
                "additionalProperties": False,
            }
        },
        "$ref": "#/$defs/node",
    },
    "date": {"type": "string", "format": "date"},
    "nested": {
        "type": "object",
        "properties": {"people": {"type": "array", "items": PERSON, "maxItems": 2}},
        "required": ["people"],
    },
    "all of one": {"allOf": [PERSON]},
}


@pytest.mark.parametrize("name", SCHEMAS)
def test_finished_outputs_are_valid(grammars: Grammars, name: str) -> None:
    schema = SCHEMAS[name]
    jsonschema.Draft202012Validator.check_schema(schema)
    grammar = grammars.compile(forms.source_of(forms.json_schema(schema, "p")), "p")
    rng = random.Random(name)
    texts = [walk(grammar.start(), rng) for _ in range(N_WALKS)]
    finished = [text for text in texts if text is not None]
    assert len(finished) >= N_WALKS // 2
    for text in finished:
        value = json.loads(text)
        jsonschema.validate(value, schema, cls=jsonschema.Draft202012Validator)


def test_any_object(grammars: Grammars) -> None:
    grammar = grammars.compile(forms.source_of(forms.json_object()), "p")
    rng = random.Random(1)
    finished = [t for t in (walk(grammar.start(), rng) for _ in range(20)) if t is not None]
    values = [json.loads(text) for text in finished]
    assert all(isinstance(value, dict) for value in values)
    assert any(values)


PATTERNS = [
    r"[a-f0-9]{4}",
    r"(yes|no|maybe)!",
    r"\d{3}-\d{4}",
    r"a+b*c?",
    r"[^a-z]{2}",
    r"\w{1,3}@\w{1,3}\.de",
]


@pytest.mark.parametrize("pattern", PATTERNS)
def test_outputs_match_the_pattern(grammars: Grammars, pattern: str) -> None:
    grammar = grammars.compile(forms.source_of(forms.regex(pattern, "p")), "p")
    for seed in range(N_WALKS):
        text = walk(grammar.start(), random.Random(seed))
        assert text is not None
        assert re.fullmatch(pattern, text.decode(), re.ASCII), text


def test_a_grammar_of_rules(grammars: Grammars) -> None:
    rules = 'root ::= sum\nsum ::= digit ("+" digit)*\ndigit ::= [0-9]'
    grammar = grammars.compile(forms.source_of(forms.ebnf(rules, "p")), "p")
    for seed in range(N_WALKS):
        text = walk(grammar.start(), random.Random(seed))
        assert text is not None
        assert re.fullmatch(rb"\d(\+\d)*", text)


CHOICES = ["yes", "yes, but", "no", "nothing", "ja\n", 'qu"ote\\', "ä", "maybe"]


def test_masks_of_a_choice_are_those_of_plain_python(grammars: Grammars) -> None:
    """At every state, over the whole vocabulary: what leads to one of the texts, no more."""
    texts = [text.encode() for text in CHOICES]
    grammar = grammars.compile(forms.source_of(forms.choice(CHOICES, "p")), "p")
    n_states = 0
    waiting: list[list[int]] = [[]]
    seen: set[bytes] = set()
    while waiting:
        ids = waiting.pop()
        so_far = b"".join(VOCABULARY.tokens[i] for i in ids)
        if so_far in seen:
            continue
        seen.add(so_far)
        n_states += 1
        constraint = grammar.start()
        for i in ids:
            constraint.accept(i)
        goes_on = [
            i
            for i, token in enumerate(VOCABULARY.tokens)
            if token and any(text.startswith(so_far + token) for text in texts)
        ]
        ends = [END] if so_far in texts else []
        assert sorted(next_ids(constraint)) == sorted(goes_on + ends)
        assert constraint.is_done == (so_far in texts and not goes_on)
        waiting += [[*ids, i] for i in goes_on]
    assert n_states > 30


HOSTILE: dict[str, forms.Form] = {
    "unbalanced": forms.regex("(((", "p"),
    "lookahead": forms.regex("(?=a)b", "p"),
    "back reference": forms.regex(r"(a)\1", "p"),
    "deep nesting": forms.regex("(" * 2000 + "a" + ")" * 2000, "p"),
    "no root": forms.ebnf("start ::= [0-9]", "p"),
    "no rules": forms.ebnf("hello", "p"),
    "left recursion without an end": forms.ebnf("root ::= root", "p"),
    "rules without an end": forms.ebnf("root ::= a\na ::= b\nb ::= a", "p"),
    "unknown type": forms.json_schema({"type": "elephant"}, "p"),
    "overlapping branches": forms.json_schema(
        {"oneOf": [{"type": "integer"}, {"type": "number"}]}, "p"
    ),
    "all of several": forms.json_schema({"allOf": [PERSON, PERSON]}, "p"),
    "pattern and length": forms.json_schema(
        {"type": "string", "pattern": "a*", "minLength": 2}, "p"
    ),
    "empty enum": forms.json_schema({"enum": []}, "p"),
    "contradiction": forms.json_schema({"type": "integer", "minimum": 5, "maximum": 1}, "p"),
    "never": forms.json_schema(False, "p"),
}


@pytest.mark.parametrize("name", HOSTILE)
def test_hostile_forms_are_refused(grammars: Grammars, name: str) -> None:
    source = forms.source_of(HOSTILE[name])
    with pytest.raises(RequestError, match=r"'p' cannot be followed: \S") as refusal:
        grammars.compile(source, "p")
    assert refusal.value.param == "p"
    assert "\n" not in str(refusal.value)
    assert len(str(refusal.value)) < 500


def test_after_a_refusal_others_are_served(grammars: Grammars) -> None:
    grammar = grammars.compile(forms.source_of(forms.choice(["fine"], "p")), "p")
    assert walk(grammar.start(), random.Random(0)) == b"fine"


def endless() -> str:
    """Compiles for hours."""
    parts = "".join(f"(a{{0,{900 + i}}}b?)" for i in range(200))
    return forms.source_of(forms.regex(f"({parts}){{100,900}}", "p"))


def test_a_compilation_that_hangs_is_ended(grammars: Grammars) -> None:
    with pytest.raises(RequestError, match=r"takes more than 2 s or too much memory"):
        grammars.compile(endless(), "p")
    assert grammars.knows(endless())  # remembered: it costs once
    with pytest.raises(RequestError, match="'q' cannot be followed"):
        grammars.compile(endless(), "q")
    choice = forms.source_of(forms.choice(["after it"], "p"))
    assert walk(grammars.compile(choice, "p").start(), random.Random(0)) == b"after it"


def test_compiled_once_and_remembered(grammars: Grammars) -> None:
    source = forms.source_of(forms.choice(["once"], "p"))
    found: list[object] = []
    threads = [
        threading.Thread(target=lambda: found.append(grammars.compile(source, "p")))
        for _ in range(6)
    ]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert len(found) == 6
    assert len(set(map(id, found))) == 1
    wanted = Wanted(grammars, source, "p")
    assert wanted.is_ready
    assert wanted.grammar() is found[0]


def test_the_memory_of_grammars_is_bounded(
    grammars: Grammars, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("sl_serve.grammar.compiler.MAX_REMEMBERED", 2)
    sources = [forms.source_of(forms.choice([f"text {i}"], "p")) for i in range(4)]
    for source in sources:
        grammars.compile(source, "p")
    assert [grammars.knows(source) for source in sources] == [False, False, True, True]


def test_a_small_vocabulary_without_an_end() -> None:
    """Ends come from the grammar then, where nothing else may follow."""
    few = Vocabulary([b"a", b"b"], ())
    grammars = Grammars(lambda: few)
    try:
        with pytest.raises(RequestError, match="no text of this model's tokens follows it"):
            grammars.compile(forms.source_of(forms.choice(["z"], "p")), "p")
        good = grammars.compile(forms.source_of(forms.choice(["ab"], "p")), "p").start()
        good.accept(0)
        assert not good.is_done
        good.accept(1)
        assert good.is_done
    finally:
        grammars.close()


def test_a_token_that_does_not_follow_is_a_failure_of_its_output_alone(grammars: Grammars) -> None:
    grammar = grammars.compile(forms.source_of(forms.choice(["yes"], "p")), "p")
    first, second = grammar.start(), grammar.start()
    first.accept(ord("n"))
    assert first.failure == "token 110 does not follow the grammar"
    assert first.mask() is None
    assert second.failure is None
    assert next_ids(second) != []
