"""The JSON body that makes a batch."""

from __future__ import annotations

from typing import Annotated, Literal

from pydantic import Field, StringConstraints

from server.batch.files import LONGEST_EXPIRY_S, SHORTEST_EXPIRY_S
from server.bodies.fields import Body
from sl_serve.admission import INTEGERS

SEEDS = INTEGERS["seed"]

MetadataKey = Annotated[str, StringConstraints(max_length=64)]
MetadataValue = Annotated[str, StringConstraints(max_length=512)]


class ExpiresAfter(Body):
    anchor: Literal["created_at"]
    seconds: int = Field(ge=SHORTEST_EXPIRY_S, le=LONGEST_EXPIRY_S)


class BatchBody(Body):
    """`seed`: ours; of the lines that have none. Without it one is drawn."""

    input_file_id: str
    endpoint: str
    completion_window: str
    metadata: dict[MetadataKey, MetadataValue] | None = Field(None, max_length=16)
    output_expires_after: ExpiresAfter | None = None
    seed: int | None = Field(None, ge=SEEDS.lowest, le=SEEDS.highest)
