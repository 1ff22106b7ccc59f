from __future__ import annotations

import io
import json
from typing import Any

import pytest
from rich.console import Console

from bench import runner
from bench.bound import Matrix
from bench.cases import Case
from bench.errors import BenchError
from bench.report import agreement, build_report, render
from bench.runner import run_case

CASE = Case(
    name="fake",
    about="",
    model="none",
    n_requests=2,
    prompt_tokens=3,
    output_tokens=4,
    token_ids=(0, 9),
)
MATRICES = [Matrix("qkv", 10, 10, 1), Matrix("head", 10, 10, 1)]
TOKENS = [[1, 2, 3, 4], [5, 6, 7, 8]]
OTHER = [[1, 2, 3, 4], [5, 6, 0, 0]]


def measured(wall_s: float, tokens: list[list[int]] = TOKENS, **extras: Any) -> dict[str, Any]:
    return {
        "load_s": 1.0,
        "wall_s": wall_s,
        "peak_rss_bytes": int(wall_s * 2**20),
        "output_ids": tokens,
        "extras": extras,
    }


class FakeWorkers:
    """Answers each job from a list, and remembers the order in which they came."""

    def __init__(self, **answers: list[Any]) -> None:
        self.answers = answers
        self.asked: list[str] = []

    def __call__(self, system: str) -> dict[str, Any]:
        self.asked.append(system)
        answer = self.answers[system].pop(0)
        if isinstance(answer, Exception):
            raise answer
        return dict(answer)


def workers(**changed: list[Any]) -> FakeWorkers:
    answers: dict[str, list[Any]] = {
        "bound": [{"rates": {"qkv": 50.0, "head": 100.0}}, {"rates": {"qkv": 100.0, "head": 80.0}}],
        "sl-serve": [measured(2.0), measured(4.0), measured(3.0)],
        "transformers:probe": [
            {"variants": ["float32:2", "bfloat16:1"], "estimates": {"float32:2": 2.0}}
        ],
        "transformers:float32:2": [measured(8.0, OTHER), measured(6.0, OTHER), measured(7.0)],
        "transformers:bfloat16:1": [measured(16.0)] * 3,
    }
    return FakeWorkers(**(answers | changed))


def run(fake: FakeWorkers, peers: list[str], repeat: int = 3) -> dict[str, Any]:
    results = run_case(CASE, peers, repeat, fake, lambda line: None)
    return build_report(results, MATRICES)


def test_systems_run_in_turns_between_two_measurements_of_the_bound() -> None:
    fake = workers()
    run(fake, ["transformers"], repeat=2)
    one_turn = ["sl-serve", "transformers:float32:2", "transformers:bfloat16:1"]
    assert fake.asked == ["bound", "transformers:probe", *one_turn, *one_turn, "bound"]


def test_figures_by_hand() -> None:
    report = run(workers(), ["transformers"])
    ours, float32, bfloat16 = report["systems"]
    # medians of the wall times: 3, 7 and 16 s for 8 tokens
    assert [s["wall_s"] for s in (ours, float32, bfloat16)] == [3.0, 7.0, 16.0]
    assert ours["tokens_per_s"] == pytest.approx(8 / 3)
    assert ours["peak_rss_bytes"] == 4 * 2**20
    assert report["ratio_to_best_peer"] == pytest.approx(7 / 3)
    # rows: layers 2 * (3 + 4 - 1) = 12, head 8; the faster rates are 100 and 100 FLOP/s:
    # 2 * 12 * 100 / 100 + 2 * 8 * 100 / 100 = 40 s for 8 tokens
    assert report["bound_tokens_per_s"] == pytest.approx(0.2)
    assert report["share_of_bound"] == pytest.approx((8 / 3) / 0.2)


def test_the_report_is_json_of_the_agreed_shape() -> None:
    report = json.loads(json.dumps(run(workers(), ["transformers"])))
    assert {
        "case",
        "config",
        "systems",
        "bound_tokens_per_s",
        "share_of_bound",
        "ratio_to_best_peer",
    } <= set(report)
    for system in report["systems"]:
        assert {"name", "tokens_per_s", "wall_s", "peak_rss_bytes", "load_s"} <= set(system)
    assert report["config"]["n_requests"] == 2


def test_agreement_is_with_the_float32_peer() -> None:
    report = run(workers(), ["transformers"])
    assert report["agreement"] == {
        "transformers:float32:2": {
            "equal_tokens_share": 0.75,
            "equal_requests": 1,
            "requests": 2,
        }
    }
    assert agreement(TOKENS, TOKENS)["equal_requests"] == 2


def test_peers_without_figures_are_listed(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(runner, "is_installed", lambda name: name != "vllm")
    failing = workers(**{"transformers:float32:2": [BenchError("out of memory")]})
    report = run(failing, ["transformers", "vllm"], repeat=1)
    assert report["without_figures"] == {
        "vllm": "not installed",
        "transformers:float32:2": "failed: out of memory",
    }
    assert [s["name"] for s in report["systems"]] == ["sl-serve", "transformers:bfloat16:1"]
    assert report["ratio_to_best_peer"] == pytest.approx(8.0)


def test_a_failing_probe_loses_the_peer_alone() -> None:
    failing = workers(**{"transformers:probe": [BenchError("no such type")]})
    report = run(failing, ["transformers"], repeat=1)
    assert report["without_figures"] == {"transformers": "failed: no such type"}
    assert report["ratio_to_best_peer"] is None


def test_our_own_failure_is_an_error() -> None:
    with pytest.raises(BenchError, match="wrong"):
        run(workers(**{"sl-serve": [BenchError("wrong")]}), [], repeat=1)


def test_unknown_peers_are_refused() -> None:
    with pytest.raises(BenchError, match="no peer is named 'nope'"):
        run(workers(), ["nope"])


def test_the_table_shows_every_system() -> None:
    screen = io.StringIO()
    Console(file=screen, width=120).print(render(run(workers(), ["transformers"])))
    shown = screen.getvalue()
    for text in ("sl-serve", "transformers:float32:2", "2.33 times the best peer", "75.00%"):
        assert text in shown
