"""One pass over an input file: what is found, and with which line."""

from __future__ import annotations

import json
import resource
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from server.batch.clerk import GROUP_LINES, MAX_ERRORS
from server.batch.lines import CheckedLine
from server.batch.translate import Translator
from server.batch.validation import FileCheck, LineError
from server.context import ServerContext
from tests.batch.jobs import CHAT, COMPLETIONS, SETTINGS, Jobs, jsonl, line
from tests.server.fake_engine import FakeEngine


def check(
    engine: FakeEngine, path: Path, data: bytes, **changes: Any
) -> list[CheckedLine | LineError]:
    path.write_bytes(data)
    translator = Translator(ServerContext(engine, SETTINGS))
    return list(FileCheck(translator, COMPLETIONS, **changes).run(path))


def only_error(found: list[CheckedLine | LineError]) -> tuple[int | None, str, str | None]:
    (error,) = (item for item in found if isinstance(item, LineError))
    return error.line, error.code, error.param


@pytest.mark.parametrize(
    ("wrong", "code", "param"),
    [
        (b"{", "invalid_json_line", None),
        (b'"text"', "invalid_json_line", None),
        (b"\xff\xfe", "invalid_json_line", None),
        (b"[" * 500, "invalid_json_line", None),
        (line(5), "invalid_custom_id", "custom_id"),  # type: ignore[arg-type]
        (line(""), "invalid_custom_id", "custom_id"),
        (line("x" * 513), "invalid_custom_id", "custom_id"),
        (line("first"), "duplicate_custom_id", "custom_id"),
        (line("b", method="GET"), "invalid_method", "method"),
        (line("b", method=None), "invalid_method", "method"),
        (line("b", url=CHAT), "mismatched_endpoint", "url"),
        (line("b", url={"a": 1}), "mismatched_endpoint", "url"),
        (line("b", body="x"), "invalid_body", "body"),
        (line("b", {"model": "toy", "prompt": "a", "stream": True}), "stream_not_supported", None),
        (line("b", {"model": "other", "prompt": "a"}), "model_not_found", "body.model"),
        (line("b", {"model": "toy"}), "invalid_body", "body.prompt"),
        (line("b", {"model": "toy", "prompt": "a", "temperature": 9}), "invalid_body", None),
        (
            line("b", {"model": "toy", "prompt": "a" * 5000}),
            "context_length_exceeded",
            "body.prompt",
        ),
        (
            line("b", {"model": "toy", "prompt": "a", "max_tokens": 4096}),
            "context_length_exceeded",
            "body.max_tokens",
        ),
        (line("b", {"model": "toy", "prompt": [999]}), "invalid_body", "body.prompt"),
    ],
)
def test_a_wrong_line_is_named(
    engine: FakeEngine, tmp_path: Path, wrong: Any, code: str, param: str | None
) -> None:
    middle = wrong if isinstance(wrong, bytes) else json.dumps(wrong).encode()
    data = jsonl([line("first")]) + b"\n" + middle + b"\r\n" + jsonl([line("last")])[:-1]
    found = check(engine, tmp_path / "f", data)
    number, found_code, found_param = only_error(found)
    assert (number, found_code) == (3, code)
    assert param is None or found_param == param
    good = [item for item in found if isinstance(item, CheckedLine)]
    assert [item.line for item in good] == [1, 4]


def test_lines_can_be_found_again(engine: FakeEngine, tmp_path: Path) -> None:
    entries = [line("a"), line("ü" * 20), line("last")]
    raw = [json.dumps(entry, ensure_ascii=False).encode() for entry in entries]
    data = b"\r\n" + raw[0] + b"\r\n\n  \n" + raw[1] + b"\n" + raw[2]
    found = check(engine, tmp_path / "f", data)
    for item, entry in zip(found, entries, strict=True):
        assert isinstance(item, CheckedLine)
        assert json.loads(data[item.offset : item.offset + item.length]) == entry
        assert item.custom_id == entry["custom_id"]
        assert item.n_tokens == 1 + len(entry["body"]["prompt"].encode())


def test_one_model_per_file(engine: FakeEngine, tmp_path: Path) -> None:
    path = tmp_path / "f"
    path.write_bytes(jsonl([line("a"), line("b", {"model": "alias", "prompt": "x"})]))
    settings = replace(SETTINGS, served_model_names=("toy", "alias"))
    translator = Translator(ServerContext(engine, settings))
    found = list(FileCheck(translator, COMPLETIONS).run(path))
    assert only_error(found) == (2, "model_mismatch", "body.model")


@pytest.mark.parametrize("data", [b"", b"\n\n  \n"])
def test_an_empty_file(engine: FakeEngine, tmp_path: Path, data: bytes) -> None:
    assert only_error(check(engine, tmp_path / "f", data)) == (None, "empty_file", None)


def test_too_many_lines_and_too_long_ones(engine: FakeEngine, tmp_path: Path) -> None:
    data = jsonl(line(str(i)) for i in range(4))
    assert only_error(check(engine, tmp_path / "f", data, max_lines=3))[1] == "too_many_lines"
    found = check(engine, tmp_path / "f", data + b" " * (SETTINGS.max_body_bytes + 1))
    assert only_error(found) == (5, "line_too_long", None)


def test_a_batch_lists_a_hundred_errors_and_runs_nothing(jobs: Jobs, engine: FakeEngine) -> None:
    good = [line(f"good {i}") for i in range(GROUP_LINES + 10)]
    batch = jobs.create(jsonl([*good, *([{}] * 300)]))
    failed = jobs.reach(batch, "failed")
    errors = jobs.complaints(failed)
    assert [error["line"] for error in errors] == list(range(1011, 1011 + MAX_ERRORS))
    assert engine.submitted == []
    assert list(jobs.service.lines.without_result(failed)) == []


def test_memory_does_not_grow_with_the_file(engine: FakeEngine, tmp_path: Path) -> None:
    """A small version of `scripts/prove batch-size`: 40 MB are checked in less than 15."""
    engine.max_model_len = 20_000
    engine.tokenizer.encode = lambda text, add_special_tokens=True: [1] * 10  # type: ignore[method-assign]
    path = tmp_path / "f"
    with path.open("wb") as file:
        for i in range(2000):
            file.write(jsonl([line(f"{i}", {"model": "toy", "prompt": "x" * 20_000})]))
    translator = Translator(ServerContext(engine, SETTINGS))
    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    n_good = sum(isinstance(f, CheckedLine) for f in FileCheck(translator, COMPLETIONS).run(path))
    grown_kib = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before
    assert n_good == 2000
    assert path.stat().st_size > 40e6
    assert grown_kib < 15_000
