"""What completions and chat completions share, and completions."""

from __future__ import annotations

from typing import Literal

from pydantic import Field

from server.bodies.fields import Bias, Body, JsonSchema, Prompts, Stop, TokenIds, within
from sl_serve.admission import INTEGERS, RANGES

MAX_LOGIT_BIAS = 1024


class StreamOptions(Body):
    include_usage: bool = False
    continuous_usage_stats: bool = False


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
