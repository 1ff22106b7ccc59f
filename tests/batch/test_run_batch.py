"""`sl-serve run-batch` on a tiny model, and `sl-serve batches` against a server."""

from __future__ import annotations

import json
import logging
import signal
import sqlite3
import subprocess
import sys
from collections.abc import Callable, Iterator
from contextlib import closing, contextmanager
from pathlib import Path
from typing import Any

import httpx
import pytest
import structlog
from transformers import LlamaForCausalLM

from server.batch.translate import line_seed
from sl_serve.core import SamplingParams
from tests.batch.jobs import CHAT, jsonl, line, wait_for
from tests.engine.running import config, engine, run
from tests.server.conftest import LiveServer
from tests.test_cli import COMMAND, sl_serve

Command = Callable[..., tuple[int, str, str]]
FEW_ROWS = ("--max-rows", "4", "--kv-memory", "4MiB", "--threads", "1")


@pytest.fixture
def command(
    capfd: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> Iterator[Command]:
    """The server that some ask is in this process too: its log is not what they print."""
    monkeypatch.setenv("COLUMNS", "200")
    structlog.configure(logger_factory=structlog.ReturnLoggerFactory())
    yield lambda *arguments: sl_serve(capfd, monkeypatch, *map(str, arguments))
    structlog.reset_defaults()  # `run-batch` makes logs go to what is standard error now
    logging.basicConfig(handlers=[], force=True)


@pytest.fixture
def model(tiny: tuple[Path, LlamaForCausalLM]) -> Path:
    return tiny[0]


def body_of(prompt: str, **changes: Any) -> dict[str, Any]:
    return {"model": "tiny", "prompt": prompt, "max_tokens": 6, "ignore_eos": True} | changes


def read(path: Path) -> dict[str, Any]:
    entries = [json.loads(entry) for entry in path.read_bytes().splitlines()]
    return {entry["custom_id"]: entry["response"]["body"] for entry in entries}


def test_a_file_through_the_engine(
    command: Command, model: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Every line has the tokens that the engine alone gives for its seed."""
    prompts = [f"prompt {i} " * (1 + i % 4) for i in range(12)]
    source, output = tmp_path / "in.jsonl", tmp_path / "out.jsonl"
    bodies = [body_of(p, return_token_ids=True) for p in prompts]
    source.write_bytes(jsonl(line(f"{i}", body) for i, body in enumerate(bodies)))
    named = ("--served-model-name", "tiny", "--seed", "9")
    code, out, err = command("run-batch", model, "-i", source, "-o", output, *named, *FEW_ROWS)
    assert code == 0, err
    assert out == ""
    assert f"12 answers in {output}" in err
    answers = read(output)
    assert list(answers) == [f"{i}" for i in range(12)]
    samplings = [
        SamplingParams(max_tokens=6, ignore_eos=True, seed=line_seed(9, f"{i}")) for i in range(12)
    ]
    with engine(model, config()) as running:
        ids = [running.tokenizer.encode(p) for p in prompts]
        expected = run(running, ids, samplings)
    said = [answer["choices"][0]["token_ids"] for answer in answers.values()]
    assert said == expected
    assert sorted(path.name for path in tmp_path.iterdir()) == ["in.jsonl", "out.jsonl"]
    code, _, err = command("run-batch", model, "-i", source, "-o", output)
    assert (code, f"error: {output} exists" in err) == (2, True)
    code, _, err = command("run-batch", model, "-i", source, "-o", output, "--resume")
    assert (code, "is complete already" in err) == (0, True)


@contextmanager
def not_ignoring(number: signal.Signals) -> Iterator[None]:
    """A shell has its background jobs ignore Ctrl-C, and they what they start."""
    before = signal.signal(number, signal.default_int_handler)
    try:
        yield
    finally:
        signal.signal(number, before)


N_LINES = 80


def test_interrupted_and_resumed(command: Command, model: Path, tmp_path: Path) -> None:
    source, output = tmp_path / "in.jsonl", tmp_path / "out.jsonl"
    bodies = [body_of(f"{i}", max_tokens=80) for i in range(N_LINES)]
    source.write_bytes(jsonl(line(f"{i}", body) for i, body in enumerate(bodies)))
    options = ["-i", str(source), "-o", str(output), "--served-model-name", "tiny", *FEW_ROWS]
    log = tmp_path / "log"
    with log.open("w") as stderr, not_ignoring(signal.SIGINT):
        process = subprocess.Popen([*COMMAND, "run-batch", str(model), *options], stderr=stderr)
    wait_for(lambda: n_results(tmp_path) > 5 or process.poll() is not None, timeout_s=60)
    process.send_signal(signal.SIGINT)
    assert process.wait(30) == 130, log.read_text()
    assert "--resume goes on" in log.read_text()
    assert "Traceback" not in log.read_text()
    done = n_results(tmp_path)
    assert 5 < done < N_LINES
    code, _, err = command("run-batch", model, *options)
    assert (code, "continue it with --resume" in err) == (2, True)
    asked = source.read_bytes()
    source.write_bytes(jsonl([line("another", body_of("x"))]))
    code, _, err = command("run-batch", model, *options, "--resume")
    assert (code, "has changed since the run began" in err) == (2, True)
    source.write_bytes(asked)
    code, _, err = command("run-batch", model, *options, "--resume")
    assert code == 0, err
    assert list(read(output)) == [f"{i}" for i in range(N_LINES)]


def n_results(folder: Path) -> int:
    try:
        path = folder / "out.jsonl.run" / "jobs.sqlite"
        with closing(sqlite3.connect(f"file:{path}?mode=ro", uri=True)) as database:
            (n,) = database.execute("SELECT count(*) FROM results").fetchone()
        return int(n)
    except sqlite3.Error:
        return 0


def test_mistakes_are_one_sentence(command: Command, model: Path, tmp_path: Path) -> None:
    source, output = tmp_path / "in.jsonl", tmp_path / "out.jsonl"
    asked = ("run-batch", model, "-i", source, "-o", output, *FEW_ROWS)
    code, _, err = command(*asked)
    assert (code, f"error: there is no file {source}" in err) == (2, True)
    source.write_bytes(jsonl([line("a", body_of("x", model=None), url=CHAT), line("b")]))
    code, _, err = command(*asked)
    assert code == 2
    assert f"error: {source} was refused, nothing ran: line 1: 'messages' is required" in err
    assert "line 2: 'url' is '/v1/completions', the batch's is" in err
    assert "Traceback" not in err
    assert [path.name for path in tmp_path.iterdir()] == ["in.jsonl"]
    code, _, err = command("run-batch", model, "-i", source, "-o", tmp_path / "no" / "out")
    assert (code, "there is no folder" in err) == (2, True)


def test_batches_of_a_server(command: Command, live: LiveServer, tmp_path: Path) -> None:
    source, target = tmp_path / "in.jsonl", tmp_path / "results.jsonl"
    source.write_bytes(jsonl(line(f"{i}") for i in range(5)))
    at = ("--url", live.url)
    code, out, err = command("batches", "submit", source, "--window", "2h", "--key", "k", *at)
    assert code == 0, err
    batch_id = out.strip()
    code, out, err = command("batches", "watch", batch_id, *at)
    assert (code, out) == (0, "completed\n"), err
    _, out, _ = command("batches", "list", *at)
    assert batch_id in out and "completed" in out
    command("batches", "results", batch_id, "-o", target, *at)
    names = {json.loads(entry)["custom_id"] for entry in target.read_text().splitlines()}
    assert names == {f"{i}" for i in range(5)}
    _, out, _ = command("batches", "results", batch_id, *at)
    assert out == target.read_text()
    code, _, err = command("batches", "cancel", batch_id, *at)
    assert (code, "failed: Batch" in err, "can be cancelled" in err) == (1, True, True)
    code, _, err = command("batches", "retry", batch_id, *at)
    assert (code, "with 0 failed" in err) == (1, True)


def test_a_batch_that_fails_or_is_cancelled(
    command: Command, live: LiveServer, tmp_path: Path
) -> None:
    at = ("--url", live.url)
    source = tmp_path / "in.jsonl"
    source.write_bytes(jsonl([line("a"), line("a")]))
    _, out, _ = command("batches", "submit", source, *at)
    code, out, err = command("batches", "watch", out.strip(), *at)
    assert (code, out) == (1, "failed\n")
    assert "line 2: 'a' was used before." in err
    endless = {"model": "toy", "prompt": "z", "max_tokens": 4000}
    source.write_bytes(jsonl([line("a", endless)]))
    _, batch_id, _ = command("batches", "submit", source, *at)
    code, out, _ = command("batches", "cancel", batch_id.strip(), *at)
    assert code == 0
    assert out.strip() in ("cancelling", "cancelled")
    assert command("batches", "watch", batch_id.strip(), *at)[:2] == (1, "cancelled\n")


def test_without_a_server_or_a_file(command: Command, tmp_path: Path) -> None:
    code, _, err = command("batches", "list", "--url", "http://127.0.0.1:9")
    assert (code, "failed: no answer from the server" in err) == (1, True)
    code, _, err = command("batches", "submit", tmp_path / "none")
    assert (code, "failed: cannot read" in err) == (1, True)
    (tmp_path / "odd").write_text("odd\n")
    code, _, err = command("batches", "submit", tmp_path / "odd")
    assert (code, "does not begin with a JSON line" in err) == (1, True)


def test_a_server_that_stops_leaves_its_jobs_in_progress(tmp_path: Path) -> None:
    """SIGTERM: exit code 0 at once though lines run; the next server goes on with them."""
    folder = tmp_path / "jobs"
    body = {"model": "toy", "prompt": "z", "max_tokens": 8}
    batch, n_done = None, 0
    for _ in range(2):
        process = subprocess.Popen(
            [sys.executable, "-m", "tests.batch.serve_fake", str(folder), "0.02"],
            cwd=Path(__file__).parents[2],
            stdout=subprocess.PIPE,
            stderr=subprocess.DEVNULL,
            text=True,
        )
        try:
            assert process.stdout is not None
            url = process.stdout.readline().strip()
            with httpx.Client(base_url=url) as client:
                if batch is None:
                    form = {"file": ("f", jsonl(line(f"{i}", body) for i in range(300)))}
                    file = client.post("/v1/files", files=form, data={"purpose": "batch"}).json()
                    order = {"input_file_id": file["id"], "endpoint": "/v1/completions"}
                    order |= {"completion_window": "24h"}
                    batch = client.post("/v1/batches", json=order).json()
                path = f"/v1/batches/{batch['id']}"
                wait_for(lambda c=client, p=path, n=n_done: done(c, p) > n, timeout_s=30)
                n_done = done(client, path)
                assert client.get(path).json()["status"] == "in_progress"
            process.send_signal(signal.SIGTERM)
            assert process.wait(20) == 0
        finally:
            process.kill()
            process.communicate()


def done(client: httpx.Client, path: str) -> int:
    return int(client.get(path).json()["request_counts"]["completed"])
