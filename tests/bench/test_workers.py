"""The real workers on the tiny case; figures of time are not looked at."""

from __future__ import annotations

import json
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

from bench.cases import find_case
from bench.errors import BenchError
from bench.machine import describe_commit, describe_machine, describe_versions
from bench.peers import hf
from bench.runner import SubprocessJob, model_of
from bench.worker import run_job

TINY = find_case("tiny-16x8-n8")


@pytest.fixture(scope="module")
def model() -> Iterator[Path]:
    with model_of(TINY) as path:
        yield path


def test_transformers_gives_the_same_tokens_at_every_batch_size(model: Path) -> None:
    runs = [hf.measure(TINY, model, f"float32:{batch}") for batch in (3, 8)]
    assert runs[0].output_ids == runs[1].output_ids
    assert runs[0].generated_tokens == TINY.generated_tokens
    assert len({tuple(ids) for ids in runs[0].output_ids}) == TINY.n_requests


def test_the_probe_tries_every_size(monkeypatch: pytest.MonkeyPatch, model: Path) -> None:
    speeds = {
        ("float32", 4): 10.0,
        ("float32", 8): 20.0,
        ("bfloat16", 4): 9.0,
        ("bfloat16", 8): 17.0,
    }

    def estimate(case: object, network: object, batch: int) -> float:
        return speeds[str(network.dtype).removeprefix("torch."), batch]

    monkeypatch.setattr(hf, "_estimate", estimate)
    probe = hf.probe(TINY, model)
    assert probe.variants == ["float32:8", "bfloat16:8"]
    assert probe.estimates["bfloat16:8"] == 17.0
    speeds |= {("bfloat16", 4): 4.0}
    probe = hf.probe(TINY, model)
    assert probe.variants == ["float32:8"]
    assert list(probe.estimates) == ["float32:4", "float32:8", "bfloat16:4"]
    assert "bfloat16" in probe.skipped


def test_estimates_come_from_the_first_token_and_the_median_step(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    def generate(network: object, prompts: object, n: int, clock: hf._Clock) -> None:
        clock.ticks += [1003.0, 1003.5, 1004.0, 1009.0]  # 3 s, then steps of 0.5, 0.5 and 5 s

    monkeypatch.setattr(hf, "generate", generate)
    monkeypatch.setattr(hf.time, "perf_counter", lambda: 1000.0)
    # two batches of 4, each 3 + 7 * 0.5 s, for 64 tokens
    assert hf._estimate(TINY, None, 4) == pytest.approx(64 / 13)


def test_ours_agrees_with_transformers(model: Path) -> None:
    ours = run_job(TINY, "sl-serve", model)
    assert ours["output_ids"] == hf.measure(TINY, model, "float32:8").output_ids
    assert ours["extras"]["steps"] >= TINY.output_tokens


def test_a_worker_is_a_process_of_its_own(model: Path) -> None:
    answer = SubprocessJob(TINY, model)("transformers:float32:8")
    assert [len(ids) for ids in answer["output_ids"]] == [8] * 8
    assert answer["peak_rss_bytes"] > 50 * 2**20


def test_a_worker_that_fails_tells_why(tmp_path: Path) -> None:
    with pytest.raises(BenchError, match=r"sl-serve ended with exit code 2: .*no config\.json"):
        SubprocessJob(TINY, tmp_path)("sl-serve")


def test_list_and_mistakes_on_the_command_line() -> None:
    def bench(*arguments: str) -> subprocess.CompletedProcess[str]:
        command = [sys.executable, "-m", "bench", *arguments]
        return subprocess.run(command, capture_output=True, text=True, check=False)

    assert "smollm2-128x128-n256" in bench("list").stdout
    mistake = bench("run", "--case", "huge")
    assert (mistake.returncode, "Traceback" in mistake.stderr) == (2, False)
    assert "no case is named 'huge'" in mistake.stderr


def test_the_machine_is_described() -> None:
    machine = describe_machine()
    assert machine["cores"] >= 1
    assert machine["memory_bytes"] > 2**28
    assert describe_versions()["torch"] is not None
    json.dumps([machine, describe_versions(), describe_commit()])
