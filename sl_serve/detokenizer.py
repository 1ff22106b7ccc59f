"""Token ids -> text, as they come, cut at the first stop string."""

from __future__ import annotations

import codecs
from collections import deque
from collections.abc import Sequence
from typing import NamedTuple

from sl_serve.token_bytes import TokenBytes


class News(NamedTuple):
    """Text that may be shown now, and the stop string that ended the output, if one did."""

    text: str
    stop: str | None = None


class Detokenizer:
    """The text of one output, given token by token.

    What is given out never has to be taken back: bytes of an unfinished character and characters
    that may begin a stop string are held until the next token or `flush`. The first stop string is
    the one that is complete first; of several complete at once, the longest. So the result depends
    on the text alone, not on where its tokens end. Special tokens have no text, unless asked for.

    The cost of a token does not depend on the length of the output.
    """

    def __init__(
        self,
        token_bytes: TokenBytes,
        prompt_ids: Sequence[int] = (),
        stop: Sequence[str] = (),
        include_stop: bool = False,
        skip_special_tokens: bool = True,
    ) -> None:
        self._shown = token_bytes.shown if skip_special_tokens else token_bytes.of
        self._decode = codecs.getincrementaldecoder("utf-8")("replace").decode
        # An unfinished character at the prompt's end has at most 3 bytes, so at most 3 tokens.
        self._decode(b"".join(map(self._shown, prompt_ids[-3:])))
        self._strips_space = token_bytes.strips_leading_space and not any(
            map(self._shown, prompt_ids)
        )
        self._finder = StopFinder(stop) if stop else None
        self._include_stop = include_stop
        self._held = ""
        self._stopped = False

    def feed(self, token_id: int) -> News:
        """Must not be called again once `stop` was reported."""
        assert not self._stopped, "fed after a stop string"
        return self._advance(self._decode(self._shown(token_id)))

    def flush(self) -> str:
        """What was held back, at the end of the output; bytes of no character become U+FFFD."""
        if self._stopped:
            return ""
        return self._advance(self._decode(b"", True)).text + self._held

    def _advance(self, text: str) -> News:
        if self._strips_space and text:
            self._strips_space = False
            text = text.removeprefix(" ")
        if self._finder is None:
            return News(text)
        return self._cut(self._finder, text)

    def _cut(self, finder: StopFinder, text: str) -> News:
        stop, position = finder.find(text)
        if stop is not None:
            whole = self._held + text[:position]
            self._held, self._stopped = "", True
            return News(whole if self._include_stop else whole[: len(whole) - len(stop)], stop)
        if self._include_stop:
            return News(text)
        whole = self._held + text
        n_ready = len(whole) - finder.n_pending
        self._held = whole[n_ready:]
        return News(whole[:n_ready])


class StopFinder:
    """Finds the first of several strings in a text given in parts (Aho and Corasick, 1975).

    A state is a node of the trie of all strings: the longest suffix of the text that begins one.
    """

    def __init__(self, strings: Sequence[str]) -> None:
        assert all(strings), "admission refuses empty ones"
        self._children: list[dict[str, int]] = [{}]
        self._depth = [0]
        self._found: list[str | None] = [None]  # longest string that ends in this state
        for string in strings:
            self._insert(string)
        self._shorter = [0] * len(self._children)  # longest proper suffix that is a state, too
        self._link()
        self._state = 0

    @property
    def n_pending(self) -> int:
        """Characters at the text's end that may begin a string."""
        return self._depth[self._state]

    def find(self, text: str) -> tuple[str | None, int]:
        """Continues with `text`: the first string complete in it and the position behind it."""
        for position, char in enumerate(text, start=1):
            self._state = self._step(self._state, char)
            if (found := self._found[self._state]) is not None:
                return found, position
        return None, len(text)

    def _step(self, state: int, char: str) -> int:
        while state and char not in self._children[state]:
            state = self._shorter[state]
        return self._children[state].get(char, 0)

    def _insert(self, string: str) -> None:
        state = 0
        for depth, char in enumerate(string, start=1):
            child = self._children[state].get(char)
            if child is None:
                child = self._children[state][char] = len(self._children)
                self._children.append({})
                self._depth.append(depth)
                self._found.append(None)
            state = child
        self._found[state] = string

    def _link(self) -> None:
        """Breadth first, so that shorter states are linked before longer ones."""
        queue = deque(self._children[0].values())
        while queue:
            state = queue.popleft()
            for char, child in self._children[state].items():
                suffix = self._step(self._shorter[state], char)
                self._shorter[child] = suffix
                self._found[child] = self._found[child] or self._found[suffix]
                queue.append(child)
