"""How families of models write calls of tools: the parser of each, and the grammar that makes a
model write nothing else."""

from __future__ import annotations

import secrets
import string
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, Literal, Protocol

from sl_serve.grammar import forms
from sl_serve.tools.hermes import HermesParser
from sl_serve.tools.llama3 import Llama3Parser
from sl_serve.tools.mistral import MistralParser
from sl_serve.tools.parser import ToolParser

ToolParserName = Literal["auto", "hermes", "llama3", "mistral", "none"]
Schema = Mapping[str, Any]
ALONE = {"$ref", "anyOf", "oneOf", "allOf"}  # says all that is said of the arguments
NO_PARAMETERS = {"properties": {}, "additionalProperties": False}


class MarkTokens(Protocol):
    """What is needed of a tokenizer."""

    def encode(self, text: str, add_special_tokens: bool = True) -> list[int]: ...
    def shown_bytes(self, token_id: int) -> bytes: ...


@dataclass(frozen=True, slots=True)
class ToolFormat:
    """All calls of an answer: mark, opening, calls joined by `separator`, closing."""

    parser: type[ToolParser]
    before: str  # a call, up to its name
    key: str  # of the arguments
    after: str
    separator: str
    mark: str = ""  # in front of all calls; a special token in some vocabularies
    opening: str = ""
    closing: str = ""
    short_ids: bool = False

    def new_id(self) -> str:
        """Of a call. Mistral's templates refuse any but nine letters and digits."""
        if self.short_ids:
            alphabet = string.ascii_letters + string.digits
            return "".join(secrets.choice(alphabet) for _ in range(9))
        return f"call_{secrets.token_hex(12)}"

    def form(
        self, tools: Mapping[str, Schema], tokenizer: MarkTokens, *, only_one: bool, param: str
    ) -> forms.Form:
        """Calls of `tools` (name -> schema of its arguments) and nothing else."""
        calls = {
            "type": "tags_with_separator",
            "tags": [self._call(name, schema, param) for name, schema in tools.items()],
            "separator": self.separator,
            "at_least_one": True,
            "stop_after_first": only_one,
        }
        parts = [calls]
        if self.mark:
            parts.insert(0, _mark(self.mark, tokenizer))
        if self.opening:
            parts.insert(-1, forms.text(self.opening))
        if self.closing:
            parts.append(forms.text(self.closing))
        return parts[0] if len(parts) == 1 else {"type": "sequence", "elements": parts}

    def _call(self, name: str, schema: Schema, param: str) -> forms.Form:
        begin = f'{self.before}{name}", "{self.key}": '
        schema = schema or NO_PARAMETERS
        arguments = dict(schema) if ALONE & schema.keys() else {"type": "object", **schema}
        return forms.tag(begin, forms.json_schema(arguments, param), self.after)


def _mark(mark: str, tokenizer: MarkTokens) -> forms.Form:
    ids = tokenizer.encode(mark, add_special_tokens=False)
    if len(ids) == 1 and not tokenizer.shown_bytes(ids[0]):
        return {"type": "token", "token": ids[0]}
    return forms.text(mark)


FORMATS = {
    "hermes": ToolFormat(
        HermesParser, '<tool_call>\n{"name": "', "arguments", "}\n</tool_call>", "\n"
    ),
    "llama3": ToolFormat(Llama3Parser, '{"name": "', "parameters", "}", "; "),
    "mistral": ToolFormat(
        MistralParser,
        '{"name": "',
        "arguments",
        "}",
        ", ",
        mark="[TOOL_CALLS]",
        opening="[",
        closing="]",
        short_ids=True,
    ),
}


def tool_format(asked: ToolParserName, template: str | None) -> ToolFormat | None:
    """`template`: the chat template for requests with tools, which tells the family."""
    return FORMATS.get(_detected(template or "") if asked == "auto" else asked)


def _detected(template: str) -> str:
    if "[TOOL_CALLS]" in template:
        return "mistral"
    if "<tool_call>" in template:
        # Relatives write the inside of the tag in another way.
        is_json = "<function=" not in template and "<arg_key>" not in template
        return "hermes" if is_json else "none"
    is_llama = "<|start_header_id|>" in template and '"parameters"' in template
    return "llama3" if is_llama or "<|python_tag|>" in template else "none"
