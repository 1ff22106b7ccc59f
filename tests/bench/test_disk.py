"""The disk benchmark on a small model; figures of time are not looked at."""

from __future__ import annotations

import io
import itertools
import json
import os
import subprocess
import sys
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

import pytest
import torch
from rich.console import Console
from safetensors.torch import load_file

from bench import disk, disk_io, disk_work, random_model
from bench.bound import Matrix
from bench.disk import DiskResults, run_all, systems
from bench.disk_cases import MANY_REQUESTS, DiskStep, disk_case_of
from bench.disk_io import Bandwidth, drop_page_cache, measure_bandwidth
from bench.disk_report import TARGETS, build_report, render
from bench.errors import BenchError
from bench.peers import accelerate_disk
from bench.random_model import cached_random_model, write_random_model
from sl_serve import stored_model
from sl_serve.errors import UserError
from sl_serve.weights.shapes import SHAPES

N_LAYERS = 6
SMALL = SHAPES["tinyllama-1.1b"] | {
    "num_hidden_layers": N_LAYERS,
    "hidden_size": 256,
    "intermediate_size": 704,
    "num_attention_heads": 8,
    "vocab_size": 4000,
}
LAYER_BYTES = 2 * (2 * 256 * 256 + 2 * 256 * 128 + 3 * 256 * 704 + 2 * 256)
HEAD_BYTES = 2 * 4000 * 256
MATRICES = [Matrix("qkv", 10, 10, 1), Matrix("head", 10, 10, 1)]
RATES = {"qkv": 100.0, "head": 100.0}
OURS = [[1, 2, 3, 4]] * 2
OTHERS = [[1, 2, 3, 4], [1, 2, 0, 0]]


@pytest.fixture(scope="module")
def small(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_random_model(SMALL, tmp_path_factory.mktemp("models") / "small")


# The model.


def test_the_random_model_is_what_its_settings_say(small: Path) -> None:
    tensors = load_file(small / "model.safetensors")
    assert len(tensors) == N_LAYERS * 9 + 3
    assert {t.dtype for t in tensors.values()} == {torch.bfloat16}
    down = tensors["model.layers.5.mlp.down_proj.weight"]
    assert down.shape == (256, 704)
    assert down.float().std() == pytest.approx(0.02, rel=0.05)
    assert not torch.equal(down, tensors["model.layers.4.mlp.down_proj.weight"])
    assert bool((tensors["model.norm.weight"] == 1).all())


def test_a_written_model_is_used_again(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    said: list[str] = []
    monkeypatch.setitem(random_model.SHAPES, "tinyllama-1.1b", SMALL)  # type: ignore[misc]
    folder = cached_random_model("tinyllama-1.1b", tmp_path, said.append)
    stamp = (folder / "model.safetensors").stat().st_mtime_ns
    assert cached_random_model("tinyllama-1.1b", tmp_path, said.append) == folder
    assert (folder / "model.safetensors").stat().st_mtime_ns == stamp
    assert len(said) == 1


def test_a_model_cut_short_while_being_written_is_not_taken_for_one(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def fail(*_: object, **__: object) -> None:
        raise OSError("no space left")

    monkeypatch.setitem(random_model.SHAPES, "tinyllama-1.1b", SMALL)  # type: ignore[misc]
    monkeypatch.setattr(random_model, "write_byte_tokenizer", fail)
    with pytest.raises(OSError, match="no space"):
        cached_random_model("tinyllama-1.1b", tmp_path, print)
    assert list(tmp_path.iterdir()) == []


def test_shapes_of_other_families_are_refused(tmp_path: Path) -> None:
    with pytest.raises(BenchError, match=r"no shape is named 'opt-125m'; there are: tinyllama"):
        cached_random_model("opt-125m", tmp_path, print)


# The disk.


def test_both_ways_read_every_byte(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, direct: None
) -> None:
    file = tmp_path / "weights"
    file.write_bytes(os.urandom((9 << 20) + 123))
    monkeypatch.setattr(disk_io, "_SLOT_BYTES", 2 << 20)
    for read in (disk_io._read_as_engine, disk_io._read_plainly):
        drop_page_cache([file])
        before = disk_io.read_bytes()
        read(file)
        assert disk_io.read_bytes() - before >= file.stat().st_size
    rate = measure_bandwidth([file])
    assert rate.bytes_per_s == max(rate.readers_bytes_per_s, rate.plain_bytes_per_s) > 0


def test_pages_leave_the_cache(tmp_path: Path, direct: None) -> None:
    file = tmp_path / "weights"
    file.write_bytes(bytes(4 << 20))
    before = disk_io.read_bytes()
    file.read_bytes()
    assert disk_io.read_bytes() == before  # it was just written
    drop_page_cache([file])
    file.read_bytes()
    assert disk_io.read_bytes() - before >= 4 << 20


@pytest.fixture
def direct(tmp_path: Path) -> None:
    """A folder in memory has nothing to measure."""
    file = tmp_path / "probe"
    file.write_bytes(bytes(4096))
    try:
        os.close(os.open(file, os.O_RDONLY | os.O_DIRECT))
    except OSError:
        pytest.skip("this file system refuses direct reads")


# The systems.


@pytest.mark.parametrize("head_on_disk", [False, True])
def test_ours_reads_its_layers_from_disk_and_agrees_with_the_peer(
    small: Path, monkeypatch: pytest.MonkeyPatch, head_on_disk: bool
) -> None:
    case = replace(disk_case_of(small, 4, 10**9), output_tokens=4)
    plan_memory = stored_model.plan_memory

    def planned(*args: Any) -> Any:
        plan = plan_memory(*args)
        return replace(
            plan,
            n_disk_layers=4,
            embedding_on_disk=True,
            head_on_disk=head_on_disk,
        )

    monkeypatch.setattr(stored_model, "plan_memory", planned)
    ours = disk_work.measure(case, small)
    assert ours.extras["disk_bytes"] == 4 * LAYER_BYTES + head_on_disk * HEAD_BYTES
    steps = [DiskStep(**step) for step in ours.extras["steps"]]
    assert sum(s.n_prefill_tokens for s in steps) == 4 * 64
    assert sum(s.n_decode_tokens for s in steps) == 4 * 3
    theirs = accelerate_disk.measure(case, small, "float32")
    assert ours.output_ids == theirs.output_ids
    assert len({tuple(ids) for ids in ours.output_ids}) == 4


def test_other_weights_come_from_a_file_of_their_own(
    small: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    plan_memory = stored_model.plan_memory

    def planned(*args: Any) -> Any:
        plan = plan_memory(*args)
        layer_bytes = plan.weights_bytes // N_LAYERS
        assert layer_bytes < 0.4 * LAYER_BYTES
        return replace(plan, n_disk_layers=4, disk_bytes=4 * layer_bytes)

    monkeypatch.setattr(stored_model, "plan_memory", planned)
    found = disk_work.run_job("sl-serve:int4", small, 2, 10**9, tmp_path)
    assert 0 < found["extras"]["disk_bytes"] < 4 * 0.4 * LAYER_BYTES
    assert [len(ids) for ids in found["output_ids"]] == [16, 16]
    assert list(tmp_path.iterdir()) == []  # it has no name


@pytest.mark.parametrize("variant", ["bfloat16", "bfloat16:uncached"])
def test_the_peer_reads_its_layers_once_or_every_time(
    small: Path, direct: None, variant: str
) -> None:
    case = replace(disk_case_of(small, 2, 10**9), output_tokens=4)
    measured = accelerate_disk.measure(case, small, variant)
    assert measured.extras["disk_bytes"] == N_LAYERS * LAYER_BYTES
    first, *others = [DiskStep(**step) for step in measured.extras["steps"]]
    assert (first.n_prefill_tokens, first.n_decode_tokens) == (2 * 64, 0)
    assert {(s.n_prefill_tokens, s.n_decode_tokens) for s in others} == {(0, 2)}
    assert len(others) == 3
    # Embedding and head are mapped, and in so small a file some layers share pages with them.
    assert first.read_bytes > 3 * LAYER_BYTES
    for step in others:
        assert (step.read_bytes > 3 * LAYER_BYTES) == ("uncached" in variant)


def test_the_ceiling_is_passed_on(small: Path) -> None:
    engine = disk_case_of(small, 4, 700 * 10**6).engine
    assert (engine.host_memory_bytes, engine.max_model_len) == (700 * 10**6, 80)
    assert engine.scheduler.max_rows == 4


# The comparison, with workers and a disk that answer from a list.


def measured(
    wall_s: float, steps: list[DiskStep], tokens: list[list[int]] = OURS, peak: int = 700
) -> dict[str, Any]:
    return {
        "load_s": 1.0,
        "wall_s": wall_s,
        "peak_rss_bytes": peak,
        "output_ids": tokens,
        "extras": {"steps": [asdict(s) for s in steps], "disk_bytes": 300},
    }


def few(decode_s: float, n: int) -> dict[str, Any]:
    return measured(8.0, [DiskStep(5.0, 3 * n, 0, 300)] + [DiskStep(decode_s, 0, n, 310)] * 3)


def answers(**changed: Any) -> dict[tuple[str, int], Any]:
    many = [DiskStep(20.0, 100, 0, 0), DiskStep(4.0, 0, 32, 0), DiskStep(4.0, 0, 32, 0)]
    found: dict[tuple[str, int], Any] = {
        ("rates", 32): {"rates": RATES},
        ("sl-serve", 1): few(2.2, 1),
        ("sl-serve", 4): few(2.6, 4),
        ("sl-serve", 32): measured(4.0, many, peak=800),
    }
    for variant, wall_s in zip(accelerate_disk.VARIANTS, (8.0, 5.0, 16.0, 10.0), strict=True):
        found["accelerate:" + variant, 32] = measured(wall_s, many, OTHERS)
    return found | {("accelerate:" + k, 32): v for k, v in changed.items()}


def compare(given: dict[tuple[str, int], Any], repeat: int = 1) -> tuple[DiskResults, list[Any]]:
    asked: list[Any] = []
    rates = itertools.count(50, 100)  # 50, 150, 250, ... bytes/s

    def job(system: str, n_requests: int) -> dict[str, Any]:
        asked.append((system, n_requests))
        answer = given[system, n_requests]
        if isinstance(answer, Exception):
            raise answer
        return dict(answer)

    def bandwidth() -> Bandwidth:
        rate = float(next(rates))
        asked.append(rate)
        return Bandwidth(rate, rate - 10.0)

    return run_all(systems("accelerate"), repeat, job, bandwidth, lambda _: None), asked


def figures(given: dict[tuple[str, int], Any]) -> dict[str, Any]:
    report = json.loads(json.dumps(build_report(compare(given)[0], MATRICES, 640)))
    return {f["figure"]: (f["value"], f["met"]) for f in report["figures"]}


def test_the_disk_is_measured_around_every_run() -> None:
    results, asked = compare(answers())
    assert asked[:6] == [("rates", 32), 50.0, ("sl-serve", 1), 150.0, ("sl-serve", 4), 250.0]
    assert asked[-3:] == [("accelerate:float32:uncached", 32), 750.0, ("rates", 32)]
    assert [run.disk_bytes_per_s for run in results.runs[:2]] == [100.0, 200.0]


def test_figures_by_hand() -> None:
    found = figures(answers())
    # 300 bytes at 100 and at 200 bytes/s: 3 s and 1.5 s
    assert found["decode step / disk, 1 requests"] == (pytest.approx(2.2 / 3), True)
    assert found["decode step / disk, 4 requests"] == (pytest.approx(2.6 / 1.5), False)
    # 300 bytes at 300 bytes/s: 1 s. 200 FLOP a row and matrix at 100 FLOP/s: the prefill's 100
    # rows need 200 s, a decode step's 32 rows 64 s in the layers and as much in the head.
    value, met = found["step / max(disk, compute), 32 requests"]
    assert (value, met) == (pytest.approx(28 / (200 + 2 * 128)), True)
    assert found["sl-serve / accelerate bfloat16"] == (2.0, False)
    assert found["sl-serve / accelerate float32"] == (1.25, True)
    assert found["peak memory / --host-memory"] == (1.25, False)
    assert len(found) == len(TARGETS)


def test_agreement_is_with_float32() -> None:
    report = build_report(compare(answers())[0], MATRICES, 640)
    assert report["agreement"] == {
        "equal_tokens_share": 0.75,
        "equal_requests": 1,
        "requests": 2,
    }


def test_a_failing_peer_is_listed_and_not_tried_again() -> None:
    results, asked = compare(answers(float32=BenchError("out of memory")), repeat=2)
    assert asked.count(("accelerate:float32", MANY_REQUESTS)) == 1
    assert len(results.runs) == 2 * 6
    report = build_report(results, MATRICES, 640)
    assert report["without_figures"] == {"accelerate:float32": "failed: out of memory"}
    assert report["agreement"] is None
    assert "sl-serve / accelerate float32" not in {f["figure"] for f in report["figures"]}


def test_other_weights_are_set_beside_the_models_own() -> None:
    given = answers()
    for n, tokens_per_s in ((1, 2.0), (4, 4.0), (32, 4.0)):
        given["sl-serve:int4", n] = given["sl-serve", n] | {"wall_s": 8 / tokens_per_s}
    given["sl-serve:int4", 32]["extras"] = {**given["sl-serve", 32]["extras"], "disk_bytes": 0}
    asked: list[tuple[str, int]] = []

    def job(system: str, n_requests: int) -> dict[str, Any]:
        asked.append((system, n_requests))
        return dict(given[system, n_requests])

    turn = systems("accelerate", ["int4"])
    results = run_all(turn, 1, job, lambda: Bandwidth(100.0, 90.0), lambda _: None)
    first, second = asked[1:3]
    assert (first, second) == (("sl-serve", 1), ("sl-serve:int4", 1))
    report = json.loads(json.dumps(build_report(results, MATRICES, 640)))
    # Eight tokens each: own weights 1, 1 and 2 tokens/s.
    times = {t["n_requests"]: t["times"] for t in report["times_own_weights"]}
    assert times == {1: 2.0, 4: 4.0, 32: 2.0}
    assert {t["weights"] for t in report["times_own_weights"]} == {"int4"}
    plain = json.loads(json.dumps(build_report(compare(answers())[0], MATRICES, 640)))
    assert plain["times_own_weights"] == []
    ratios = [f["figure"] for f in report["figures"]]
    assert ratios == [f["figure"] for f in plain["figures"]]  # not taken for a peer's
    screen = io.StringIO()
    Console(file=screen, width=160).print(render(report | {"model": "small"}))
    assert "--weights int4, 4 requests: 4.00 times the model's own" in screen.getvalue()


def test_without_the_disk_there_is_nothing_to_compare() -> None:
    given = answers()
    given["sl-serve", 1]["extras"]["disk_bytes"] = 0
    with pytest.raises(BenchError, match="fits into --host-memory; lower it"):
        compare(given)


def test_the_table_shows_every_run_and_every_miss() -> None:
    report = build_report(compare(answers())[0], MATRICES, 640) | {"model": "small"}
    screen = io.StringIO()
    Console(file=screen, width=160).print(render(report))
    shown = screen.getvalue()
    for text in (
        "accelerate:bfloat16:uncached",
        "sl-serve / accelerate bfloat16: 2.00, target 2.5 MISSED",
        "sl-serve / accelerate float32: 1.25, target 1.15\n",
        "same tokens as accelerate float32: 75.00%, 1 of 2 requests",
    ):
        assert text in shown


# The command line.


def test_a_worker_is_a_process_of_its_own(small: Path, tmp_path: Path) -> None:
    answer = disk.SubprocessJob(small, 2 * 10**9, tmp_path)("sl-serve", 1)
    assert [len(ids) for ids in answer["output_ids"]] == [16]
    assert answer["peak_rss_bytes"] > 50 * 2**20
    assert answer["extras"]["disk_bytes"] == 0  # two gigabytes hold it all


def test_a_worker_that_fails_tells_why(small: Path, tmp_path: Path) -> None:
    with pytest.raises(BenchError, match=r"sl-serve ended with exit code 2: .*--host-memory"):
        disk.SubprocessJob(small, 10**6, tmp_path)("sl-serve", 1)


@pytest.mark.parametrize(
    ("given", "message"),
    [
        ({"peers": "nope"}, "no peer is named 'nope'"),
        ({"host_memory": "much"}, "'much' is no size"),
        ({"model": "/"}, r"/: has no \.safetensors file"),
        ({"model": "huge"}, "no shape is named 'huge'"),
        ({"weights": "int4,int3"}, "--weights 'int3' is not known"),
    ],
)
def test_mistakes_are_told_at_once(
    given: dict[str, Any], message: str, small: Path, tmp_path: Path
) -> None:
    given = {"model": str(small)} | given
    with pytest.raises(UserError, match=message):
        disk.run(**given, cache=tmp_path)


def test_a_mistake_on_the_command_line_is_one_sentence() -> None:
    command = [sys.executable, "-m", "bench", "disk", "--peers", "nope"]
    mistake = subprocess.run(command, capture_output=True, text=True, check=False)
    assert (mistake.returncode, len(mistake.stderr.splitlines())) == (2, 1)
