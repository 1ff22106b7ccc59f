"""One call of a tool as models write it: a JSON object with the tool's name and its arguments."""

from __future__ import annotations

import json
from collections.abc import Callable, Collection
from enum import Enum

BLANKS = " \t\r\n"
NAMED_ARGUMENTS = ("arguments", "parameters")
IGNORED = ("type", "id")


class Status(Enum):
    READING = "reading"
    DONE = "done"
    FAILED = "failed"  # the latest character, which was not taken, makes it no call


class CallReader:
    """Character by character, each looked at once.

    It is a call as soon as the name of a known tool and the beginning of its arguments were read.
    From then on the arguments are passed on as they come, to the bracket that closes them.
    """

    def __init__(self, names: Collection[str]) -> None:
        self.name: str | None = None
        self._names = names
        self._raw: list[str] = []
        self._string: list[str] = []  # a key or the name, with its quotes
        self._end_string: Callable[[], Status] = self._end_key
        self._key = ""
        self._escaped = self._in_string = False
        self._depth = 0  # of brackets in the arguments
        self._arguments: list[str] = []  # not yet passed on
        self._has_arguments = False
        self._state: Callable[[str], Status] = self._opening

    @staticmethod
    def of_arguments(name: str) -> CallReader:
        """For a call whose name stands in front; what is read is its arguments alone."""
        reader = CallReader((name,))
        reader.name = name
        reader._has_arguments = True
        reader._state = reader._bare_arguments
        return reader

    @property
    def is_call(self) -> bool:
        return self.name is not None and self._has_arguments

    @property
    def raw(self) -> str:
        """All characters taken."""
        return "".join(self._raw)

    def feed(self, char: str) -> Status:
        status = self._state(char)
        if status is not Status.FAILED:
            self._raw.append(char)
        return status

    def take_arguments(self) -> str:
        """What of them is new; nothing before it is known to be a call."""
        if not self.is_call:
            return ""
        text = "".join(self._arguments)
        self._arguments.clear()
        return text

    def _go(self, state: Callable[[str], Status]) -> Status:
        self._state = state
        return Status.READING

    def _opening(self, char: str) -> Status:
        return self._go(self._before_key) if char == "{" else Status.FAILED

    def _before_key(self, char: str) -> Status:
        if char in BLANKS:
            return Status.READING
        return self._begin_string(char, self._end_key)

    def _begin_string(self, char: str, then: Callable[[], Status]) -> Status:
        if char != '"':
            return Status.FAILED
        self._string = [char]
        self._end_string = then
        return self._go(self._string_part)

    def _string_part(self, char: str) -> Status:
        self._string.append(char)
        if self._escaped:
            self._escaped = False
        elif char == "\\":
            self._escaped = True
        elif char == '"':
            return self._end_string()
        return Status.READING

    def _end_key(self) -> Status:
        self._key = "".join(self._string)[1:-1]
        return self._go(self._colon)

    def _colon(self, char: str) -> Status:
        if char == ":":
            return self._go(self._value)
        return Status.READING if char in BLANKS else Status.FAILED

    def _value(self, char: str) -> Status:
        if char in BLANKS:
            return Status.READING
        if self._key == "name" and self.name is None:
            return self._begin_string(char, self._end_name)
        if self._key in NAMED_ARGUMENTS and not self._has_arguments and char == "{":
            self._has_arguments = True
            self._argument_part(char)
            return self._go(self._named_arguments)
        if self._key in IGNORED:
            return self._begin_string(char, lambda: self._go(self._next))
        return Status.FAILED

    def _end_name(self) -> Status:
        try:
            name = json.loads("".join(self._string))
        except ValueError:
            return Status.FAILED
        if name not in self._names:
            return Status.FAILED
        self.name = name
        return self._go(self._next)

    def _named_arguments(self, char: str) -> Status:
        return self._go(self._next) if self._argument_part(char) else Status.READING

    def _bare_arguments(self, char: str) -> Status:
        return Status.DONE if self._argument_part(char) else Status.READING

    def _argument_part(self, char: str) -> bool:
        """Whether this is their last character."""
        self._arguments.append(char)
        if self._in_string:
            if self._escaped:
                self._escaped = False
            elif char == "\\":
                self._escaped = True
            elif char == '"':
                self._in_string = False
            return False
        if char == '"':
            self._in_string = True
        self._depth += (char in "{[") - (char in "}]")
        return self._depth == 0

    def _next(self, char: str) -> Status:
        if char in BLANKS:
            return Status.READING
        if char == ",":
            return self._go(self._before_key)
        if char != "}" or self.name is None:
            return Status.FAILED
        if not self._has_arguments:
            self._has_arguments = True
            self._arguments.append("{}")
        return Status.DONE
