"""Random outputs along a grammar, drawn without an engine."""

from __future__ import annotations

import random

from sl_serve.constraints import Constraint, allowed_ids
from sl_serve.grammar.vocabulary import Vocabulary, special_text

END = 256
# Bytes, the end, and tokens that cross the borders of what grammars speak of.
WORDS = [
    b'{"',
    b'": ',
    b'", "',
    b"true",
    b"null",
    b'"}',
    b"12",
    b"yes",
    b"no",
    b"maybe",
    b"-1",
    b"]}",
]
VOCABULARY = Vocabulary(
    [bytes([i]) for i in range(256)] + [b"", *WORDS, special_text(b"[TOOL_CALLS]")], (END,)
)
MARK = len(VOCABULARY.tokens) - 1  # a special token


def next_ids(constraint: Constraint) -> list[int]:
    mask = constraint.mask()
    assert constraint.failure is None, constraint.failure
    if mask is None:
        return list(range(len(VOCABULARY.tokens)))
    return [i for i, may in enumerate(allowed_ids(mask, len(VOCABULARY.tokens))) if may]


def walk(constraint: Constraint, rng: random.Random, max_tokens: int = 400) -> bytes | None:
    """One output at a high temperature; None: not finished in time. Ends are preferred, or texts
    without a bound would go on for ever."""
    text = b""
    for _ in range(max_tokens):
        ids = next_ids(constraint)
        closing = [i for i in ids if VOCABULARY.tokens[i] in (b'"', b"}", b"]", b'"}', b"]}", b"")]
        token = rng.choice(closing if closing and rng.random() < 0.5 else ids)
        constraint.accept(token)
        assert constraint.failure is None, constraint.failure
        text += VOCABULARY.tokens[token]
        if constraint.is_done:
            return text
    return None
