from __future__ import annotations

from tests.server.conftest import MakeClient


async def test_without_a_folder_files_and_batches_are_off(make_client: MakeClient) -> None:
    client = make_client()
    for method, path in (("GET", "/v1/files"), ("POST", "/v1/batches"), ("POST", "/v1/files")):
        answer = await client.request(method, path)
        assert answer.status_code == 501
        assert "--jobs-dir" in answer.json()["error"]["message"]
    schema = (await client.get("/openapi.json")).json()
    assert "/v1/files" not in schema["paths"]
