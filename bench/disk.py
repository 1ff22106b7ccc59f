"""`python -m bench disk`: a model several times larger than the memory it may use."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Annotated, Any

import typer
from rich.console import Console

from bench.disk_cases import FEW_REQUESTS, MANY_REQUESTS
from bench.disk_io import Bandwidth, drop_page_cache, measure_bandwidth, weight_files
from bench.disk_work import RATES, run_job
from bench.errors import BenchError
from bench.machine import about_now
from bench.measurement import Measurement
from bench.runner import OURS
from bench.worker_process import AS_OURS, run_worker

PEER = "accelerate"
Job = Callable[[str, int], dict[str, Any]]  # system, number of requests -> what the worker wrote
Say = Callable[[str], None]


@dataclass(frozen=True, slots=True)
class DiskRun:
    """Beside it, the disk's rate just before and just after: a shared disk's drifts."""

    system: str
    n_requests: int
    measurement: Measurement
    before: Bandwidth
    after: Bandwidth

    @property
    def disk_bytes_per_s(self) -> float:
        return (self.before.bytes_per_s + self.after.bytes_per_s) / 2


@dataclass(slots=True)
class DiskResults:
    rates: list[dict[str, float]] = field(default_factory=list)
    runs: list[DiskRun] = field(default_factory=list)
    missing: dict[str, str] = field(default_factory=dict)  # system -> why it has no figures


def run(
    model: Annotated[
        str, typer.Option(help="A Llama's shape, for random weights, or a folder.")
    ] = "tinyllama-1.1b",
    host_memory: Annotated[str, typer.Option(help="Of the whole process.")] = "700MB",
    peers: Annotated[str, typer.Option(help=f"{PEER}, or nothing.")] = "",
    weights: Annotated[
        str, typer.Option(help="Beside the model's own, as for sl-serve; comma-separated.")
    ] = "",
    json_path: Annotated[Path | None, typer.Option("--json", help="Where to write it all.")] = None,
    repeat: Annotated[int, typer.Option(min=1, help="Runs of each system, in turns.")] = 1,
    cache: Annotated[
        Path | None,
        typer.Option(help="Where random weights, and layers of --weights, are kept; gigabytes."),
    ] = None,
) -> None:
    """Measure sl-serve with its layers on disk, beside the disk's own rate and a peer."""
    from bench.bound import model_matrices, read_model_config
    from bench.disk_report import TABLE_WIDTH, build_report, render
    from sl_serve.plan.budget import parse_size
    from sl_serve.weights.demo_model import cache_folder

    if peers not in ("", PEER):
        raise BenchError(f"no peer is named {peers!r}; there is: {PEER}")
    host_memory_bytes = parse_size(host_memory)
    progress = Console(stderr=True, log_path=False)
    cache = cache or cache_folder()
    folder = _model(model, cache, progress.log)
    others = _checked_weights(weights, folder)
    files = weight_files(folder)
    about = {
        **about_now(),
        "model": folder.name,
        "file_bytes": sum(file.stat().st_size for file in files),
        "host_memory_bytes": host_memory_bytes,
    }
    job = SubprocessJob(folder, host_memory_bytes, cache)
    turn = systems(peers, others)
    results = run_all(turn, repeat, job, lambda: measure_bandwidth(files), progress.log)
    matrices = model_matrices(read_model_config(folder))
    report = about | build_report(results, matrices, host_memory_bytes)
    Console(width=max(TABLE_WIDTH, Console().width)).print(render(report))
    if json_path is not None:
        json_path.write_text(json.dumps(report, indent=2) + "\n")


def worker(
    system: Annotated[str, typer.Option()],
    model: Annotated[Path, typer.Option()],
    requests: Annotated[int, typer.Option()],
    host_memory_bytes: Annotated[int, typer.Option()],
    disk_dir: Annotated[Path, typer.Option()],
    json_path: Annotated[Path, typer.Option("--json")],
) -> None:
    """One job in this process; see bench.disk_work."""
    found = run_job(system, model, requests, host_memory_bytes, disk_dir)
    json_path.write_text(json.dumps(found))


def systems(peer: str, weights: Sequence[str] = ()) -> list[tuple[str, int]]:
    """(system, number of requests) in the order of one turn; other weights next to the model's
    own."""
    names = [OURS, *(f"{OURS}:{name}" for name in weights)]
    ours = [(name, n) for n in (*FEW_REQUESTS, MANY_REQUESTS) for name in names]
    if not peer:
        return ours
    from bench.peers.accelerate_disk import VARIANTS

    return ours + [(f"{peer}:{variant}", MANY_REQUESTS) for variant in VARIANTS]


def run_all(
    turn: Sequence[tuple[str, int]],
    repeat: int,
    job: Job,
    bandwidth: Callable[[], Bandwidth],
    say: Say,
) -> DiskResults:
    """Every system `repeat` times, the disk's rate measured around each run. A peer that fails is
    noted in `missing`; if sl-serve fails, or needs no disk for the model's own weights,
    BenchError."""
    results = DiskResults()
    say("measuring matrix products")
    results.rates.append(job(RATES, MANY_REQUESTS)["rates"])
    before = bandwidth()
    for system, n_requests in _turns(turn, repeat, results):
        say(f"running {system}, {n_requests} requests, disk at {before.bytes_per_s / 1e9:.2f} GB/s")
        measurement = _measure(results, job, system, n_requests)
        after = bandwidth()
        if measurement is not None:
            results.runs.append(DiskRun(system, n_requests, measurement, before, after))
        before = after
    say("measuring matrix products again")
    results.rates.append(job(RATES, MANY_REQUESTS)["rates"])
    return results


def _turns(
    turn: Sequence[tuple[str, int]], repeat: int, results: DiskResults
) -> Iterator[tuple[str, int]]:
    for _ in range(repeat):
        yield from ((system, n) for system, n in turn if system not in results.missing)


def _measure(results: DiskResults, job: Job, system: str, n_requests: int) -> Measurement | None:
    try:
        measurement = Measurement(**job(system, n_requests))
    except BenchError as error:
        if _is_ours(system):
            raise
        results.missing[system] = f"failed: {error}"
        results.runs = [run for run in results.runs if run.system != system]
        return None
    if system == OURS and not measurement.extras["disk_bytes"]:
        raise BenchError("the model fits into --host-memory; lower it, or give a larger model")
    return measurement


@dataclass(frozen=True, slots=True)
class SubprocessJob:
    """Starts `python -m bench disk-worker` for each job, the page cache dropped."""

    model: Path
    host_memory_bytes: int
    disk_dir: Path

    def __call__(self, system: str, n_requests: int) -> dict[str, Any]:
        """Raises BenchError with the last lines of what a failed worker printed."""
        drop_page_cache(weight_files(self.model))
        command = ["disk-worker", "--system", system]
        command += ["--model", str(self.model), "--requests", str(n_requests)]
        command += ["--host-memory-bytes", str(self.host_memory_bytes)]
        command += ["--disk-dir", str(self.disk_dir)]
        return run_worker(system, command, AS_OURS if _is_ours(system) else None)


def _is_ours(system: str) -> bool:
    return system.partition(":")[0] == OURS


def _checked_weights(comma_separated: str, folder: Path) -> list[str]:
    """Raises UserError for a name that is not known, before minutes are spent."""
    from sl_serve.weights.checkpoint import open_checkpoint
    from sl_serve.weights.requantised import with_weights

    names = [name.strip() for name in comma_separated.split(",") if name.strip()]
    for name in names:
        with_weights(open_checkpoint(folder), name).close()
    return names


def _model(name: str, cache: Path, say: Say) -> Path:
    from bench.random_model import cached_random_model

    if Path(name).is_dir():
        if not weight_files(Path(name)):
            raise BenchError(f"{name}: has no .safetensors file")
        return Path(name)
    return cached_random_model(name, cache, say)
