"""Lines that ask for a form: compiled when the file is checked, followed when they run."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from sl_serve.grammar.compiler import Grammars
from tests.batch.jobs import Jobs, jsonl, line
from tests.server.fake_engine import FakeEngine


def asked(**form: Any) -> dict[str, Any]:
    return {"model": "toy", "prompt": "p", "max_tokens": 300} | form


def jobs_with(grammars: Grammars, engine: FakeEngine, folder: Path) -> Jobs:
    jobs = Jobs(engine, folder)
    jobs.context.grammars = grammars
    return jobs


def test_a_form_is_followed(toy_grammars: Grammars, engine: FakeEngine, tmp_path: Path) -> None:
    choices = ["red", "green", "blue"]
    bodies = {f"line-{i}": asked(structured_outputs={"choice": choices}, n=2) for i in range(4)}
    with jobs_with(toy_grammars, engine, tmp_path) as jobs:
        ended = jobs.reach(jobs.create(jsonl(line(k, b) for k, b in bodies.items())), "completed")
        answers = jobs.read(ended.output_file_id)
    assert answers.keys() == bodies.keys()
    for answer in answers.values():
        texts = [choice["text"] for choice in answer["response"]["body"]["choices"]]
        assert len(texts) == 2 and set(texts) <= set(choices)


def test_a_form_that_cannot_be_is_found_with_its_line(
    toy_grammars: Grammars, engine: FakeEngine, tmp_path: Path
) -> None:
    wrong = line("second", asked(structured_outputs={"regex": "(unclosed"}))
    with jobs_with(toy_grammars, engine, tmp_path) as jobs:
        failed = jobs.reach(jobs.create(jsonl([line("first"), wrong])), "failed")
        (complaint,) = jobs.complaints(failed)
    assert complaint["line"] == 2
    assert complaint["param"] == "body.structured_outputs.regex"
    assert engine.submitted == []
