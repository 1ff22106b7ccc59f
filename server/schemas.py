"""The JSON bodies clients send. Strict: true is not 1 and "5" is not 5.

`null` means the default everywhere, as clients send it for whatever they leave out. Unknown fields
are accepted. Limits that depend on the model or on settings are in `params`.
"""

from __future__ import annotations

import math
from contextlib import suppress
from dataclasses import dataclass
from typing import Annotated, Any, Literal, TypeVar

import orjson
from pydantic import (
    BaseModel,
    BeforeValidator,
    ConfigDict,
    FailFast,
    Field,
    PlainValidator,
    StringConstraints,
    ValidationError,
    WithJsonSchema,
    model_serializer,
    model_validator,
)
from pydantic_core import ErrorDetails

from server.limits import nesting_exceeds
from sl_serve.admission import INTEGERS, LOGIT_BIAS, RANGES, Range
from sl_serve.chat_template import GIVEN_NAMES
from sl_serve.errors import RequestError

MAX_LOGIT_BIAS = 1024
MAX_TOOLS = 128
MAX_INNER_DEPTH = 64  # of JSON in a string

PROMPT_SCHEMA = {
    "anyOf": [
        {"type": "string"},
        {"type": "array", "items": {"type": "string"}},
        {"type": "array", "items": {"type": "integer"}},
        {"type": "array", "items": {"type": "array", "items": {"type": "integer"}}},
    ]
}
CONTENT_SCHEMA = {"anyOf": [{"type": "string"}, {"type": "array", "items": {"type": "object"}}]}
STOP_SCHEMA = {"anyOf": [{"type": "string"}, {"type": "array", "items": {"type": "string"}}]}


def read_token_ids(value: object) -> list[int]:
    """A list of integers; which of them exist is for the model to say."""
    if not isinstance(value, list) or not all(type(item) is int for item in value):
        raise ValueError("should be a list of token ids (integers)")
    return value


def read_prompts(value: object) -> list[str | list[int]]:
    """The four shapes of a prompt as one: a list of texts and token lists."""
    if isinstance(value, str):
        return [value]
    if not isinstance(value, list) or not value:
        raise ValueError(
            "should be a string, a list of strings, a list of token ids or a list of such lists, "
            "and not empty"
        )
    if type(value[0]) is int:
        return [read_token_ids(value)]
    return [item if isinstance(item, str) else read_token_ids(item) for item in value]


def read_content(value: object) -> str:
    """Text, or text parts joined by line breaks."""
    if isinstance(value, str):
        return value
    if not isinstance(value, list):
        raise ValueError("should be a string or a list of text parts")
    return "\n".join(_text_of(part) for part in value)


def _text_of(part: object) -> str:
    kind = part.get("type") if isinstance(part, dict) else None
    if kind != "text":
        raise ValueError(f"has a part of type {str(kind)[:40]!r}; only 'text' is built in")
    text = part.get("text") if isinstance(part, dict) else None
    if not isinstance(text, str):
        raise ValueError("has a text part whose 'text' is not a string")
    return text


def _as_list(value: object) -> object:
    return [value] if isinstance(value, str) else value


NonEmpty = Annotated[str, StringConstraints(min_length=1)]
TokenIds = Annotated[
    list[int],
    PlainValidator(read_token_ids),
    WithJsonSchema({"type": "array", "items": {"type": "integer"}}),
]
Prompts = Annotated[
    list[str | list[int]], PlainValidator(read_prompts), WithJsonSchema(PROMPT_SCHEMA)
]
Content = Annotated[str, PlainValidator(read_content), WithJsonSchema(CONTENT_SCHEMA)]
Bias = Annotated[float, Field(ge=LOGIT_BIAS.lowest, le=LOGIT_BIAS.highest)]
Stop = Annotated[list[NonEmpty], FailFast(), BeforeValidator(_as_list), WithJsonSchema(STOP_SCHEMA)]


class Body(BaseModel):
    model_config = ConfigDict(strict=True, extra="allow", allow_inf_nan=False)

    @model_validator(mode="before")
    @classmethod
    def _null_means_default(cls, value: Any) -> Any:
        if not isinstance(value, dict):
            return value
        return {name: item for name, item in value.items() if item is not None}


class StreamOptions(Body):
    include_usage: bool = False
    continuous_usage_stats: bool = False


def within(limits: Range, default: float | None) -> Any:
    """A field with the limits that every front has."""
    highest = None if limits.highest == math.inf else limits.highest
    return Field(default, ge=limits.lowest, le=highest)


def parse_inner(text: str) -> Any:
    """JSON that came as a string; ValueError where it is none."""
    raw = text.encode()
    if nesting_exceeds(raw, MAX_INNER_DEPTH):
        raise ValueError(f"is nested deeper than {MAX_INNER_DEPTH} levels")
    return orjson.loads(raw)


def _read_json(value: object) -> object:
    """A schema may also come as its text."""
    return parse_inner(value) if isinstance(value, str) else value


SCHEMA_FIELD = {"anyOf": [{"type": "object"}, {"type": "boolean"}]}
JsonSchema = Annotated[Any, BeforeValidator(_read_json), WithJsonSchema(SCHEMA_FIELD)]


class NamedSchema(Body):
    name: str | None = None
    schema_: JsonSchema = Field(alias="schema")


class ResponseFormat(Body):
    type: Literal["text", "json_object", "json_schema"]
    json_schema: NamedSchema | None = None


class StructuredOutputs(Body):
    json_: JsonSchema = Field(None, alias="json")
    regex: str | None = None
    choice: list[str] | None = None
    grammar: str | None = None


class GenerationBody(Body):
    """What completions and chat completions share; the names are OpenAI's and vLLM's."""

    model: str | None = None
    max_tokens: int | None = within(INTEGERS["max_tokens"], None)
    min_tokens: int = within(INTEGERS["min_tokens"], 0)
    n: int = Field(1, ge=1)
    temperature: float = within(RANGES["temperature"], 1.0)
    top_p: float = within(RANGES["top_p"], 1.0)
    top_k: int = Field(0, ge=-1)  # -1, as 0: off
    min_p: float = within(RANGES["min_p"], 0.0)
    presence_penalty: float = within(RANGES["presence_penalty"], 0.0)
    frequency_penalty: float = within(RANGES["frequency_penalty"], 0.0)
    repetition_penalty: float = within(RANGES["repetition_penalty"], 1.0)
    logit_bias: dict[str, Bias] = Field(default_factory=dict, max_length=MAX_LOGIT_BIAS)
    seed: int | None = within(INTEGERS["seed"], None)
    stop: Stop = Field(default_factory=list)
    stop_token_ids: TokenIds = Field(default_factory=list)
    include_stop_str_in_output: bool = False
    ignore_eos: bool = False
    stream: bool = False
    stream_options: StreamOptions | None = None
    return_token_ids: bool = False
    response_format: ResponseFormat | None = None
    structured_outputs: StructuredOutputs | None = None


class CompletionBody(GenerationBody):
    prompt: Prompts
    best_of: int | None = None
    echo: bool = False
    logprobs: int | None = Field(None, ge=0)
    suffix: str | None = None
    add_special_tokens: bool = True


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


class TokenizeBody(Body):
    model: str | None = None
    prompt: str | None = None
    messages: Messages = Field(default_factory=list)
    add_special_tokens: bool | None = None  # true for a prompt, false for messages
    add_generation_prompt: bool = True
    chat_template_kwargs: TemplateSettings = Field(default_factory=dict)
    return_token_strs: bool = False


class DetokenizeBody(Body):
    model: str | None = None
    tokens: TokenIds


BodyT = TypeVar("BodyT", bound=Body)


def validate(kind: type[BodyT], value: dict[str, Any]) -> BodyT:
    """RequestError names the first field that is wrong."""
    try:
        return kind.model_validate(value)
    except ValidationError as error:
        raise _request_error(error.errors(include_url=False)[0]) from None


def _request_error(error: ErrorDetails) -> RequestError:
    param = _dotted(error["loc"])
    if error["type"] == "missing":
        return RequestError(f"'{param}' is required.", param)
    complaint = error["msg"]
    for opening in ("Input ", "Value error, ", "String ", "List ", "Dictionary "):
        complaint = complaint.removeprefix(opening)
    given = error["input"]
    seen = f", not {str(given).lower()[:40]}" if isinstance(given, int | float) else ""
    return RequestError(f"'{param}' {complaint}{seen}.", param)


def _dotted(location: tuple[int | str, ...]) -> str:
    """messages[0].role"""
    text = "".join(f"[{part}]" if isinstance(part, int) else f".{part}" for part in location)
    return text.removeprefix(".")[:200]
