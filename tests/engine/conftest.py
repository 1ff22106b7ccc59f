from __future__ import annotations

from collections.abc import Iterator
from functools import cache
from pathlib import Path

import pytest

from sl_serve.config import EngineConfig, ModelConfig
from sl_serve.plan.block_memory import BlockMemory, block_memory
from tests.models import TINY_MODELS


@pytest.fixture(scope="module", params=TINY_MODELS)
def folder(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A tiny model of each family; modules that want another define their own."""
    folder = tmp_path_factory.mktemp(request.param)
    TINY_MODELS[request.param](folder)
    return folder


@pytest.fixture(scope="module")
def layers_measured_once() -> Iterator[None]:
    """For each model and kind of operations: for tests that plan a thousand times."""
    found = cache(lambda model, **settings: block_memory(model, EngineConfig(**settings)))

    def measured(model: ModelConfig, config: EngineConfig) -> BlockMemory:
        of_it = found(
            model,
            device=config.device,
            native=config.native,
            dtype=config.dtype,
            activations=config.activations,
        )
        assert isinstance(of_it, BlockMemory)
        return of_it

    with pytest.MonkeyPatch.context() as patched:
        patched.setattr("sl_serve.plan.fit.block_memory", measured)
        yield
