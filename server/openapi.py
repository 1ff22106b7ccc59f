"""The schema at /openapi.json. Bodies are read by our own strict parser, so it is told of them."""

from __future__ import annotations

from typing import Any

from fastapi import FastAPI
from pydantic.json_schema import models_json_schema

from server.batch.schemas import BatchBody
from server.bodies.chat import ChatBody
from server.bodies.fields import Body
from server.bodies.generation import CompletionBody
from server.bodies.tokens import DetokenizeBody, TokenizeBody

REF = "#/components/schemas/{model}"
MAYBE_TEXT = {"anyOf": [{"type": "string"}, {"type": "null"}]}
ERROR_FIELDS = {
    "message": {"type": "string"},
    "type": {"type": "string"},
    "param": MAYBE_TEXT,
    "code": MAYBE_TEXT,
}
ERROR = {
    "title": "Error",
    "type": "object",
    "required": ["error"],
    "properties": {
        "error": {"type": "object", "required": [*ERROR_FIELDS], "properties": ERROR_FIELDS}
    },
}
# Of any status but 2xx, on every path.
ERROR_RESPONSE = {
    "description": "An error; 429 and 503 say with Retry-After when to come again",
    "content": {"application/json": {"schema": {"$ref": REF.format(model="Error")}}},
}


def takes(kind: type[Body]) -> dict[str, Any]:
    """For a route's `openapi_extra`: it takes a JSON body of this kind."""
    schema = {"$ref": REF.format(model=kind.__name__)}
    return {"requestBody": {"required": True, "content": {"application/json": {"schema": schema}}}}


def answers_also(media_type: str) -> dict[int | str, dict[str, Any]]:
    """For a route's `responses`: beside JSON."""
    return {200: {"content": {media_type: {}}}}


class DescribedApp(FastAPI):
    def openapi(self) -> dict[str, Any]:
        if self.openapi_schema is None:
            schema = super().openapi()
            kinds = (CompletionBody, ChatBody, TokenizeBody, DetokenizeBody, BatchBody)
            _, bodies = models_json_schema(
                [(kind, "validation") for kind in kinds], ref_template=REF
            )
            known = schema.setdefault("components", {}).setdefault("schemas", {})
            known.update(bodies["$defs"], Error=ERROR)
            for operation in (o for path in schema["paths"].values() for o in path.values()):
                operation["responses"].pop("422", None)  # FastAPI's own: bodies are read by us
                operation["responses"]["default"] = ERROR_RESPONSE
        assert self.openapi_schema is not None
        return self.openapi_schema
