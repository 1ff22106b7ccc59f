"""Batch jobs of a server: hand in a file, look after it, fetch what came of it.

with Client("http://127.0.0.1:8000") as client:
    batches = Batches(client)
    batch = batches.submit(Path("requests.jsonl"))
    batch = batches.get(batch["id"])
"""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from clients.answers import json_body
from clients.client import Client
from clients.protocol import ClientError, connection_errors

Batch = dict[str, Any]  # OpenAI's batch object, with our `progress`

ENDED = frozenset({"completed", "failed", "expired", "cancelled"})


class Batches:
    """Raises ApiError and UnreachableError as the client does."""

    def __init__(self, client: Client) -> None:
        self._client = client

    def submit(self, path: Path, window: str = "24h", key: str | None = None) -> Batch:
        """`window`: like 24h or 7d. `key`: with the same one the same batch is answered again."""
        endpoint = read_endpoint(path)
        with path.open("rb") as file:
            form = {"file": (path.name, file, "application/jsonl")}
            upload = self._json("POST", "/v1/files", files=form, data={"purpose": "batch"})
        body = {
            "input_file_id": upload["id"],
            "endpoint": endpoint,
            "completion_window": window,
        }
        headers = {} if key is None else {"idempotency-key": key}
        return self._json("POST", "/v1/batches", json=body, headers=headers)

    def newest(self, limit: int = 20) -> list[Batch]:
        """Newest first."""
        batches: list[Batch] = self._json("GET", "/v1/batches", params={"limit": limit})["data"]
        return batches

    def get(self, batch_id: str) -> Batch:
        return self._json("GET", f"/v1/batches/{batch_id}")

    def cancel(self, batch_id: str) -> Batch:
        return self._json("POST", f"/v1/batches/{batch_id}/cancel")

    def retry(self, batch_id: str) -> Batch:
        return self._json("POST", f"/v1/batches/{batch_id}/retry")

    def results(self, batch_id: str) -> Iterator[bytes]:
        """Pieces of the JSON lines there are so far, answers and errors."""
        response = self._client.request("GET", f"/v1/batches/{batch_id}/results")
        try:
            with connection_errors():
                yield from response.iter_bytes()
        finally:
            response.close()

    def _json(self, method: str, path: str, **options: Any) -> dict[str, Any]:
        response = self._client.request(method, path, **options)
        with connection_errors():
            response.read()
        body: dict[str, Any] = json_body(response)
        return body


def read_endpoint(path: Path) -> str:
    """Where the file's lines want to go: the `url` of the first."""
    try:
        with path.open(encoding="utf-8") as file:
            url = json.loads(next(line for line in file if line.strip()))["url"]
    except OSError as error:
        raise ClientError(f"cannot read {path}: {error.strerror}") from error
    except (ValueError, LookupError, TypeError, StopIteration):
        raise ClientError(f"{path} does not begin with a JSON line that has a 'url'") from None
    return str(url)
