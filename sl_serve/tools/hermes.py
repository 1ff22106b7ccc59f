"""Hermes 2 Pro, Qwen 2.5 and 3: <tool_call>{"name": ..., "arguments": {...}}</tool_call>"""

from __future__ import annotations

from sl_serve.tools.call_reader import CallReader
from sl_serve.tools.parser import TaggedParser, is_blank

CLOSE = "</tool_call>"


class HermesParser(TaggedParser):
    tag = "<tool_call>"

    def _after_tag(self, char: str) -> bool:
        if is_blank(char):
            return self._hold(char)
        return self._begin_call(CallReader(self._names)) if char == "{" else self._give_up()

    def _after_call(self, char: str) -> bool:
        """The closing tag may be missing."""
        if is_blank(char) and not self._held:
            return True
        if char != CLOSE[len(self._held)]:
            held, self._held = self._held, ""
            self._state = self._in_text
            for earlier in held:
                self._take(earlier)
            return False
        self._hold(char)
        if self._held == CLOSE:
            self._held = ""
            self._state = self._in_text
        return True
