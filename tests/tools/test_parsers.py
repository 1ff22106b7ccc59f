"""Each family's way of writing calls, whole, cut at every place, and damaged."""

from __future__ import annotations

import json
from collections.abc import Iterable
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from sl_serve.tools.formats import FORMATS
from sl_serve.tools.pieces import Arguments, CallStart, Piece, Text

FEW = settings(derandomize=True, max_examples=150, deadline=None)
NAMES = ("add", "get_weather")
ADD = '{"a": 1, "b": {"c": [2, "}"]}}'
PARIS = '{"city": "Paris \\"}{ <tool_call> [TOOL_CALLS]"}'

Calls = list[tuple[str, str]]


def read(name: str, parts: Iterable[str]) -> list[Piece]:
    parser = FORMATS[name].parser(NAMES)
    pieces = [piece for part in parts for piece in parser.feed(part)]
    return pieces + parser.end()


def summed(pieces: Iterable[Piece]) -> tuple[str, Calls]:
    """Content, and calls with their arguments; checks the order of what is told."""
    content = ""
    calls: list[tuple[str, str]] = []
    for piece in pieces:
        match piece:
            case Text(text):
                content += text
            case CallStart(index, name):
                assert index == len(calls)
                calls.append((name, ""))
            case Arguments(index, text):
                assert index == len(calls) - 1
                calls[index] = (calls[index][0], calls[index][1] + text)
    return content, calls


def hermes(name: str, arguments: str) -> str:
    return f'<tool_call>\n{{"name": "{name}", "arguments": {arguments}}}\n</tool_call>'


def llama(name: str, arguments: str) -> str:
    return f'{{"name": "{name}", "parameters": {arguments}}}'


def mistral(*calls: tuple[str, str]) -> str:
    inner = ", ".join(f'{{"name": "{n}", "arguments": {a}}}' for n, a in calls)
    return f"[TOOL_CALLS][{inner}]"


TWO: Calls = [("add", ADD), ("get_weather", PARIS)]
CASES: list[tuple[str, str, str, Calls]] = [
    ("hermes", hermes("add", ADD), "", [("add", ADD)]),
    ("hermes", f"\n{hermes('add', ADD)}\n{hermes('get_weather', PARIS)}\n", "", TWO),
    ("hermes", f"Let me see.\n{hermes('add', ADD)}", "Let me see.\n", [("add", ADD)]),
    ("hermes", f"{hermes('add', ADD)} done", " done", [("add", ADD)]),
    ("hermes", f'<tool_call>{{"arguments": {ADD}, "name": "add"}}</tool_call>', "", TWO[:1]),
    ("hermes", '<tool_call>{"name":"add"}</tool_call>', "", [("add", "{}")]),
    ("hermes", f'<tool_call>{{"name": "add", "arguments": {ADD}}}', "", TWO[:1]),
    ("hermes", f"<<tool_call{hermes('add', ADD)}", "<<tool_call", TWO[:1]),
    ("llama3", llama("add", ADD), "", TWO[:1]),
    ("llama3", f"<|python_tag|>{llama('add', ADD)}; {llama('get_weather', PARIS)}", "", TWO),
    ("llama3", f' {{"type": "function", "name": "add", "parameters": {ADD}}}', "", TWO[:1]),
    ("mistral", mistral(("add", ADD)), "", TWO[:1]),
    ("mistral", mistral(*TWO), "", TWO),
    ("mistral", f"Well {mistral(*TWO)}", "Well ", TWO),
    ("mistral", f"[TOOL_CALLS]add[ARGS]{ADD}[TOOL_CALLS]get_weather{PARIS}", "", TWO),
    ("mistral", f"[TOOL_CALLS]add[CALL_ID]x1[ARGS]{ADD}", "", TWO[:1]),
    ("mistral", f'[TOOL_CALLS] {{"name": "add", "arguments": {ADD}}}', "", TWO[:1]),
    # Cut off: told as far as it came.
    ("hermes", hermes("add", ADD).partition(ADD[7:])[0], "", [("add", ADD[:7])]),
    ("mistral", mistral(("add", ADD))[:-5], "", [("add", ADD[:-3])]),
]
# No calls: the text stays as it is.
TEXTS = [
    ("hermes", ""),
    ("hermes", " \n"),
    ("hermes", "  An answer. <tool_call"),
    ("hermes", "<tool_call>nothing</tool_call>"),
    ("hermes", hermes("launch", ADD)),
    ("hermes", '<tool_call>{"name": "add", "arguments": "{}"}</tool_call>'),
    ("hermes", '<tool_call>{"name": 5, "arguments": {}}</tool_call>'),
    ("hermes", '<tool_call>{"name": "a\\qdd", "arguments": {}}</tool_call>'),
    ("hermes", '<tool_call>{"arguments": {"a": 1}}</tool_call>'),
    ("hermes", '<tool_call>{"arguments": {"a": 1}'),
    ("hermes", "<tool_call>\n <tool_call>\n{"),
    ("llama3", '{"answer": 42}'),
    ("llama3", f"I call {llama('add', ADD)}"),
    ("llama3", '<|python_tag|>print("hi")'),
    ("llama3", '{"name": "Bob", "parameters": {}}'),
    ("llama3", "<|python"),
    ("mistral", "[TOOL_CALLS][]"),
    ("mistral", "[TOOL_CALLS][5]"),
    ("mistral", "[TOOL_CALLS]launch[ARGS]{}"),
    ("mistral", f"[TOOL_CALLS]{'add' * 100}"),
    ("mistral", "[[TOOL_[TOOL_CALLS"),
    *[(name, "Just [an] <answer> with {braces}\n") for name in FORMATS],
]


@pytest.mark.parametrize(("name", "text", "content", "calls"), CASES)
def test_calls_are_told_apart(name: str, text: str, content: str, calls: Calls) -> None:
    assert summed(read(name, [text])) == (content, calls)


@pytest.mark.parametrize(("name", "text"), TEXTS)
def test_what_is_no_call_stays_text(name: str, text: str) -> None:
    assert summed(read(name, [text])) == (text, [])


@pytest.mark.parametrize(("name", "text"), [case[:2] for case in CASES] + TEXTS)
def test_the_result_does_not_depend_on_the_cuts(name: str, text: str) -> None:
    whole = summed(read(name, [text]))
    assert summed(read(name, text)) == whole
    for cut in range(len(text)):
        assert summed(read(name, [text[:cut], text[cut:]])) == whole


FRAGMENTS = [
    *("<tool_call>", "</tool_call>", "[TOOL_CALLS]", "[ARGS]", "<|python_tag|>", ";", "add"),
    *('{"name": "add", ', '"arguments": ', '"parameters": ', "{}", "{", "}", "[", "]", ","),
    *('"', "\\", " ", "\n", "text", hermes("add", ADD), llama("add", ADD), mistral(*TWO)),
]


@FEW
@given(
    st.sampled_from(sorted(FORMATS)),
    st.lists(st.sampled_from(FRAGMENTS), max_size=12),
    st.data(),
)
def test_any_mixture_is_read_the_same_in_any_parts(
    name: str, fragments: list[str], data: st.DataObject
) -> None:
    text = "".join(fragments)
    parts = []
    rest = text
    while rest:
        n = data.draw(st.integers(1, len(rest)))
        parts.append(rest[:n])
        rest = rest[n:]
    content, calls = summed(read(name, parts))
    assert (content, calls) == summed(read(name, [text]))
    assert all(called in NAMES for called, _ in calls)
    if not calls:
        assert content == text


def test_arguments_are_told_as_they_come() -> None:
    parser = FORMATS["hermes"].parser(NAMES)
    text = hermes("add", ADD)
    begin = text.index(ADD)
    assert parser.feed(text[:begin]) == []
    told = [parser.feed(char) for char in ADD]
    assert told[0] == [CallStart(0, "add"), Arguments(0, "{")]
    assert told[1:] == [[Arguments(0, char)] for char in ADD[1:]]
    assert parser.feed(text[begin + len(ADD) :]) + parser.end() == []


@pytest.mark.parametrize(
    ("name", "text"),
    [
        ("hermes", "<tool_call>" * 20_000),
        ("hermes", "<tool_call" * 20_000),
        ("hermes", "<tool_call>" + " " * 200_000),
        ("hermes", '<tool_call>{"arguments": ' + '{"a":' * 40_000),
        ("llama3", " " * 200_000 + "x"),
        ("llama3", '{"name": "' + "\\" * 200_000),
        ("mistral", "[TOOL_CALLS]" * 20_000),
        ("mistral", "[TOOL_CALLS]" + "add[ARGS]" * 20_000),
    ],
)
def test_long_hostile_text_is_read_in_one_pass(name: str, text: str) -> None:
    """Reading is linear: a quadratic reader would take minutes here."""
    assert summed(read(name, [text]))[0].strip() == text.strip()


def test_arguments_of_valid_calls_are_json() -> None:
    for name, text, _, calls in CASES[:-2]:
        found: list[tuple[str, Any]] = summed(read(name, [text]))[1]
        assert [json.loads(arguments) for _, arguments in found] == [
            json.loads(arguments) for _, arguments in calls
        ]
