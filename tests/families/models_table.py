"""Writes what docs/models.md and docs/adding-a-model.md have from the families' files and tests."""

from __future__ import annotations

import importlib
from pathlib import Path

from sl_serve.models import load_family, supported_families
from tests.families.test_generic import MODELS, TestHelium
from tests.families.test_gguf import CASES

ROOT = Path(__file__).parents[2]
EXAMPLE = "sl_serve/models/mistral.py"
END = "<!-- end -->\n"


def pages() -> dict[Path, str]:
    """Both pages as they must be."""
    models, adding = ROOT / "docs" / "models.md", ROOT / "docs" / "adding-a-model.md"
    example = f"```python\n{(ROOT / EXAMPLE).read_text(encoding='utf-8')}```\n"
    return {
        models: with_content(
            with_content(models.read_text(encoding="utf-8"), "scripts/models-table", table()),
            "tests/families/test_generic.py",
            others(),
        ),
        adding: with_content(adding.read_text(encoding="utf-8"), EXAMPLE, example),
    }


def with_content(page: str, name: str, content: str) -> str:
    begin = f"<!-- begin: {name} -->\n"
    before, rest = page.split(begin)
    return before + begin + content + END + rest.split(END, 1)[1]


def table() -> str:
    head = "| model type | models, and what is particular to them | GGUF | tested variants |"
    return "\n".join([head, "|---|---|---|---|", *map(line, supported_families()), ""])


def others() -> str:
    """Model types that run without a file of their own."""
    tested = {*MODELS, TestHelium.tiny.family} - {*supported_families()}
    return ", ".join(f"`{name}`" for name in sorted(tested)) + ".\n"


def line(family: str) -> str:
    module = load_family(family)
    models = " ".join((module.__doc__ or "").split()).rstrip(".")
    dialect = getattr(module, "GGUF", None)
    architecture = "" if dialect is None else f"`{dialect.architecture}`"
    tiny = importlib.import_module(f"tests.families.test_{family}").TINY
    variants = [f"{name}{gguf_mark(family, name)}" for name in tiny.names if name]
    return f"| `{family}` | {models} | {architecture} | {', '.join(variants)} |"


def gguf_mark(family: str, variant: str) -> str:
    return "\\*" if (family, variant) in CASES else ""


if __name__ == "__main__":
    for path, text in pages().items():
        path.write_text(text, encoding="utf-8")
