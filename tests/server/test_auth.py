"""Every route but four needs a key, whatever the spelling; generated from the app's own routes."""

from __future__ import annotations

import re
import socket
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any
from urllib.parse import unquote

import httpx
import pytest
from fastapi import FastAPI

from server.app import create_app
from server.auth import PUBLIC_PATHS
from server.page_routes import PAGE
from tests.server.conftest import SETTINGS, MakeClient
from tests.server.fake_engine import FakeEngine

KEYS = ("first-key", "zweiter-schlüssel")
METHODS = ("GET", "POST", "HEAD", "OPTIONS", "PUT", "PATCH", "DELETE")


def routed_paths(app: FastAPI) -> set[str]:
    """Every path of every route, with its parameters filled in."""
    paths = {context.path for route in app.routes for context in route_contexts(route)}
    return {filled_in(path) for path in paths}


def filled_in(path: str) -> str:
    return re.sub(r"\{[^}]*\}", "toy/one", path)


def route_contexts(route: Any) -> Iterator[Any]:
    """Included routers are routes that hold others."""
    if hasattr(route, "path"):
        yield route
    for inner in getattr(route, "effective_route_contexts", tuple)():
        yield from route_contexts(inner)


def spellings(path: str) -> Iterator[str]:
    """Ways to write a path that some proxy or router takes for the same, or for a public one."""
    yield path
    yield "/" + path  # //v1
    yield path + "/"
    yield path + "//"
    yield path.upper()
    yield path.replace("/", "/./")
    yield "/live/.." + path
    yield "/live/%2e%2e" + path
    yield "/live%2f..%2f" + path.lstrip("/")
    yield path.replace("/", "%2f")
    yield path + "?/live"
    yield path + ";/live"
    yield path + "%00/live"
    yield path + "%20"
    yield path.lstrip("/")


async def raw_status(
    app: FastAPI, method: str, target: str, headers: tuple[tuple[bytes, bytes], ...] = ()
) -> int:
    """The status for a request target as it is, which clients would tidy up before sending."""
    raw_path, _, query = target.partition("?")
    scope = {
        "type": "http",
        "asgi": {"version": "3.0", "spec_version": "2.3"},
        "http_version": "1.1",
        "method": method,
        "scheme": "http",
        "root_path": "",
        "path": unquote(raw_path),
        "raw_path": raw_path.encode(),
        "query_string": query.encode(),
        "headers": [(b"host", b"localhost"), *headers],
        "client": ("127.0.0.1", 1),
        "server": ("127.0.0.1", 8000),
    }
    sent: list[Any] = []

    async def receive() -> dict[str, Any]:
        return {"type": "http.request", "body": b"", "more_body": False}

    async def send(message: Any) -> None:
        sent.append(message)

    await app(scope, receive, send)
    assert b"x-request-id" in dict(sent[0]["headers"])
    return int(sent[0]["status"])


@pytest.fixture
def locked(engine: FakeEngine, tmp_path: Path) -> Iterator[FastAPI]:
    """With all there is to be protected."""
    app = create_app(engine, replace(SETTINGS, api_keys=KEYS, jobs_dir=tmp_path))
    yield app
    app.state.context.close()


async def test_without_a_key_nothing_but_health(locked: FastAPI, engine: FakeEngine) -> None:
    paths = routed_paths(locked)
    described = {filled_in(path) for path in locked.openapi()["paths"]}
    assert paths == described | {"/openapi.json"} | PAGE.keys()
    assert len(paths) == 23 + len(PAGE)
    assert "/status" in paths - PUBLIC_PATHS
    for path in paths - PUBLIC_PATHS:
        for spelling in spellings(path):
            for method in METHODS:
                assert await raw_status(locked, method, spelling) == 401, (method, spelling)
    assert engine.submitted == []


async def test_public_paths_only_in_their_exact_spelling(locked: FastAPI) -> None:
    for path in PUBLIC_PATHS:
        for method, status in (("GET", 200), ("HEAD", 200), ("OPTIONS", 405), ("POST", 405)):
            assert await raw_status(locked, method, path) == status
        for spelling in set(spellings(path)) - {path, path + "?/live", path.replace("/", "%2f")}:
            assert await raw_status(locked, "GET", spelling) == 401, spelling


async def test_with_a_key_the_odd_spellings_lead_nowhere(locked: FastAPI) -> None:
    key = ((b"x-api-key", b"first-key"),)
    assert await raw_status(locked, "GET", "/v1/models", key) == 200
    for spelling in set(spellings("/v1/models")) - {"/v1/models", "/v1/models?/live"}:
        status = await raw_status(locked, "GET", spelling, key)
        assert status == (200 if unquote(spelling) == "/v1/models" else 404), spelling


async def test_refusal_has_the_error_shape(make_client: MakeClient) -> None:
    response = await make_client(api_keys=KEYS).get("/v1/models")
    assert response.status_code == 401
    assert response.headers["www-authenticate"] == "Bearer"
    error = response.json()["error"]
    assert error.keys() == {"message", "type", "param", "code"}
    assert (error["type"], error["code"]) == ("authentication_error", "invalid_api_key")


@pytest.mark.parametrize(
    "host",
    [b"localhost", b"evil.example", b"localhost/live", b"x?/live", b"x/live#", b"", b"/live"],
)
async def test_host_header_changes_nothing(locked: FastAPI, host: bytes) -> None:
    headers = ((b"host", host), (b"x-forwarded-host", host), (b"x-original-url", b"/live"))
    for path in routed_paths(locked) - PUBLIC_PATHS:
        for method in METHODS:
            assert await raw_status(locked, method, path, headers) == 401, (method, path)


@pytest.mark.parametrize(
    "line",
    [
        b"GET http://localhost/v1/models HTTP/1.1",
        b"GET http://localhost/live/../v1/models HTTP/1.1",
        b"GET //localhost/live/../v1/models HTTP/1.1",
        b"GET /live/%2e%2e/v1/models HTTP/1.1",
        b"GET /live/..;/v1/models HTTP/1.1",
        b"GET /v1/models?path=/live HTTP/1.1",
        b"GET /v1/models#/live HTTP/1.1",
        b"GET \\live HTTP/1.1",
        b"GET /live%00 HTTP/1.1",
        b"GET /v1/models HTTP/1.0",
        b"get /v1/models HTTP/1.1",
        b"OPTIONS * HTTP/1.1",
        b"CONNECT localhost:80 HTTP/1.1",
        b"TRACE /v1/models HTTP/1.1",
        b"POST /v1/completions HTTP/1.1\r\nX-HTTP-Method-Override: GET",
        b"GET /v1/models HTTP/1.1\r\nConnection: Upgrade\r\nUpgrade: websocket",
        b"GET /v1/models HTTP/1.1\r\nConnection: Upgrade, HTTP2-Settings\r\nUpgrade: h2c",
    ],
)
def test_request_lines_as_they_are_on_the_wire(start_live: Any, line: bytes) -> None:
    """Through the parser too: no spelling is answered without a key."""
    with (
        start_live(api_keys=KEYS) as live,
        socket.create_connection(("127.0.0.1", live.port), timeout=10) as connection,
    ):
        connection.sendall(line + b"\r\nHost: localhost\r\nConnection: close\r\n\r\n")
        said = connection.recv(65536)
    status = int(said.split()[1])
    assert status in (400, 401), said[:200]
    assert b"toy/one" not in said


@pytest.mark.parametrize(
    "headers",
    [
        {"authorization": "Bearer first-key"},
        {"authorization": "bearer first-key"},
        {"authorization": "Bearer   first-key "},
        {"x-api-key": "first-key"},
        {"x-api-key": "first-key", "authorization": "Basic abc"},
        {b"authorization": "Bearer zweiter-schlüssel".encode()},
    ],
)
async def test_a_known_key_opens(make_client: MakeClient, headers: dict[str, str]) -> None:
    client = make_client(api_keys=KEYS)
    assert (await client.get("/v1/models", headers=headers)).status_code == 200


@pytest.mark.parametrize(
    "headers",
    [
        {"authorization": "Bearer FIRST-KEY"},
        {"authorization": "Bearer first-key2"},
        {"authorization": "Bearer first-ke"},
        {"authorization": "Bearer "},
        {"authorization": "Bearer"},
        {"authorization": "first-key"},
        {"authorization": "Basic first-key"},
        {"x-api-key": ""},
        {"x-api-key": "first-key,zweiter"},
        {"cookie": "api_key=first-key"},
    ],
)
async def test_anything_else_does_not(make_client: MakeClient, headers: dict[str, str]) -> None:
    client = make_client(api_keys=KEYS)
    assert (await client.get("/v1/models", headers=headers)).status_code == 401


@pytest.mark.parametrize(
    ("host", "status"),
    [
        ("localhost", 200),
        ("LOCALHOST:8000", 200),
        ("127.0.0.1:1", 200),
        ("[::1]:8000", 200),
        ("friend.local", 200),
        ("evil.example", 403),
        ("localhost.evil.example", 403),
        ("127.0.0.1.evil.example:8000", 403),
        ("", 403),
        ("localhost@evil.example", 403),
        ("[evil]", 403),
    ],
)
async def test_foreign_host_names_on_loopback(
    make_client: MakeClient, host: str, status: int
) -> None:
    client = make_client(allowed_hosts=("Friend.local",))
    response = await client.get("/v1/models", headers={"host": host})
    assert response.status_code == status
    if status == 403:
        assert response.json()["error"]["code"] == "host_not_allowed"


@pytest.mark.parametrize(
    ("origin", "status"),
    [
        ("http://localhost:3000", 200),
        ("http://[::1]:3000", 200),
        ("https://ui.example", 200),
        ("https://evil.example", 403),
        ("http://ui.example", 403),
        ("null", 403),
        ("http://[", 403),
    ],
)
async def test_foreign_origins_on_loopback(
    make_client: MakeClient, engine: FakeEngine, origin: str, status: int
) -> None:
    client = make_client(cors_origins=("https://ui.example",))
    headers = {"origin": origin, "content-type": "text/plain"}
    body = b'{"prompt": "a", "max_tokens": 1}'
    response = await client.post("/v1/completions", content=body, headers=headers)
    assert response.status_code == status
    assert len(engine.submitted) == (status == 200)


async def test_no_host_check_where_keys_or_the_network_are_meant(make_client: MakeClient) -> None:
    headers = {"host": "evil.example", "authorization": "Bearer first-key"}
    for client in (make_client(api_keys=KEYS), make_client(host="0.0.0.0")):
        assert (await client.get("/v1/models", headers=headers)).status_code == 200


async def test_cors_is_off_unless_asked_for(make_client: MakeClient) -> None:
    preflight = {"origin": "https://ui.example", "access-control-request-method": "POST"}
    silent = await make_client().options("/v1/completions", headers=preflight)
    assert "access-control-allow-origin" not in silent.headers
    client = make_client(cors_origins=("https://ui.example",), api_keys=KEYS)
    allowed = await client.options("/v1/completions", headers=preflight)
    assert allowed.status_code == 200
    assert allowed.headers["access-control-allow-origin"] == "https://ui.example"
    refused = await client.get("/v1/models", headers={"origin": "https://ui.example"})
    assert refused.status_code == 401
    assert refused.headers["access-control-allow-origin"] == "https://ui.example"


@pytest.mark.parametrize(
    ("offered", "kept"),
    [
        ("abc-1.2_Z", True),
        ("a" * 128, True),
        ("a" * 129, False),
        ("", False),
        ("a b", False),
        ("a;b", False),
        ("é", False),
    ],
)
async def test_request_id(client: httpx.AsyncClient, offered: str, kept: bool) -> None:
    headers = {"x-request-id": offered.encode()}
    for path in ("/live", "/v1/models", "/nothing"):
        told = (await client.get(path, headers=headers)).headers["x-request-id"]
        assert (told == offered) is kept
        assert told
