from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import pytest

from server.settings import ServerSettings
from tests.batch.jobs import Jobs
from tests.server.conftest import LiveServer, engine, toy_grammars
from tests.server.fake_engine import FakeEngine

__all__ = ["engine", "toy_grammars"]


@pytest.fixture
def jobs(engine: FakeEngine, tmp_path: Path) -> Iterator[Jobs]:
    """A service without HTTP."""
    with Jobs(engine, tmp_path / "jobs") as jobs:
        yield jobs


@pytest.fixture
def live(engine: FakeEngine, tmp_path: Path) -> Iterator[LiveServer]:
    settings = ServerSettings(served_model_names=("toy",), jobs_dir=tmp_path / "jobs")
    with LiveServer(engine, settings) as server:
        yield server
        engine.gate.set()
