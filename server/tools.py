"""Tools of a chat: what a request asks for, and what of an answer is calls."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

from server.bodies.chat import ChatBody, NamedTool, Tool
from server.engine_port import TokenizerPort
from sl_serve.errors import RequestError
from sl_serve.grammar import forms
from sl_serve.tools.formats import ToolFormat, ToolParserName, tool_format
from sl_serve.tools.pieces import Arguments, CallStart, Piece, Text


@dataclass(frozen=True, slots=True)
class ToolUse:
    """The tools that the model may call, and whether it must."""

    format: ToolFormat
    tools: tuple[Tool, ...]
    forced: bool
    only_one: bool

    def for_template(self) -> list[dict[str, Any]]:
        return [tool.model_dump(exclude_unset=True) for tool in self.tools]

    def form(self, tokenizer: TokenizerPort) -> forms.Form:
        schemas = {tool.function.name: tool.function.parameters for tool in self.tools}
        return self.format.form(schemas, tokenizer, only_one=self.only_one, param="tools")


def tool_use(body: ChatBody, parser: ToolParserName, template: str | None) -> ToolUse | None:
    """None: no tools, or none to be called."""
    choice = body.tool_choice or "auto"
    tools = tuple(body.tools)
    if not tools:
        if choice not in ("none", "auto"):
            raise RequestError(
                "'tool_choice' asks for a call, but there are no 'tools'.", "tool_choice"
            )
        return None
    names = [tool.function.name for tool in tools]
    if len(set(names)) < len(names):
        raise RequestError("'tools' has two functions of the same name.", "tools")
    if choice == "none":
        return None
    found = tool_format(parser, template)
    if found is None:
        raise RequestError(
            "'tools' cannot be used: how this model writes calls is not known from its chat "
            "template. If it is known to you, start the server with --tool-parser.",
            "tools",
            "not_supported",
        )
    if isinstance(choice, NamedTool):
        tools = tuple(tool for tool in tools if tool.function.name == choice.name)
        if not tools:
            raise RequestError(
                f"'tool_choice' names {choice.name[:64]!r}, which is not among the tools: "
                f"{', '.join(names)[:200]}.",
                "tool_choice",
            )
    only_one = isinstance(choice, NamedTool) or not body.parallel_tool_calls
    return ToolUse(found, tools, choice != "auto", only_one)


class CallTexts:
    """The calls of one answer, of one choice, as they come."""

    def __init__(self, use: ToolUse) -> None:
        self._parser = use.format.parser([tool.function.name for tool in use.tools])
        self._new_id: Callable[[], str] = use.format.new_id
        self._only_one = use.only_one
        self.n_calls = 0

    def deltas(self, text: str, is_last: bool) -> list[dict[str, Any]]:
        """What a stream says of `text`: deltas of content and of calls."""
        pieces = self._parser.feed(text)
        if is_last:
            pieces += self._parser.end()
        return [self._delta(piece) for piece in pieces if self._is_wanted(piece)]

    def message(self, text: str) -> dict[str, Any]:
        """The same as one message."""
        content: list[str] = []
        calls: list[dict[str, Any]] = []
        for delta in self.deltas(text, is_last=True):
            content.append(delta.get("content", ""))
            for call in delta.get("tool_calls", ()):
                if call["index"] == len(calls):
                    function = dict(call["function"])
                    calls.append({"id": call["id"], "type": "function", "function": function})
                else:
                    calls[call["index"]]["function"]["arguments"] += call["function"]["arguments"]
        said = "".join(content)
        message: dict[str, Any] = {"content": said if said or not calls else None}
        return message | ({"tool_calls": calls} if calls else {})

    def finish_reason(self, reason: str | None) -> str | None:
        return "tool_calls" if reason == "stop" and self.n_calls else reason

    def _is_wanted(self, piece: Piece) -> bool:
        """Where one call is allowed, others are dropped."""
        return isinstance(piece, Text) or not (self._only_one and piece.index > 0)

    def _delta(self, piece: Piece) -> dict[str, Any]:
        match piece:
            case Text(text):
                return {"content": text}
            case CallStart(index, name):
                self.n_calls += 1
                call = {"index": index, "id": self._new_id(), "type": "function"}
                return {"tool_calls": [call | {"function": {"name": name, "arguments": ""}}]}
            case Arguments(index, text):
                return {"tool_calls": [{"index": index, "function": {"arguments": text}}]}
