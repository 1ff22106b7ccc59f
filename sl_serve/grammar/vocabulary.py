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

    def shown_bytes(self, token_id: int) -> bytes: ...


@dataclass(frozen=True, slots=True)
class Vocabulary:
    """`tokens`: the text of every id that logits have; empty for special tokens and for ids that
    the tokenizer does not know, which no grammar allows."""

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


def packed(ids: Sequence[int], n_words: int) -> PackedMask:
    bits = np.zeros(32 * n_words, np.uint8)
    bits[list(ids)] = 1
    return np.packbits(bits, bitorder="little").view("<i4").astype(np.int32)


def vocabulary_of(tokenizer: TokenSource, vocab_size: int) -> Vocabulary:
    tokens = [tokenizer.shown_bytes(i) for i in range(vocab_size)]
    eos = tuple(i for i in tokenizer.eos_token_ids if i < vocab_size)
    for i in eos:
        tokens[i] = b""  # an end has no text, even where the tokenizer does not mark it as special
    return Vocabulary(tokens, eos)
