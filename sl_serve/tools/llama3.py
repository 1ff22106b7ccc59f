"""Llama 3.1 and later: the whole answer is {"name": ..., "parameters": {...}}, perhaps behind
<|python_tag|>; several calls are separated by semicolons."""

from __future__ import annotations

from sl_serve.tools.call_reader import CallReader
from sl_serve.tools.parser import ToolParser, is_blank

TAG = "<|python_tag|>"


class Llama3Parser(ToolParser):
    def _begin(self, char: str) -> bool:
        if is_blank(char):
            return self._hold(char)
        if char == "{":
            return self._begin_call(CallReader(self._names))
        seen = self._held.lstrip()
        if TAG.startswith(seen + char):
            return self._hold(char)
        return self._give_up()

    def _in_text(self, char: str) -> bool:
        self._pieces.text(char)
        return True

    def _after_call(self, char: str) -> bool:
        if is_blank(char):
            return self._hold(char)
        if char == ";" and not self._held.strip():
            return self._hold(char)
        return self._begin_call(CallReader(self._names)) if char == "{" else self._give_up()
