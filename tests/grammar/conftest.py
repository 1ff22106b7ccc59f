from __future__ import annotations

from collections.abc import Iterator

import pytest

from sl_serve.grammar.compiler import Grammars
from tests.grammar.walking import VOCABULARY


@pytest.fixture(scope="package")
def grammars() -> Iterator[Grammars]:
    grammars = Grammars(lambda: VOCABULARY, max_compile_s=2.0)
    yield grammars
    grammars.close()
