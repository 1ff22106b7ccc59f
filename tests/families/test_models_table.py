from __future__ import annotations

from sl_serve.models import supported_families
from tests.families.models_table import pages


def test_the_pages_have_what_the_command_writes() -> None:
    for path, text in pages().items():
        assert path.read_text(encoding="utf-8") == text, "run scripts/models-table"


def test_every_family_has_a_line() -> None:
    text = next(iter(pages().values()))
    assert all(f"| `{family}` |" in text for family in supported_families())
