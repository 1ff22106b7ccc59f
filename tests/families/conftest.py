from __future__ import annotations

import pytest

from tests.families.harness import FamilyTests


def pytest_generate_tests(metafunc: pytest.Metafunc) -> None:
    cls = metafunc.cls
    if cls is None or not issubclass(cls, FamilyTests):
        return
    if "variant" in metafunc.fixturenames:
        metafunc.parametrize("variant", cls.tiny.names, ids=lambda name: name or "plain")
    if "short_weights" in metafunc.fixturenames:
        metafunc.parametrize("short_weights", ["int8", "int4"])
