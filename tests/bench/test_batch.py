"""The benchmark of batch jobs on a small model; figures of time are not looked at."""

from __future__ import annotations

import io
import json
from typing import Any

import pytest
from rich.console import Console

from bench.batch import build_report, render
from bench.batch_work import SCHEMA, Load, measure, n_valid
from bench.errors import BenchError
from tests.models import write_tiny_llama

LOAD = Load(n_lines=5, output_tokens=4, max_rows=3, n_probes=2)


@pytest.fixture(scope="module")
def small(tmp_path_factory: pytest.TempPathFactory) -> str:
    folder = tmp_path_factory.mktemp("llama")
    write_tiny_llama(folder, max_position_embeddings=2048)
    return str(folder)


def test_everything_is_measured(small: str) -> None:
    found = json.loads(json.dumps(measure(small, LOAD, repeat=2)))
    assert set(found["runs"]) == {"offline", "job", "free", "in a form"}
    assert all(len(runs) == 2 for runs in found["runs"].values())
    for name in ("offline", "job"):
        assert [run["tokens"] for run in found["runs"][name]] == [5 * 4] * 2
    formed = found["runs"]["in a form"]
    assert [(run["valid"], run["cut"]) for run in formed] == [(5, 0), (5, 0)]
    assert len(found["interactive"]["first_token_s"]) == 2
    assert len(found["interactive"]["step_s"]) > 2
    report = build_report(found)
    assert report["n_valid"] == 10 and report["p95_first_token_steps"] > 0


def test_answers_of_another_kind_stop_it(small: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("bench.batch_work._Measurement._offline", lambda _: (1.0, ["other"] * 5))
    with pytest.raises(BenchError, match="not those of the engine alone"):
        measure(small, LOAD, repeat=1)


def run(tokens: int, wall_s: float, **more: Any) -> dict[str, Any]:
    return {"tokens": tokens, "wall_s": wall_s, **more}


def test_report_and_table() -> None:
    runs = {
        "offline": [run(100, 1), run(100, 2), run(100, 4)],
        "job": [run(100, 2), run(100, 2.5), run(100, 2)],
        "free": [run(90, 1)],
        "in a form": [run(45, 1, valid=3, cut=1)],
    }
    waits = [0.1 + i / 100 for i in range(11)]
    found = {"runs": runs, "interactive": {"first_token_s": waits, "step_s": [0.1, 0.1, 0.3]}}
    report = build_report(found)
    assert report["tokens_per_s"] == {"offline": 50, "job": 50, "free": 90, "in a form": 45}
    assert (report["job_over_offline"], report["form_over_free"]) == (1, 0.5)
    assert report["p95_first_token_steps"] == pytest.approx(1.95)
    out = io.StringIO()
    about = {"model": "m", "lines": 3, "repeat": 1}
    Console(file=out, width=100).print(render(report | about))
    assert "3 of 3 valid, 1 cut" in out.getvalue() and "1.95 steps of 0.100 s" in out.getvalue()


def test_valid_is_what_the_schema_says() -> None:
    row = {"name": "ab", "count": 1, "kind": "small"}
    good = json.dumps([row, row])
    wrong = [json.dumps([row]), json.dumps([row, row | {"count": -1}]), good[:-1], "", "{}"]
    assert n_valid([good, *wrong]) == 1
    assert SCHEMA["minItems"] == 2
