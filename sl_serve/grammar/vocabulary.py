"""What a grammar needs to know of a tokenizer."""

from __future__ import annotations

import json
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Protocol

import numpy as np

from sl_serve.constraints import PackedMask


class TokenSource(Protocol):
    @property
    def eos_token_ids(self) -> tuple[int, ...]: ...

    def token_bytes(self, token_id: int) -> bytes: ...
    def shown_bytes(self, token_id: int) -> bytes: ...


@dataclass(frozen=True, slots=True)
class Vocabulary:
    """`tokens`: the text of every id that logits have; of special tokens, `special_text`. Empty for
    ends and for ids that the tokenizer does not know: these are never allowed as text."""

    tokens: Sequence[bytes]
    eos_token_ids: tuple[int, ...]

    @property
    def n_words(self) -> int:
        """Of a mask."""
        return -(-len(self.tokens) // 32)

    def ids_where(self, condition: Callable[[bytes], object]) -> PackedMask:
        """A mask of the tokens whose text is so."""
        return packed([i for i, token in enumerate(self.tokens) if condition(token)], self.n_words)

    def dump(self) -> bytes:
        texts = [token.decode("latin-1") for token in self.tokens]
        return json.dumps([texts, self.eos_token_ids]).encode()

    @staticmethod
    def load(dumped: bytes) -> Vocabulary:
        texts, eos_token_ids = json.loads(dumped)
        return Vocabulary([text.encode("latin-1") for text in texts], tuple(eos_token_ids))


def vocabulary_of(tokenizer: TokenSource, vocab_size: int) -> Vocabulary:
    tokens = [_text_of(tokenizer, i) for i in range(vocab_size)]
    eos = tuple(i for i in tokenizer.eos_token_ids if i < vocab_size)
    for i in eos:
        tokens[i] = b""  # an end has no text, even where the tokenizer does not mark it as special
    return Vocabulary(tokens, eos)


def special_text(text: bytes) -> bytes:
    """The compiler knows a token without text by no number either. So that a form may name special
    tokens, they have a text, which is part of no text in UTF-8: nothing else in a form matches."""
    return b"\xff" + text if text else b""


def _text_of(tokenizer: TokenSource, token_id: int) -> bytes:
    return tokenizer.shown_bytes(token_id) or special_text(tokenizer.token_bytes(token_id))


def packed(ids: Sequence[int], n_words: int) -> PackedMask:
    bits = np.zeros(32 * n_words, np.uint8)
    bits[list(ids)] = 1
    return np.packbits(bits, bitorder="little").view("<i4").astype(np.int32)
