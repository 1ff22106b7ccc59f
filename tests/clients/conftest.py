from __future__ import annotations

import pytest
from fake_api import FakeServer


@pytest.fixture
def fake_server() -> FakeServer:
    return FakeServer()


@pytest.fixture(autouse=True)
def _no_environment(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("SL_SERVE_URL", raising=False)
    monkeypatch.delenv("SL_SERVE_API_KEY", raising=False)


@pytest.fixture
def sleeps(monkeypatch: pytest.MonkeyPatch) -> list[float]:
    """Pauses the clients asked for; none is slept."""
    asked: list[float] = []

    async def sleep(seconds: float) -> None:
        asked.append(seconds)

    monkeypatch.setattr("clients.client.time.sleep", asked.append)
    monkeypatch.setattr("clients.async_client.asyncio.sleep", sleep)
    return asked
