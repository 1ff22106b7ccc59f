"""Models, tokens, health, metrics, schema and logs."""

from __future__ import annotations

from typing import Any

import httpx
import orjson
import pytest
import structlog
from prometheus_client.parser import text_string_to_metric_families

from server.bodies.chat import ChatBody
from server.bodies.generation import CompletionBody
from server.bodies.tokens import DetokenizeBody, TokenizeBody
from sl_serve.stats import EngineState
from tests.server.conftest import MakeClient
from tests.server.fake_engine import BOS, FakeEngine


async def test_models(client: httpx.AsyncClient) -> None:
    answer = (await client.get("/v1/models")).json()
    assert answer["object"] == "list"
    assert [model["id"] for model in answer["data"]] == ["toy/one", "alias"]
    one = (await client.get("/v1/models/toy/one")).json()
    assert one == answer["data"][0]
    assert one["object"] == "model"
    assert one["max_model_len"] == 4096
    assert one["meta"] == {"n_params": 1_234_567, "n_vocab": 260}


async def test_tokenize_and_back(client: httpx.AsyncClient) -> None:
    answer = (await client.post("/tokenize", json={"prompt": "hé"})).json()
    ids = [BOS, *"hé".encode()]
    assert answer == {"tokens": ids, "count": 4, "max_model_len": 4096}
    bare = await client.post("/tokenize", json={"prompt": "hé", "add_special_tokens": False})
    assert bare.json()["tokens"] == ids[1:]
    text = (await client.post("/detokenize", json={"tokens": ids})).json()
    assert text == {"prompt": "<s>hé"}
    assert (await client.post("/detokenize", json={"tokens": []})).json() == {"prompt": ""}
    assert (await client.post("/tokenize", json={"prompt": ""})).json()["tokens"] == [BOS]


async def test_tokenize_messages(client: httpx.AsyncClient) -> None:
    body = {"messages": [{"role": "user", "content": "a"}], "return_token_strs": True}
    answer = (await client.post("/tokenize", json=body)).json()
    assert bytes(answer["tokens"]) == b"[user]a[assistant]"
    assert "".join(answer["token_strs"]) == "[user]a[assistant]"
    changed = body | {"add_generation_prompt": False, "add_special_tokens": True}
    answer = (await client.post("/tokenize", json=changed)).json()
    assert answer["token_strs"] == ["<s>", *"[user]a"]


@pytest.mark.parametrize(
    ("path", "body"),
    [
        ("/tokenize", {}),
        ("/tokenize", {"prompt": "a", "messages": [{"role": "user", "content": "a"}]}),
        ("/tokenize", {"prompt": ["a"]}),
        ("/tokenize", {"messages": []}),
        ("/detokenize", {}),
        ("/detokenize", {"tokens": "a"}),
        ("/detokenize", {"tokens": [260]}),
        ("/detokenize", {"tokens": [-1]}),
        ("/detokenize", {"tokens": [True]}),
    ],
)
async def test_wrong_token_requests(client: httpx.AsyncClient, path: str, body: object) -> None:
    response = await client.post(path, json=body)
    assert response.status_code == 400
    assert response.json()["error"]["type"] == "invalid_request_error"


async def test_tokenizer_info(client: httpx.AsyncClient) -> None:
    assert (await client.get("/tokenizer_info")).json() == {
        "vocab_size": 260,
        "model_max_length": 4096,
        "bos_token": "<s>",
        "eos_token": "</s>",
        "pad_token": None,
        "chat_template": "toy",
    }


async def statuses(client: httpx.AsyncClient) -> tuple[int, ...]:
    return tuple(
        [(await client.get(path)).status_code for path in ("/live", "/ping", "/health", "/ready")]
    )


async def test_health_by_state(client: httpx.AsyncClient, engine: FakeEngine) -> None:
    assert await statuses(client) == (200, 200, 200, 200)
    engine.state = EngineState.DRAINING
    assert await statuses(client) == (200, 200, 200, 503)
    engine.state = EngineState.CLOSED
    assert await statuses(client) == (200, 200, 503, 503)
    engine.state, engine.reason = EngineState.DEAD, "the disk is gone"
    assert await statuses(client) == (503, 503, 503, 503)
    for path in ("/live", "/health", "/ready"):
        response = await client.get(path)
        assert response.json()["error"]["code"] == "engine_dead"
        assert "the disk is gone" not in response.text  # anyone may ask


async def test_progress_decides_by_how_long_steps_take(
    make_client: MakeClient, engine: FakeEngine
) -> None:
    client = make_client(stall_floor_s=100)
    engine.gate.clear()
    engine.active["x"] = None  # type: ignore[assignment]

    async def asked(n_steps: int, slow_step_s: float, since_progress_s: float) -> tuple[int, ...]:
        engine.n_steps, engine.slow_step_s = n_steps, slow_step_s
        engine.since_progress_s = since_progress_s
        found = await statuses(client)
        metrics = await read_metrics(client)
        assert metrics["sl_serve_engine_stuck"] == (found[3] == 503)
        return found

    fine, stuck, hopeless = (200, 200, 200, 200), (200, 200, 503, 503), (503, 503, 503, 503)
    assert await asked(0, 0.0, 99) == fine  # nobody knows yet what is usual
    assert await asked(19, 0.01, 99) == fine
    assert await asked(19, 0.01, 101) == stuck
    assert await asked(20, 0.01, 14) == fine
    assert await asked(20, 0.01, 16) == stuck
    assert await asked(20, 0.01, 149) == stuck
    assert await asked(20, 0.01, 151) == hopeless
    assert await asked(500, 40.0, 119) == fine
    assert await asked(500, 40.0, 121) == stuck  # three slow steps
    error = (await client.get("/ready")).json()["error"]
    assert error["code"] == "stuck"
    assert "121 s" in error["message"] and "40 s" in error["message"]
    assert await asked(500, 40.0, 1201) == hopeless
    assert await asked(501, 40.0, 0) == fine  # it ended after all
    del engine.active["x"]
    assert await asked(500, 0.01, 10_000) == fine  # nothing runs


async def test_dead_engine_refuses_without_details(
    client: httpx.AsyncClient, engine: FakeEngine
) -> None:
    engine.die("secret path /srv/x")
    with structlog.testing.capture_logs() as lines:
        response = await client.post("/v1/completions", json={"prompt": "a"})
    assert response.status_code == 500
    assert response.json()["error"]["code"] == "engine_dead"
    assert "secret" not in response.text
    assert any(line.get("reason") == "secret path /srv/x" for line in lines)


@pytest.mark.parametrize("stream", [False, True])
async def test_failing_request(client: httpx.AsyncClient, engine: FakeEngine, stream: bool) -> None:
    engine.gate.clear()
    engine.fail("inside story")
    contextvars = structlog.contextvars.merge_contextvars
    with structlog.testing.capture_logs(processors=[contextvars]) as lines:
        body = {"prompt": "a", "stream": stream}
        headers = {"x-request-id": "mine"}
        response = await client.post("/v1/completions", json=body, headers=headers)
    if stream:
        first, second = response.text.strip().split("\n\n")
        assert second == "data: [DONE]"
        error = orjson.loads(first.removeprefix("data: "))["error"]
    else:
        assert response.status_code == 500
        error = response.json()["error"]
    assert error["type"] == "server_error"
    assert "request mine;" in error["message"]
    assert "inside story" not in response.text
    (told,) = [line for line in lines if line.get("reason") == "inside story"]
    assert told["request_id"] == "mine"
    assert not client.app.state.context.jobs  # type: ignore[attr-defined]


async def test_bug_in_the_server_is_a_500_with_the_id_in_the_log(
    client: httpx.AsyncClient, engine: FakeEngine, monkeypatch: pytest.MonkeyPatch
) -> None:
    def broken(*_: object, **__: object) -> list[int]:
        raise ZeroDivisionError("a secret")

    monkeypatch.setattr(engine.tokenizer, "encode", broken)
    contextvars = structlog.contextvars.merge_contextvars
    with structlog.testing.capture_logs(processors=[contextvars]) as lines:
        response = await client.post(
            "/v1/completions", json={"prompt": "a"}, headers={"x-request-id": "mine"}
        )
    assert response.status_code == 500
    assert response.headers["x-request-id"] == "mine"
    error = response.json()["error"]
    assert error["code"] == "internal_error"
    assert "request mine;" in error["message"]
    assert "secret" not in response.text
    failed = next(line for line in lines if line["event"] == "request_failed")
    assert failed["request_id"] == "mine"
    assert failed["exc_info"]


async def test_one_log_line_per_request(client: httpx.AsyncClient) -> None:
    with structlog.testing.capture_logs() as lines:
        await client.post("/v1/completions", json={"prompt": "abc", "max_tokens": 5})
        body = {"prompt": "abc", "max_tokens": 6, "stream": True, "n": 2}
        await client.post("/v1/completions", json=body)
        await client.get("/v1/models/toy/one")
        await client.get("/secret-path")
        await client.get("/live")
    told = [line for line in lines if line["event"] == "request"]
    keys = ("method", "route", "status", "prompt_tokens", "completion_tokens", "log_level")
    assert [tuple(line[key] for key in keys) for line in told] == [
        ("POST", "/v1/completions", 200, 4, 5, "info"),
        ("POST", "/v1/completions", 200, 4, 12, "info"),
        ("GET", "/v1/models/{model_id:path}", 200, 0, 0, "info"),
        ("GET", "unknown", 404, 0, 0, "info"),
        ("GET", "/live", 200, 0, 0, "debug"),
    ]
    assert all(line["seconds"] >= 0 for line in told)


async def test_ignored_fields_are_logged_once_and_boundedly(client: httpx.AsyncClient) -> None:
    with structlog.testing.capture_logs() as lines:
        for _ in range(2):
            await client.post("/v1/completions", json={"prompt": "a", "odd": 1, "user": "x"})
        many = {f"name{i}": 1 for i in range(500)}
        await client.post("/v1/completions", json={"prompt": "a"} | many)
    names = [line["field"] for line in lines if line["event"] == "ignored_field"]
    assert names[:2] == ["odd", "user"]
    assert len(names) == len(set(names)) == 100


async def read_metrics(client: httpx.AsyncClient) -> dict[str, float]:
    response = await client.get("/metrics")
    assert response.headers["content-type"].startswith("text/plain")
    return {
        sample.name + "".join(f"{{{v}}}" for v in sample.labels.values()): sample.value
        for family in text_string_to_metric_families(response.text)
        for sample in family.samples
    }


async def test_metrics(client: httpx.AsyncClient, engine: FakeEngine) -> None:
    await client.post("/v1/completions", json={"prompt": "abc", "max_tokens": 5, "n": 2})
    metrics = await read_metrics(client)
    expected = {
        "num_requests_running": 0,
        "num_requests_waiting": 2,
        "num_preemptions_total": 4,
        "prompt_tokens_total": 5,
        "generation_tokens_total": 6,
        "kv_cache_usage_perc": 0.25,
        "engine_up": 1,
        "request_success_total{length}": 2,
        "time_to_first_token_seconds_count": 2,
        "inter_token_latency_seconds_count": 8,
        "request_time_per_output_token_seconds_count": 2,
        "request_decode_time_seconds_count": 2,
        "e2e_request_latency_seconds_count": 2,
        "engine_steps_total": engine.n_steps,
        "step_seconds_count": engine.n_steps,
        "step_seconds_sum": engine.n_steps * 0.5,
        "step_sub_batches_sum": engine.n_steps * 2,
        "iteration_tokens_total_sum": engine.n_steps * 30,
        "stall_seconds_total": engine.n_steps * 0.25,
        "host_to_device_bytes_total{weights}": engine.n_steps * 1000,
        "host_to_device_bytes_total{kv}": engine.n_steps * 100,
        "device_to_host_bytes_total{kv}": engine.n_steps * 50,
        "http_requests_total{/v1/completions}{200}": 1,
    }
    assert {name: metrics["sl_serve_" + name] for name in expected} == expected
    assert metrics["sl_serve_step_rows_sum"] >= 10


async def test_apps_have_their_own_metrics(make_client: MakeClient) -> None:
    one, other = make_client(), make_client()
    await one.post("/v1/completions", json={"prompt": "abc", "max_tokens": 1})
    name = "sl_serve_e2e_request_latency_seconds_count"
    assert (await read_metrics(one))[name] == 1
    assert (await read_metrics(other))[name] == 0


async def test_version(client: httpx.AsyncClient) -> None:
    assert (await client.get("/version")).json().keys() == {"version"}


async def test_openapi_describes_the_bodies(client: httpx.AsyncClient) -> None:
    schema = (await client.get("/openapi.json")).json()
    known = schema["components"]["schemas"]
    for path, kind in (
        ("/v1/completions", CompletionBody),
        ("/v1/chat/completions", ChatBody),
        ("/tokenize", TokenizeBody),
        ("/detokenize", DetokenizeBody),
    ):
        content = schema["paths"][path]["post"]["requestBody"]["content"]
        reference = content["application/json"]["schema"]["$ref"]
        assert reference == f"#/components/schemas/{kind.__name__}"
        assert known[kind.__name__]["properties"].keys() == kind.model_fields.keys()
    references = [
        part.split('"')[0].removeprefix("#/components/schemas/")
        for part in orjson.dumps(schema).decode().split('"$ref":"')[1:]
    ]
    assert set(references) <= known.keys()
    assert "://" not in orjson.dumps(schema["paths"]).decode()


@pytest.mark.parametrize(
    ("path", "kind", "required"),
    [
        ("/v1/completions", CompletionBody, {"prompt": "a"}),
        ("/v1/chat/completions", ChatBody, {"messages": [{"role": "user", "content": "a"}]}),
        ("/tokenize", TokenizeBody, {"prompt": "a"}),
        ("/detokenize", DetokenizeBody, {"tokens": [97]}),
    ],
)
async def test_null_is_the_default_for_every_optional_field(
    client: httpx.AsyncClient, path: str, kind: Any, required: dict[str, Any]
) -> None:
    optional = [name for name, info in kind.model_fields.items() if not info.is_required()]
    optional = [name for name in optional if name not in required]
    assert optional
    limit = {"max_tokens": 2, "seed": 1} if path.startswith("/v1") else {}

    async def ask(body: dict[str, Any]) -> dict[str, Any]:
        response = await client.post(path, json=body)
        assert response.status_code == 200, (body, response.text)
        return response.json() | {"id": None, "created": None}

    plain = await ask(required | limit)
    for name in optional:
        if name not in limit:
            assert await ask(required | limit | {name: None}) == plain, name
    await ask(required | dict.fromkeys(optional) | limit)
