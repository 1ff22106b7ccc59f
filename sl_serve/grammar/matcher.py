"""A compiled grammar, and its state along one output."""

from __future__ import annotations

import time
from concurrent.futures import Future

import numpy as np
import xgrammar

from sl_serve.constraints import PackedMask
from sl_serve.grammar.mask_threads import MaskThreads
from sl_serve.grammar.vocabulary import Vocabulary, packed

MAX_MASK_S = 10.0  # a mask takes well under a millisecond, and `worker` refuses slow grammars
SLOW = f"the next tokens could not be found within {MAX_MASK_S:g} s: the grammar is too ambiguous"


def tokenizer_info(vocabulary: Vocabulary) -> xgrammar.TokenizerInfo:
    return xgrammar.TokenizerInfo(
        list(vocabulary.tokens),
        xgrammar.VocabType.RAW,
        vocab_size=len(vocabulary.tokens),
        stop_token_ids=list(vocabulary.eos_token_ids),
    )


class Grammar:
    """Shared by all outputs that follow it. `failure`: why it is given up, for all of them.
    `only`: the tokens that are ever allowed; None: all."""

    def __init__(
        self,
        compiled: xgrammar.CompiledGrammar,
        vocabulary: Vocabulary,
        threads: MaskThreads,
        only: PackedMask | None,
    ) -> None:
        self.failure: str | None = None
        self.n_words = vocabulary.n_words
        self.ends = packed(vocabulary.eos_token_ids, vocabulary.n_words)
        self.only = only
        self.threads = threads
        self._compiled = compiled

    @property
    def size_bytes(self) -> int:
        return int(self._compiled.memory_size_bytes)

    def start(self) -> GrammarConstraint:
        return GrammarConstraint(xgrammar.GrammarMatcher(self._compiled), self)


class GrammarConstraint:
    """One output. The mask after a token is worked out on another thread, from the moment the
    token is accepted; whoever samples the next one finds it ready.

    The matcher is touched by one thread at a time: `accept` is called after the mask that led to
    the token was taken.
    """

    def __init__(self, matcher: xgrammar.GrammarMatcher, grammar: Grammar) -> None:
        self._matcher = matcher
        self._grammar = grammar
        self._failure: str | None = None
        self._complete = self._ended = False
        self._mask: Future[PackedMask] = grammar.threads.submit(self._fill)

    @property
    def failure(self) -> str | None:
        return self._failure or self._grammar.failure

    def mask(self) -> PackedMask | None:
        if self.failure is not None or self._ended:
            return None
        try:
            return self._mask.result(MAX_MASK_S)
        except TimeoutError:
            self._grammar.failure = SLOW
            self._grammar.threads.add_one()
        except Exception as error:
            self._failure = str(error)
        return None

    def accept(self, token_id: int) -> None:
        if self.failure is not None or self._ended:
            return
        started_s = time.monotonic()
        try:
            fits = self._matcher.accept_token(token_id)
            self._complete = self._matcher.is_completed()
            self._ended = self._matcher.is_terminated()
        except RuntimeError as error:
            self._failure = str(error)[:300]
            return
        if not fits:
            self._failure = f"token {token_id} does not follow the grammar"
        elif time.monotonic() - started_s > MAX_MASK_S:
            self._grammar.failure = SLOW
        elif not self._ended:
            self._mask = self._grammar.threads.submit(self._fill)

    @property
    def is_done(self) -> bool:
        """Waits for the mask only where the output is complete: mostly, at its end."""
        if self._ended or not self._complete:
            return self._ended
        mask = self.mask()
        return mask is not None and not (mask & ~self._grammar.ends).any()

    def _fill(self) -> PackedMask:
        mask = np.full((1, self._grammar.n_words), -1, np.int32)
        self._matcher.fill_next_token_bitmask(mask)
        if self._grammar.only is not None:
            mask &= self._grammar.only
        if not mask.any() and not self._complete:
            raise RuntimeError("none of the model's tokens can go on with the grammar")
        first: PackedMask = mask[0]
        return first
