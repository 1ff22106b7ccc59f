"""Mistral: [TOOL_CALLS][{"name": ..., "arguments": {...}}, ...], and from tokenizer version 11 on
[TOOL_CALLS]name[ARGS]{...} for each call."""

from __future__ import annotations

import re

from sl_serve.tools.call_reader import CallReader
from sl_serve.tools.parser import TaggedParser, is_blank

MAX_NAME_CHARS = 200  # of a name with its marks
NAME = re.compile(r"\s*([\w.-]+)(?:\[CALL_ID\]\w+)?(?:\[ARGS\])?\s*")


class MistralParser(TaggedParser):
    tag = "[TOOL_CALLS]"
    _in_list = False

    def _after_tag(self, char: str) -> bool:
        self._in_list = char == "["
        if self._in_list:
            self._state = self._before_element
            return self._hold(char)
        if is_blank(char):
            return self._hold(char)
        if char == "{":
            return self._begin_call(CallReader(self._names))
        self._state = self._in_name
        return False

    def _in_name(self, char: str) -> bool:
        written = self._held[len(self.tag) :]
        if char != "{":
            return self._hold(char) if len(written) < MAX_NAME_CHARS else self._give_up()
        found = NAME.fullmatch(written)
        if found is None or found[1] not in self._names:
            return self._give_up()
        return self._begin_call(CallReader.of_arguments(found[1]))

    def _before_element(self, char: str) -> bool:
        if is_blank(char):
            return self._hold(char)
        return self._begin_call(CallReader(self._names)) if char == "{" else self._give_up()

    def _after_call(self, char: str) -> bool:
        if not self._in_list:
            self._state = self._in_text
            return False
        if is_blank(char):
            return True
        if char == ",":
            self._state = self._before_element
            return self._hold(char)
        self._state = self._in_text
        return char == "]"
