"""What the engine and the server never call: ways to run code or follow addresses that come from a
model's folder or a client."""

from __future__ import annotations

import ast
from collections.abc import Iterator
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
MODULES = {"pickle", "cloudpickle", "dill", "marshal", "shelve", "joblib", "urllib.request"}
CALLS = {"eval", "exec", "compile", "__import__", "torch.load", "os.system", "yaml.load"}


def calls_and_imports(source: str) -> Iterator[str]:
    for node in ast.walk(ast.parse(source)):
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            yield node.module or ""
        elif isinstance(node, ast.Call):
            yield ast.unparse(node.func)
            for keyword in node.keywords:
                if keyword.arg in ("trust_remote_code", "shell"):
                    yield f"{keyword.arg}={ast.unparse(keyword.value)}"


FORBIDDEN = MODULES | CALLS | {"trust_remote_code=True", "shell=True"}


@pytest.mark.parametrize("package", ["sl_serve", "server"])
def test_nothing_forbidden_is_used(package: str) -> None:
    files = list((ROOT / package).rglob("*.py"))
    assert len(files) > 20
    for file in files:
        found = FORBIDDEN & set(calls_and_imports(file.read_text()))
        assert not found, f"{file.relative_to(ROOT)}: {found}"


def test_the_search_finds_what_it_looks_for() -> None:
    source = "import pickle\nfrom pickle import loads\ntorch.load(f)\nrun(x, shell=True)\neval(s)"
    assert FORBIDDEN & set(calls_and_imports(source)) == {
        "pickle",
        "torch.load",
        "shell=True",
        "eval",
    }
