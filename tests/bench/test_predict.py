from __future__ import annotations

import json
from typing import Any

import pytest
from rich.console import Console

from bench import predict as predicting
from bench.cases import find_case
from bench.predict import cases_table, flexgen_table, predict_case, predict_flexgen
from bench.runner import model_of
from bench.worker import run_job
from tests.plan.examples import shorten_probes

TINY = find_case("tiny-16x8-n8")


@pytest.fixture(autouse=True)
def short(monkeypatch: pytest.MonkeyPatch) -> None:
    shorten_probes(monkeypatch)


def printed(renderable: object) -> str:
    console = Console(width=200)
    with console.capture() as capture:
        console.print(renderable)
    return capture.get()


def test_a_case_is_predicted_then_measured() -> None:
    asked: list[str] = []

    def job(system: str) -> dict[str, Any]:
        asked.append(system)
        if system == "placement":
            return run_job(TINY, system, model)
        return {
            "load_s": 1.0,
            "wall_s": 2.0,
            "peak_rss_bytes": 1,
            "output_ids": [[7] * 8] * 8,
            "extras": {},
        }

    with model_of(TINY) as model:
        report = predict_case(TINY, model, job, lambda _: None)
    assert asked == ["placement", "sl-serve"]
    assert report["measured_tokens_per_s"] == 32.0
    assert report["measured_over_predicted"] == pytest.approx(
        32.0 / report["predicted_tokens_per_s"]
    )
    assert report["prediction"]["binds"] == report["binds"]
    json.dumps(report)
    assert "tiny-16x8-n8" in printed(cases_table([report]))


def test_flexgens_machine(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(predicting, "FLEXGEN", predicting.FLEXGEN[:1])
    monkeypatch.setattr(predicting, "MANY_BATCHES", 2)
    (row,) = predict_flexgen()
    one = row["one_batch"]["prediction"]
    assert (row["published_tokens_per_s"], row["batch"]) == (25.3, 2)
    # A step of two rows reads 13.3 GB at 272 GB/s: 49 ms, so 41 tokens/s at most.
    assert 10 < one["tokens_per_s"] < 41
    assert row["times_published"] == pytest.approx(one["tokens_per_s"] / 25.3)
    json.dumps(row)
    text = printed(flexgen_table([row]))
    assert "arXiv 2303.06865" in text
    assert "predicted, not measured" in text
