from __future__ import annotations

from pathlib import Path

import pytest

from tests.models import TINY_MODELS


@pytest.fixture(scope="module", params=TINY_MODELS)
def folder(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A tiny model of each family; modules that want another define their own."""
    folder = tmp_path_factory.mktemp(request.param)
    TINY_MODELS[request.param](folder)
    return folder
