"""The decode benchmark on a small model; figures of time are not looked at."""

from __future__ import annotations

import io
import json
from pathlib import Path
from typing import Any

import pytest
import torch
from rich.console import Console

from bench import decode
from bench.decode import build_report, parse_rows, render, run_all
from bench.decode_work import HELD, Widened, measure
from bench.errors import BenchError
from sl_serve.llm import open_engine, open_model
from sl_serve.weights.checkpoint import Checkpoint
from tests.engine.running import GREEDY, config, run
from tests.engine.test_gguf_weights import TOKENIZER, TOKENS
from tests.weights.blocks import Kind
from tests.weights.tiny_models import tiny_llama, write_tiny_gguf

N_TOKENS = 6


@pytest.fixture(scope="module")
def small(tmp_path_factory: pytest.TempPathFactory) -> str:
    path = tmp_path_factory.mktemp("models") / "small.gguf"
    sizes = {"vocab_size": len(TOKENS), "hidden_size": 64, "intermediate_size": 96}
    write_tiny_gguf(path, tiny_llama(**sizes), quantisation=Kind.Q4_1, settings=TOKENIZER)
    return str(path)


@pytest.mark.parametrize("held", HELD)
def test_steps_of_so_many_rows_are_timed(small: str, held: Any) -> None:
    found = json.loads(json.dumps(measure(small, held, [1, 3], N_TOKENS)))
    # The step that reads the prompts gives the first token, without a step of decoding.
    assert {rows: len(s) for rows, s in found["step_s"].items()} == {"1": 5, "3": 5}
    assert all(s > 0 for seconds in found["step_s"].values() for s in seconds)


def test_float32_has_the_same_numbers_in_more_bytes(small: str) -> None:
    sizes = [measure(small, held, [1], 3)["layers_bytes"] for held in ("stored", "float32")]  # type: ignore[arg-type]
    assert 0.1 < sizes[0] / sizes[1] < 0.4  # whole pages of small layers
    stored: Checkpoint = open_model(small)
    widened: Checkpoint = Widened(stored)
    tokens = []
    for checkpoint in (stored, widened):
        engine = open_engine(checkpoint, config(max_rows=2))
        tokens.append(run(engine, [[5, 6, 7], [8]], GREEDY))
        engine.close()
    assert tokens[0] == tokens[1]
    assert {widened.format(n).dtype for n in widened.names()} == {torch.float32}
    stored.close()


def steps(**by_rows: list[float]) -> dict[str, Any]:
    step_s = {rows.removeprefix("r"): seconds for rows, seconds in by_rows.items()}
    return {"step_s": step_s, "layers_bytes": 10**6, "peak_rss_bytes": 5}


def test_figures_by_hand() -> None:
    given = {
        "stored": [steps(r1=[0.5, 0.25, 0.5], r4=[1.0]), steps(r1=[2.0, 2.0], r4=[2.0])],
        "rounded": [steps(r1=[0.125], r4=[1.0]), steps(r1=[0.125], r4=[1.0])],
        "float32": [steps(r1=[1.0], r4=[1.0]), steps(r1=[1.0], r4=[3.0])],
    }
    asked: list[str] = []

    def job(held: str) -> Any:
        asked.append(held)
        return given[held][asked.count(held) - 1]

    report = json.loads(json.dumps(build_report([1, 4], run_all(2, job, lambda: None))))
    assert asked == ["stored", "rounded", "float32"] * 2
    one, four = report["cases"]
    assert one["stored"] == {"tokens_per_s": 2.0, "best_tokens_per_s": 4.0, "n_steps": 5}
    assert (one["ratio"], four["ratio"]) == (2.0, pytest.approx(4 / 3))
    assert (one["rounded_ratio"], four["rounded_ratio"]) == (4.0, 1.5)
    screen = io.StringIO()
    Console(file=screen, width=100).print(render(report | {"model": "small"}))
    shown = " ".join(screen.getvalue().replace("│", " ").split())
    assert "1 2 (4) 8 (8) 1 (1) 2.00 4.00" in shown
    assert "layers 1.0 MB as in the file, 1.0 in float32" in shown


def test_the_command_writes_what_its_workers_measured(
    small: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """One of three in a process of its own, which takes seconds to start."""
    started = decode.in_a_process

    def in_a_process(model: str, held: Any, rows: str, tokens: int) -> dict[str, Any]:
        if held != "stored":
            return measure(model, held, parse_rows(rows), tokens)
        return started(model, held, rows, tokens)

    monkeypatch.setattr(decode, "in_a_process", in_a_process)
    path = tmp_path / "decode.json"
    decode.run(small, "2", N_TOKENS, 1, path)
    report = json.loads(path.read_text())
    assert [case["rows"] for case in report["cases"]] == [2]
    assert report["cases"][0]["ratio"] > 0
    memory = report["memory"]
    assert memory["stored"]["layers_bytes"] < memory["float32"]["layers_bytes"]
    with pytest.raises(BenchError, match=r"stored ended with exit code 2: .*no such model"):
        started("/nowhere.gguf", "stored", "1", 3)


@pytest.mark.parametrize("rows", ["", "0", "1,x", "-1"])
def test_what_is_no_number_of_rows_is_refused(rows: str) -> None:
    with pytest.raises(BenchError, match="give numbers from 1 on, such as 1,4,16,64,256"):
        parse_rows(rows)
