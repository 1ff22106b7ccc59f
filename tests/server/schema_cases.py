"""The server against its own description: whatever fits it or not, answers are as described."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable

import schemathesis
from fastapi import FastAPI
from hypothesis import HealthCheck, Phase, given, seed, settings
from schemathesis import GenerationMode
from schemathesis.checks import not_a_server_error
from schemathesis.specs.openapi.checks import (
    content_type_conformance,
    response_headers_conformance,
    response_schema_conformance,
    status_code_conformance,
)

# Not among them: that everything the schema forbids is refused, and what it allows served. Null is
# taken for every optional field, and what a model's context holds is in no schema.
CHECKS = [
    not_a_server_error,
    status_code_conformance,
    content_type_conformance,
    response_headers_conformance,
    response_schema_conformance,
]


def check_schema(
    app: FastAPI, n_cases: int, random_seed: int, on_case: Callable[[], None] = lambda: None
) -> Counter[int]:
    """About n_cases over all operations, half of them against the schema; statuses by number.
    Raises a group of failures, each with a command that repeats it."""
    schema = schemathesis.openapi.from_asgi("/openapi.json", app)
    operations = [found.ok() for found in schema.get_all_operations()]
    n_bodies = sum(1 for operation in operations if operation.body)
    statuses = Counter[int]()
    for operation in operations:
        modes = list(GenerationMode) if operation.body else [GenerationMode.POSITIVE]
        for mode in modes:
            n = n_cases // (2 * n_bodies) if operation.body else 3

            @seed(random_seed)
            @settings(
                max_examples=n,
                deadline=None,
                database=None,
                phases=[Phase.generate],
                suppress_health_check=list(HealthCheck),
            )
            @given(case=operation.as_strategy(generation_mode=mode))
            def probe(case: schemathesis.Case) -> None:
                response = case.call_and_validate(checks=CHECKS)
                statuses[response.status_code] += 1
                on_case()

            probe()
    return statuses
