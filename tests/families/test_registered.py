"""No family without its tests."""

from __future__ import annotations

import importlib
from pathlib import Path

import pytest

from sl_serve.models import supported_families
from tests.families.harness import Tiny

FILES = {path.stem.removeprefix("test_"): path for path in Path(__file__).parent.glob("test_*.py")}


@pytest.mark.parametrize("family", supported_families())
def test_a_family_has_tests_of_its_own(family: str) -> None:
    assert family in FILES, f"tests/families/test_{family}.py is missing"
    module = importlib.import_module(f"tests.families.test_{family}")
    tiny = module.TINY
    assert isinstance(tiny, Tiny) and tiny.family == family
