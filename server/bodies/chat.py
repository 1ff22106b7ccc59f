"""Chat completions: messages, tools and the settings of a template."""

from __future__ import annotations

from contextlib import suppress
from dataclasses import dataclass
from typing import Annotated, Any, Literal

from pydantic import (
    FailFast,
    Field,
    PlainValidator,
    StringConstraints,
    WithJsonSchema,
    model_serializer,
)

from server.bodies.fields import Body, Content, parse_inner
from server.bodies.generation import GenerationBody
from sl_serve.chat_template import GIVEN_NAMES

MAX_TOOLS = 128
TEMPLATE_FIELDS = {"role", "name", "tool_call_id", "tool_calls", "reasoning_content"}


def read_template_settings(value: object) -> dict[str, Any]:
    """Switches of a model's own, such as enable_thinking; what other fields say is theirs."""
    if not isinstance(value, dict):
        raise ValueError("should be an object")
    for name in sorted(value.keys() & GIVEN_NAMES):
        raise ValueError(f"should not have '{name}', which comes from other fields")
    return value


TemplateSettings = Annotated[
    dict[str, Any], PlainValidator(read_template_settings), WithJsonSchema({"type": "object"})
]


class CalledFunction(Body):
    name: str
    arguments: str | dict[str, Any] = "{}"

    @model_serializer
    def _for_template(self) -> dict[str, object]:
        """Templates write arguments as JSON themselves, so they get an object where it is one."""
        arguments = self.arguments
        if isinstance(arguments, str):
            with suppress(ValueError):
                parsed = parse_inner(arguments)
                arguments = parsed if isinstance(parsed, dict) else arguments
        return {"name": self.name, "arguments": arguments}


class MadeCall(Body):
    id: str | None = None
    type: Literal["function"] = "function"
    function: CalledFunction


class Message(Body):
    role: Literal["system", "developer", "user", "assistant", "tool"]
    content: Content = ""
    name: str | None = None
    tool_call_id: str | None = None
    tool_calls: list[MadeCall] | None = None
    reasoning_content: str | None = None

    def for_template(self) -> dict[str, object]:
        """What a chat template may read; nothing else a client sends reaches it."""
        others = self.model_dump(include=TEMPLATE_FIELDS, exclude_none=True)
        if self.reasoning_content is not None:  # as gpt-oss calls it
            others["thinking"] = self.reasoning_content
        return {"content": self.content, **others}


Messages = Annotated[list[Message], Field(min_length=1), FailFast()]


class Function(Body):
    name: Annotated[str, StringConstraints(pattern=r"^[a-zA-Z0-9_.-]{1,64}$")]
    description: str | None = None
    parameters: dict[str, Any] = Field(default_factory=dict)


class Tool(Body):
    type: Literal["function"]
    function: Function


Tools = Annotated[list[Tool], Field(max_length=MAX_TOOLS), FailFast()]


@dataclass(frozen=True, slots=True)
class NamedTool:
    name: str


def read_tool_choice(value: object) -> str | NamedTool:
    if value in ("none", "auto", "required"):
        return str(value)
    function = value.get("function") if isinstance(value, dict) else None
    name = function.get("name") if isinstance(function, dict) else None
    if not isinstance(name, str):
        raise ValueError(
            "should be 'none', 'auto', 'required' or {'type': 'function', 'function': "
            "{'name': ...}}"
        )
    return NamedTool(name)


TOOL_CHOICE_SCHEMA = {
    "anyOf": [
        {"type": "string", "enum": ["none", "auto", "required"]},
        {"type": "object", "required": ["type", "function"]},
    ]
}
ToolChoice = Annotated[
    str | NamedTool, PlainValidator(read_tool_choice), WithJsonSchema(TOOL_CHOICE_SCHEMA)
]


class ChatBody(GenerationBody):
    messages: Messages
    max_completion_tokens: int | None = Field(None, ge=0)
    logprobs: bool = False
    top_logprobs: int = Field(0, ge=0)
    tools: Tools = Field(default_factory=list)
    tool_choice: ToolChoice | None = None
    parallel_tool_calls: bool = True
    chat_template_kwargs: TemplateSettings = Field(default_factory=dict)
    reasoning_effort: str | None = None

    def template_settings(self) -> dict[str, Any]:
        """What the chat template may read beside messages and tools."""
        effort = self.reasoning_effort
        given = {} if effort is None else {"reasoning_effort": effort}
        return {**given, **self.chat_template_kwargs}
