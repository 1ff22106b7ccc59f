"""/v1/batches through OpenAI's package, and what is ours beside it."""

from __future__ import annotations

import json
from collections.abc import Iterator
from typing import Any

import httpx
import openai
import pytest

from tests.batch.jobs import CHAT, COMPLETIONS, jsonl, line, wait_for
from tests.server.conftest import LiveServer
from tests.server.fake_engine import FakeEngine

ENDLESS = {"model": "toy", "prompt": "z", "max_tokens": 4000}


@pytest.fixture
def sdk(live: LiveServer) -> Iterator[openai.OpenAI]:
    with openai.OpenAI(base_url=live.url + "/v1", api_key="none", max_retries=0) as sdk:
        yield sdk


def upload(sdk: openai.OpenAI, *entries: Any) -> str:
    return sdk.files.create(file=("in.jsonl", jsonl(entries)), purpose="batch").id


def wait(sdk: openai.OpenAI, batch_id: str) -> Any:
    wait_for(lambda: sdk.batches.retrieve(batch_id).status in ("completed", "failed", "cancelled"))
    return sdk.batches.retrieve(batch_id)


def test_the_life_of_a_batch(sdk: openai.OpenAI) -> None:
    chat = {"model": "toy", "messages": [{"role": "user", "content": "hi"}], "max_tokens": 3}
    file_id = upload(sdk, *(line(f"c{i}", chat, url=CHAT) for i in range(5)))
    batch = sdk.batches.create(
        input_file_id=file_id,
        endpoint=CHAT,
        completion_window="24h",
        metadata={"for": "test"},
        output_expires_after={"anchor": "created_at", "seconds": 7200},
    )
    assert batch.status == "validating"
    assert batch.expires_at == batch.created_at + 24 * 3600
    done = wait(sdk, batch.id)
    assert done.status == "completed"
    assert done.request_counts.model_dump() == {"total": 5, "completed": 5, "failed": 0}
    assert (done.model, done.metadata, done.error_file_id) == ("toy", {"for": "test"}, None)
    assert done.usage.output_tokens == 15
    assert done.usage.total_tokens == done.usage.input_tokens + 15
    assert done.in_progress_at and done.finalizing_at and done.completed_at
    output = sdk.files.retrieve(done.output_file_id)
    assert output.purpose == "batch_output"
    assert output.expires_at == output.created_at + 7200
    entries = [json.loads(entry) for entry in sdk.files.content(output.id).text.splitlines()]
    assert [entry["custom_id"] for entry in entries] == [f"c{i}" for i in range(5)]
    assert len({entry["id"] for entry in entries}) == 5
    for entry in entries:
        assert entry.keys() == {"id", "custom_id", "response", "error"}
        assert entry["response"].keys() == {"status_code", "request_id", "body"}
        answer = openai.types.chat.ChatCompletion.model_validate(entry["response"]["body"])
        assert answer.usage is not None and answer.usage.completion_tokens == 3
    assert [b.id for b in sdk.batches.list()] == [batch.id]


def test_errors_name_their_lines(sdk: openai.OpenAI) -> None:
    file_id = upload(sdk, line("a"), line("a"), line("b", {"prompt": 5, "model": "toy"}))
    batch = sdk.batches.create(input_file_id=file_id, endpoint=COMPLETIONS, completion_window="24h")
    failed = wait(sdk, batch.id)
    assert failed.status == "failed"
    assert failed.failed_at
    assert [(e.line, e.code, e.param) for e in failed.errors.data] == [
        (2, "duplicate_custom_id", "custom_id"),
        (3, "invalid_body", "body.prompt"),
    ]
    assert failed.output_file_id is None
    assert failed.request_counts.total == 0


def test_lists_and_cancelling(sdk: openai.OpenAI, engine: FakeEngine) -> None:
    file_id = upload(sdk, line("long", ENDLESS))
    ids = [
        sdk.batches.create(input_file_id=file_id, endpoint=COMPLETIONS, completion_window="24h").id
        for _ in range(3)
    ]
    assert [b.id for b in sdk.batches.list(limit=1)] == ids[::-1]
    assert [b.id for b in sdk.batches.list(after=ids[1], limit=1).data] == ids[:1]
    for batch_id in ids:
        assert sdk.batches.cancel(batch_id).status in ("cancelling", "cancelled")
        assert wait(sdk, batch_id).status == "cancelled"
    assert engine.wait_idle()


@pytest.mark.parametrize(
    ("changes", "param"),
    [
        ({"endpoint": "/v1/embeddings"}, "endpoint"),
        ({"completion_window": "soon"}, "completion_window"),
        ({"completion_window": "31d"}, "completion_window"),
        ({"completion_window": "0h"}, "completion_window"),
        ({"metadata": {"k": "v" * 513}}, "metadata.k"),
        ({"metadata": {str(i): "" for i in range(17)}}, "metadata"),
        ({"metadata": {"k": 5}}, "metadata.k"),
        ({"output_expires_after": {"anchor": "created_at", "seconds": 1}}, None),
        ({"input_file_id": None}, "input_file_id"),
        ({"seed": 2**64}, "seed"),
    ],
)
def test_what_cannot_be_made(live: LiveServer, changes: dict[str, Any], param: str | None) -> None:
    body = {"input_file_id": "x", "endpoint": COMPLETIONS, "completion_window": "24h"} | changes
    answer = httpx.post(live.url + "/v1/batches", json=body)
    assert answer.status_code == 400, answer.text
    error = answer.json()["error"]
    assert param is None or error["param"] == param
    assert error["type"] == "invalid_request_error"


def test_unknown_files_and_batches(sdk: openai.OpenAI) -> None:
    with pytest.raises(openai.NotFoundError, match="no file"):
        sdk.batches.create(input_file_id="file-x", endpoint=COMPLETIONS, completion_window="24h")
    for look in (sdk.batches.retrieve, sdk.batches.cancel):
        with pytest.raises(openai.NotFoundError, match="no batch"):
            look("batch_x")


def test_an_output_is_no_input(sdk: openai.OpenAI) -> None:
    file_id = upload(sdk, line("a"))
    batch = sdk.batches.create(input_file_id=file_id, endpoint=COMPLETIONS, completion_window="24h")
    output = wait(sdk, batch.id).output_file_id
    with pytest.raises(openai.BadRequestError, match="uploaded with the purpose 'batch'"):
        sdk.batches.create(input_file_id=output, endpoint=COMPLETIONS, completion_window="24h")


def test_an_idempotency_key_answers_with_the_same_batch(sdk: openai.OpenAI) -> None:
    file_id = upload(sdk, line("a"))
    headers = {"Idempotency-Key": "once"}
    made = [
        sdk.batches.create(
            input_file_id=file_id,
            endpoint=COMPLETIONS,
            completion_window=window,
            extra_headers=headers,
        ).id
        for window in ("24h", "24h")
    ]
    assert made[0] == made[1]
    with pytest.raises(openai.BadRequestError, match="another request") as reused:
        sdk.batches.create(
            input_file_id=file_id,
            endpoint=CHAT,
            completion_window="24h",
            extra_headers=headers,
        )
    assert reused.value.code == "idempotency_key_reused"


def test_results_while_running_and_from_where_one_was(
    sdk: openai.OpenAI, live: LiveServer, engine: FakeEngine
) -> None:
    file_id = upload(sdk, line("a"), line("b"), line("long", ENDLESS))
    batch = sdk.batches.create(
        input_file_id=file_id,
        endpoint=COMPLETIONS,
        completion_window="7d",  # type: ignore[arg-type]
    )
    url = f"{live.url}/v1/batches/{batch.id}/results"
    wait_for(lambda: len(httpx.get(url).text.splitlines()) == 2)
    answer = httpx.get(url)
    assert answer.headers["x-incomplete"] == "true"
    first, second = (json.loads(entry) for entry in answer.text.splitlines())
    rest = httpx.get(url, params={"after": first["id"]}).text.splitlines()
    assert [json.loads(entry) for entry in rest] == [second]
    sdk.batches.cancel(batch.id)
    assert wait(sdk, batch.id).status == "cancelled"
    answer = httpx.get(url, params={"after": second["id"]})
    assert answer.headers["x-incomplete"] == "false"
    assert json.loads(answer.text)["error"]["code"] == "batch_cancelled"
    for wrong in ("x", "batch_req_0000000000000000_77"):
        assert httpx.get(url, params={"after": wrong}).status_code == 400


def test_retry_and_progress_over_http(sdk: openai.OpenAI, live: LiveServer) -> None:
    file_id = upload(sdk, line("a"), line("long", ENDLESS))
    url = f"{live.url}/v1/batches"
    body = {"input_file_id": file_id, "endpoint": COMPLETIONS, "completion_window": "2h"}
    batch = httpx.post(url, json=body).json()
    assert batch["expires_at"] == batch["created_at"] + 7200
    assert batch["progress"]["lines"] == 0
    assert httpx.post(f"{url}/{batch['id']}/retry").status_code == 400
    wait_for(lambda: httpx.get(f"{url}/{batch['id']}").json()["progress"]["lines"] == 1)
    sdk.batches.cancel(batch["id"])
    wait(sdk, batch["id"])
    assert httpx.post(f"{url}/{batch['id']}/retry").json()["status"] == "in_progress"
    sdk.batches.cancel(batch["id"])


def test_metrics_count_lines_and_jobs(sdk: openai.OpenAI, live: LiveServer) -> None:
    file_id = upload(sdk, line("a"), line("b"))
    batch = sdk.batches.create(input_file_id=file_id, endpoint=COMPLETIONS, completion_window="24h")
    wait(sdk, batch.id)

    def metrics() -> str:
        return httpx.get(live.url + "/metrics").text

    wait_for(lambda: 'sl_serve_batch_jobs{status="completed"} 1.0' in metrics())
    assert 'sl_serve_batch_lines_total{outcome="done"} 2.0' in metrics()
    assert 'sl_serve_batch_lines_total{outcome="failed"} 0.0' in metrics()
