"""What form a client asks for, in OpenAI's words and in vLLM's -> a form of grammar."""

from __future__ import annotations

from server.bodies.generation import GenerationBody, ResponseFormat, StructuredOutputs
from sl_serve.errors import RequestError
from sl_serve.grammar import forms

FIELDS = ("json_", "regex", "choice", "grammar")


def asked_form(body: GenerationBody) -> tuple[forms.Form, str] | None:
    """The form, and the field that asks for it; None: any text."""
    form = None if body.response_format is None else _response_format(body.response_format)
    if body.structured_outputs is None:
        return form
    if form is not None:
        raise RequestError(
            "'response_format' and 'structured_outputs' both ask for a form; give one of them.",
            "structured_outputs",
        )
    return _structured_outputs(body.structured_outputs)


def _response_format(asked: ResponseFormat) -> tuple[forms.Form, str] | None:
    if asked.type == "text":
        return None
    if asked.type == "json_object":
        return forms.json_object(), "response_format"
    param = "response_format.json_schema"
    if asked.json_schema is None:
        raise RequestError(f"'{param}' is required with the type 'json_schema'.", param)
    return forms.json_schema(asked.json_schema.schema_, f"{param}.schema"), f"{param}.schema"


def _structured_outputs(asked: StructuredOutputs) -> tuple[forms.Form, str]:
    given = {name for name in FIELDS if getattr(asked, name) is not None}
    if len(given) != 1:
        raise RequestError(
            "'structured_outputs' needs exactly one of 'json', 'regex', 'choice' and 'grammar'; "
            f"it has {len(given)}.",
            "structured_outputs",
        )
    param = f"structured_outputs.{given.pop().removesuffix('_')}"
    if asked.regex is not None:
        return forms.regex(asked.regex, param), param
    if asked.choice is not None:
        return forms.choice(asked.choice, param), param
    if asked.grammar is not None:
        return forms.ebnf(asked.grammar, param), param
    return forms.json_schema(asked.json_, param), param
