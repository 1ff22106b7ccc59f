from __future__ import annotations

from pathlib import Path

import pytest

from sl_serve.weights.locate import resolve_model


@pytest.fixture(scope="session")
def smollm2_path() -> Path:
    return resolve_model("smollm2")
