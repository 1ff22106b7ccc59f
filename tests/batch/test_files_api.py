"""/v1/files over HTTP: what OpenAI's package needs, and what hostile clients get."""

from __future__ import annotations

import io
import random
import socket
from collections.abc import Iterator
from pathlib import Path

import httpx
import openai
import pytest

from server.batch import files as files_module
from server.batch.files import DEFAULT_EXPIRY_S
from server.files_routes import MAX_UPLOADS, Uploads
from server.uploads import UploadForm
from sl_serve.errors import RequestError
from tests.batch.jobs import HOUR_S, wait_for
from tests.server.conftest import LiveServer

DATA = b'{"custom_id": "a"}\n' * 1000


@pytest.fixture
def sdk(live: LiveServer) -> Iterator[openai.OpenAI]:
    with openai.OpenAI(base_url=live.url + "/v1", api_key="none", max_retries=0) as sdk:
        yield sdk


def form(boundary: bytes, *parts: tuple[str, bytes]) -> bytes:
    body = b""
    for disposition, data in parts:
        head = f"Content-Disposition: form-data; {disposition}\r\n\r\n".encode()
        body += b"--" + boundary + b"\r\n" + head + data + b"\r\n"
    return body + b"--" + boundary + b"--\r\n"


def test_the_life_of_a_file(sdk: openai.OpenAI) -> None:
    file = sdk.files.create(file=("in.jsonl", io.BytesIO(DATA)), purpose="batch")
    assert (file.bytes, file.filename, file.purpose) == (len(DATA), "in.jsonl", "batch")
    assert file.status == "processed"
    assert file.expires_at == file.created_at + DEFAULT_EXPIRY_S
    assert sdk.files.retrieve(file.id) == file
    assert sdk.files.content(file.id).read() == DATA
    gone = sdk.files.delete(file.id)
    assert (gone.id, gone.deleted) == (file.id, True)
    for look in (sdk.files.retrieve, sdk.files.content, sdk.files.delete):
        with pytest.raises(openai.NotFoundError) as missing:
            look(file.id)
        assert missing.value.code == "file_not_found"


def test_lists_have_pages_orders_and_purposes(sdk: openai.OpenAI) -> None:
    ids = [sdk.files.create(file=(f"{i}.jsonl", b"x"), purpose="batch").id for i in range(5)]
    assert [f.id for f in sdk.files.list()] == ids[::-1]
    assert [f.id for f in sdk.files.list(order="asc", limit=2)] == ids  # page after page
    page = sdk.files.list(limit=2, after=ids[3])
    assert [f.id for f in page.data] == [ids[2], ids[1]]
    assert page.has_more
    assert not sdk.files.list(purpose="batch_output").data
    for wrong in ({"limit": 0}, {"limit": 10_001}, {"order": "up"}):
        with pytest.raises(openai.BadRequestError):
            sdk.files.list(**wrong)  # type: ignore[arg-type]


def test_expiry_is_the_clients_choice(sdk: openai.OpenAI) -> None:
    expires = {"anchor": "created_at", "seconds": 2 * HOUR_S}
    file = sdk.files.create(file=("a", b"x"), purpose="batch", expires_after=expires)  # type: ignore[arg-type]
    assert file.expires_at == file.created_at + 2 * HOUR_S
    with pytest.raises(openai.BadRequestError, match="from 3600 to"):
        sdk.files.create(
            file=("a", b"x"),
            purpose="batch",
            expires_after={"anchor": "created_at", "seconds": 5},
        )


def test_a_body_without_length_is_read_as_it_comes(live: LiveServer) -> None:
    body = form(b"B", ('name="purpose"', b"batch"), ('name="file"; filename="f"', DATA))
    pieces = (body[i : i + 700] for i in range(0, len(body), 700))
    headers = {"content-type": "multipart/form-data; boundary=B"}
    answer = httpx.post(live.url + "/v1/files", content=pieces, headers=headers)
    assert answer.status_code == 200, answer.text
    content = httpx.get(f"{live.url}/v1/files/{answer.json()['id']}/content")
    assert content.content == DATA


@pytest.mark.parametrize("declared", [True, False])
def test_too_large_is_refused_and_nothing_stays(
    live: LiveServer, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, declared: bool
) -> None:
    monkeypatch.setattr("server.files_routes.MAX_INPUT_BYTES", 10_000)
    body = form(b"B", ('name="purpose"', b"batch"), ('name="file"; filename="f"', DATA))
    content = body if declared else iter([body[:9000], body[9000:]])
    headers = {"content-type": "multipart/form-data; boundary=B"}
    answer = httpx.post(live.url + "/v1/files", content=content, headers=headers)
    assert answer.status_code == 413
    assert answer.json()["error"]["message"] == (
        "The file is over the limit of 10,000 bytes; split it."
    )
    assert list((tmp_path / "jobs" / "files").iterdir()) == []


@pytest.mark.parametrize(
    ("content_type", "body", "complaint"),
    [
        ("application/json", b"{}", "should be a form"),
        ("multipart/form-data", b"", "with a boundary"),
        ("multipart/form-data; boundary=B", b"nonsense", "not a valid form"),
        ("multipart/form-data; boundary=B", b"--B\r\n", "ends before its last boundary"),
        ("multipart/form-data; boundary=B", form(b"B", ('name="purpose"', b"batch")), "'file' is"),
        (
            "multipart/form-data; boundary=B",
            form(b"B", ('name="file"; filename="f"', b"x"))[:-4],
            "ends before its last boundary",
        ),
        (
            "multipart/form-data; boundary=B",
            form(b"B", ('name="file"; filename="f"', b"x"), ('name="purpose"', b"fine-tune")),
            "'purpose' should be 'batch'",
        ),
        (
            "multipart/form-data; boundary=B",
            form(b"B", ('name="file"; filename="f"', b"x"), ('name="file"; filename="g"', b"y")),
            "two fields named 'file'",
        ),
        (
            "multipart/form-data; boundary=B",
            form(b"B", ('name="purpose"', b"b" * 5000)),
            "more than 4096 bytes",
        ),
        (
            "multipart/form-data; boundary=B",
            form(b"B", *[(f'name="f{i}"', b"") for i in range(30)]),
            "more than 20 fields",
        ),
    ],
)
def test_forms_that_are_none(
    live: LiveServer, tmp_path: Path, content_type: str, body: bytes, complaint: str
) -> None:
    headers = {"content-type": content_type}
    answer = httpx.post(live.url + "/v1/files", content=body, headers=headers)
    assert answer.status_code == 400
    assert complaint in answer.json()["error"]["message"]
    assert list((tmp_path / "jobs" / "files").iterdir()) == []


def test_damaged_forms_are_read_or_refused() -> None:
    """The parser sees every prefix and many damages, in pieces of any size."""
    whole = form(b"B", ('name="purpose"', b"batch"), ('name="file"; filename="f"', b"1\r\n--B2"))
    rng = random.Random(0)
    n_refused = 0
    for _ in range(1000):
        body = bytearray(whole[: rng.randrange(len(whole) + 1)])
        for _ in range(rng.randrange(4)):
            if body:
                body[rng.randrange(len(body))] = rng.randrange(256)
        parsed = UploadForm("multipart/form-data; boundary=B")
        size = rng.randrange(1, 40)
        try:
            for i in range(0, len(body), size):
                parsed.feed(bytes(body[i : i + size]))
            parsed.finish()
        except RequestError:
            n_refused += 1
    assert 500 < n_refused < 1000


def test_a_client_that_hangs_up_leaves_nothing(live: LiveServer, tmp_path: Path) -> None:
    folder = tmp_path / "jobs" / "files"
    body = form(b"B", ('name="file"; filename="f"', DATA))
    head = (
        f"POST /v1/files HTTP/1.1\r\nHost: localhost\r\nContent-Length: {len(body)}\r\n"
        "Content-Type: multipart/form-data; boundary=B\r\n\r\n"
    )
    with socket.create_connection(("127.0.0.1", live.port)) as connection:
        connection.sendall(head.encode() + body[:5000])
        wait_for(lambda: list(folder.iterdir()))
    wait_for(lambda: not list(folder.iterdir()))


NAMES = [
    "../../etc/passwd",
    "..%2f..%2fx",
    "a/b",
    "\x00",
    "file-" + "0" * 32,
    "C:\\x",
    "ü",
    "." * 300,
]


def test_names_and_ids_lead_nowhere_else(live: LiveServer, tmp_path: Path) -> None:
    """Paths that a client sends are looked up, never opened."""
    secret = tmp_path / "secret"
    secret.write_text("secret")
    rng = random.Random(1)
    with httpx.Client(base_url=live.url) as client:
        for i in range(300):
            wild = "".join(
                rng.choice(["..", "/", "%2e", "%2F", "\\", "a", "~", ":", "%00"]) for _ in range(8)
            )
            name = NAMES[i] if i < len(NAMES) else wild
            for path in (f"/v1/files/{name}", f"/v1/files/{name}/content", f"/v1/batches/{name}"):
                try:
                    answer = client.get(path)
                except (httpx.InvalidURL, UnicodeEncodeError):
                    continue
                assert answer.status_code in (400, 404) or answer.url.path.rstrip("/") in (
                    "/v1/files",
                    "/v1/batches",
                ), (path, answer.text)
                assert "secret" not in answer.text
        for name in NAMES:
            shown = name.replace("\x00", "").encode("latin-1", "replace")
            body = form(b"B", ('name="purpose"', b"batch")).removesuffix(b"--B--\r\n")
            body += b'--B\r\nContent-Disposition: form-data; name="file"; filename="' + shown
            body += b'"\r\n\r\nx\r\n--B--\r\n'
            headers = {"content-type": "multipart/form-data; boundary=B"}
            assert client.post("/v1/files", content=body, headers=headers).status_code == 200
    stored = sorted(path.name for path in (tmp_path / "jobs" / "files").iterdir())
    assert len(stored) == len(NAMES)
    assert all(len(name) == 70 and name.endswith(".jsonl") for name in stored)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["jobs", "secret"]


async def test_few_uploads_at_a_time(live: LiveServer, monkeypatch: pytest.MonkeyPatch) -> None:
    uploads = Uploads(live.app.state.context)
    monkeypatch.setattr(uploads, "_n_running", MAX_UPLOADS)
    with pytest.raises(Exception, match="8 uploads are under way") as refused:
        await uploads.receive(None)  # type: ignore[arg-type]
    assert refused.value.status == 503  # type: ignore[attr-defined]


def test_the_schema_tells_of_files_and_batches(live: LiveServer) -> None:
    schema = httpx.get(live.url + "/openapi.json").json()
    assert {"/v1/files", "/v1/files/{file_id}/content", "/v1/batches"} <= schema["paths"].keys()
    assert "BatchBody" in schema["components"]["schemas"]
    assert files_module.INPUT_PURPOSE in str(schema["paths"]["/v1/files"]["post"])
