"""The schema at /openapi.json. Bodies are read by our own strict parser, so it is told of them."""

from __future__ import annotations

from typing import Any

from fastapi import FastAPI
from pydantic.json_schema import models_json_schema

from server.batch.schemas import BatchBody
from server.schemas import Body, ChatBody, CompletionBody, DetokenizeBody, TokenizeBody

REF = "#/components/schemas/{model}"


def takes(kind: type[Body]) -> dict[str, Any]:
    """For a route's `openapi_extra`: it takes a JSON body of this kind."""
    schema = {"$ref": REF.format(model=kind.__name__)}
    return {"requestBody": {"required": True, "content": {"application/json": {"schema": schema}}}}


class DescribedApp(FastAPI):
    def openapi(self) -> dict[str, Any]:
        if self.openapi_schema is None:
            schema = super().openapi()
            kinds = (CompletionBody, ChatBody, TokenizeBody, DetokenizeBody, BatchBody)
            _, bodies = models_json_schema(
                [(kind, "validation") for kind in kinds], ref_template=REF
            )
            known = schema.setdefault("components", {}).setdefault("schemas", {})
            known.update(bodies["$defs"])
        assert self.openapi_schema is not None
        return self.openapi_schema
