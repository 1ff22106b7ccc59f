from __future__ import annotations

import io
import sys
from pathlib import Path

import pytest
from rich.console import Console

from clients import demo
from clients.protocol import ClientError

FAKE = [sys.executable, str(Path(__file__).with_name("serve_fake.py"))]


def run(monkeypatch: pytest.MonkeyPatch, command: list[str]) -> str:
    """The demo's screen, with a bound of one second rather than a measured one."""
    monkeypatch.setattr(demo, "compute_bound_s", lambda model, counters, n: 1.0)
    screen = io.StringIO()
    demo.run_demo(Console(file=screen, width=100), Path("unused"), command)
    return screen.getvalue()


def test_the_whole_demo(monkeypatch: pytest.MonkeyPatch) -> None:
    shown = run(monkeypatch, FAKE)
    assert "Because of scattering." in shown
    assert shown.count(" it rained.") == 3
    assert "exit code 0" in shown
    rows = {
        cells[1].strip(): cells[2].strip() for cells in map(_cells, shown.splitlines()) if cells
    }
    generated = sum(call.body["max_tokens"] for call in demo.crowd())
    assert rows["requests"] == "64"
    assert rows["prompt tokens"] == "640"
    assert rows["generated tokens"] == str(generated)
    assert rows["steps"] == "64"
    assert rows["mean step"] == "250 ms"
    assert rows["weight bytes per step"] == "2.0 MB"


def _cells(line: str) -> list[str]:
    parts = line.split("│")
    return parts if len(parts) == 4 else []


def test_a_server_that_does_not_start_is_a_client_error(monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises(ClientError, match="no such model"):
        run(monkeypatch, [*FAKE, "--fail"])


def test_the_crowd_is_mixed() -> None:
    calls = demo.crowd()
    assert len(calls) == 64
    assert len({len(call.body["prompt"]) for call in calls}) > 8
    limits = [call.body["max_tokens"] for call in calls]
    assert min(limits) >= 16
    assert max(limits) <= 96
    assert len(set(limits)) > 30


def test_figures_by_hand() -> None:
    counters = demo.Counters(
        prompt_tokens=100, generated_tokens=50, steps=4, step_s=2.0, weight_bytes=8e6
    )
    shown = demo.figures(counters, wall_s=5.0, bound_s=1.0)
    assert shown["generated tokens/s"] == "10.0"
    assert shown["mean step"] == "500 ms"
    assert shown["weight bytes per step"] == "2.0 MB"
    assert shown["share of the compute bound"] == "20%"


def test_missing_metrics_are_told() -> None:
    with pytest.raises(ClientError, match="no sl_serve_prompt_tokens_total"):
        demo.parse_counters("# TYPE up gauge\nup 1\n")
