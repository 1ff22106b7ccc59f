from __future__ import annotations

import asyncio
import threading
from collections.abc import AsyncIterator, Callable, Iterator
from contextlib import contextmanager
from dataclasses import replace

import httpx
import pytest
from fastapi import FastAPI

from server.app import create_app
from server.run import DrainingServer, bind, build_server
from server.settings import ServerSettings
from sl_serve.grammar.compiler import Grammars
from sl_serve.grammar.vocabulary import vocabulary_of
from tests.server.fake_engine import VOCAB, FakeEngine, ToyTokenizer

MODEL = "toy/one"
SETTINGS = ServerSettings(served_model_names=(MODEL, "alias"))

MakeClient = Callable[..., httpx.AsyncClient]


@pytest.fixture
def engine() -> Iterator[FakeEngine]:
    engine = FakeEngine()
    yield engine
    engine.gate.set()
    engine.close()


@pytest.fixture
async def make_client(engine: FakeEngine) -> AsyncIterator[MakeClient]:
    """An in-process client of an app with the given settings."""
    clients: list[httpx.AsyncClient] = []
    apps: list[FastAPI] = []

    def make(**changes: object) -> httpx.AsyncClient:
        app = create_app(engine, replace(SETTINGS, **changes))
        apps.append(app)
        transport = httpx.ASGITransport(app)
        clients.append(httpx.AsyncClient(transport=transport, base_url="http://localhost"))
        clients[-1].app = app  # type: ignore[attr-defined]
        return clients[-1]

    yield make
    for client in clients:
        await client.aclose()
    for app in apps:
        app.state.context.close()


@pytest.fixture
def client(make_client: MakeClient) -> httpx.AsyncClient:
    return make_client()


class LastingGrammars(Grammars):
    """For many apps, none of which ends its process."""

    def close(self) -> None:
        pass

    def end(self) -> None:
        super().close()


@pytest.fixture(scope="session")
def toy_grammars() -> Iterator[Grammars]:
    """For the toy tokenizer; its first grammar starts a process, which takes seconds."""
    grammars = LastingGrammars(lambda: vocabulary_of(ToyTokenizer(), VOCAB))
    yield grammars
    grammars.end()


class LiveServer:
    """A real server on a port of the system's choice, on a thread of its own."""

    def __init__(
        self, engine: FakeEngine, settings: ServerSettings, grammars: Grammars | None = None
    ) -> None:
        self.app = create_app(engine, settings)
        if grammars is not None:
            self.app.state.context.grammars = grammars
        self._ready = threading.Event()
        self.listener = bind("127.0.0.1", 0)
        self.port: int = self.listener.getsockname()[1]
        self.url = f"http://127.0.0.1:{self.port}"
        self.server: DrainingServer = build_server(self.app, self._on_ready)
        self._thread = threading.Thread(target=self.server.run, args=([self.listener],))

    def __enter__(self) -> LiveServer:
        self._thread.start()
        assert self._ready.wait(10)
        return self

    def __exit__(self, *_: object) -> None:
        self.stop()
        self._thread.join(30)
        self.app.state.context.close()
        assert not self._thread.is_alive()

    def stop(self) -> None:
        if not self._loop.is_closed():
            self._loop.call_soon_threadsafe(self.server.stop)

    def _on_ready(self, url: str) -> None:
        assert url == self.url
        self._loop = asyncio.get_running_loop()
        self._ready.set()


@pytest.fixture
def live(engine: FakeEngine) -> Iterator[LiveServer]:
    with LiveServer(engine, SETTINGS) as server:
        yield server
        engine.gate.set()


@pytest.fixture
def start_live(engine: FakeEngine) -> Callable[..., object]:
    """`with start_live(ping_s=...) as server:` for a live server with other settings."""

    @contextmanager
    def start(**changes: object) -> Iterator[LiveServer]:
        with LiveServer(engine, replace(SETTINGS, **changes)) as server:
            yield server

    return start
