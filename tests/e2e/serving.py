"""A real server over a real engine on a tiny model, in this process."""

from __future__ import annotations

import logging
import tempfile
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

import structlog

from server.settings import ServerSettings
from sl_serve.config import EngineConfig
from sl_serve.engine import Engine
from sl_serve.loader import Parts
from tests.engine.running import config, engine
from tests.models import write_tiny_llama
from tests.server.conftest import LiveServer

SETTINGS = ServerSettings(served_model_names=("tiny",))
MIXED = config(max_rows=16, n_sub_batches=2, prefill_chunk_tokens=64)


@contextmanager
def serving(
    folder: Path, settings: EngineConfig = MIXED, change: Callable[[Parts], None] = lambda _: None
) -> Iterator[tuple[LiveServer, Engine]]:
    with engine(folder, settings, change=change) as running, LiveServer(running, SETTINGS) as live:
        yield live, running


def quiet() -> None:
    """For proofs: their server says nothing that is not serious."""
    structlog.configure(wrapper_class=structlog.make_filtering_bound_logger(logging.CRITICAL))
    logging.disable(logging.ERROR)


@contextmanager
def tiny_folder() -> Iterator[Path]:
    """For proofs, which have no fixtures."""
    quiet()
    with tempfile.TemporaryDirectory() as folder:
        write_tiny_llama(Path(folder))
        yield Path(folder)
