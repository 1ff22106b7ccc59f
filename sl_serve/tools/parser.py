"""Text of a model, as it comes, into text for the reader and calls of tools."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable, Collection

from sl_serve.tools.call_reader import BLANKS, CallReader, Status
from sl_serve.tools.pieces import Piece, Pieces

MAX_HELD_CHARS = 1000  # marks and blanks in front of a call


class ToolParser(ABC):
    """A state machine over characters: its result does not depend on how the text is cut, and its
    time is linear. What does not turn out to be a call of a known tool is text.

    A state takes a character, or leaves it to the state that it has set.
    """

    def __init__(self, names: Collection[str]) -> None:
        self._names = frozenset(names)
        self._pieces = Pieces()
        self._held = ""  # in front of a call: text, if it turns out to be none
        self._reader = CallReader(self._names)
        self._announced = False
        self._state: Callable[[str], bool] = self._begin

    def feed(self, text: str) -> list[Piece]:
        for char in text:
            self._take(char)
        return self._pieces.take()

    def end(self) -> list[Piece]:
        """The output is over. A call that was cut off stays as far as it was told."""
        if not self._announced:
            self._pieces.text(self._held + self._reader.raw)
        self._pieces.end()
        return self._pieces.take()

    @abstractmethod
    def _begin(self, char: str) -> bool: ...

    @abstractmethod
    def _in_text(self, char: str) -> bool: ...

    @abstractmethod
    def _after_call(self, char: str) -> bool: ...

    def _take(self, char: str) -> None:
        while not self._state(char):
            pass

    def _hold(self, char: str) -> bool:
        if len(self._held) >= MAX_HELD_CHARS:
            return self._give_up()
        self._held += char
        return True

    def _give_up(self) -> bool:
        """What was held is text after all, and so may be what follows."""
        held, self._held = self._held, ""
        self._pieces.text(held)
        self._state = self._in_text
        return False

    def _begin_call(self, reader: CallReader) -> bool:
        self._reader = reader
        self._announced = False
        self._state = self._in_call
        return False

    def _in_call(self, char: str) -> bool:
        reader = self._reader
        status = reader.feed(char)
        if reader.is_call and not self._announced:
            assert reader.name is not None
            self._pieces.call(reader.name)
            self._announced = True
            self._held = ""
        self._pieces.arguments(reader.take_arguments())
        if status is Status.READING:
            return True
        if not self._announced:
            self._held += reader.raw
        self._reader = CallReader(self._names)
        self._announced = False
        if status is Status.FAILED:
            return self._give_up()
        self._state = self._after_call
        return True


class TaggedParser(ToolParser):
    """Calls stand behind `tag`, whose first character does not occur in it again."""

    tag: str

    def _begin(self, char: str) -> bool:
        return self._in_text(char)

    def _in_text(self, char: str) -> bool:
        if char == self.tag[len(self._held)]:
            if self._held + char == self.tag:
                self._state = self._after_tag
            return self._hold(char)
        if self._held:
            return self._give_up()
        self._pieces.text(char)
        return True

    @abstractmethod
    def _after_tag(self, char: str) -> bool: ...


def is_blank(char: str) -> bool:
    return char in BLANKS
