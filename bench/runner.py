"""Runs a case: each system in a process of its own, in turns, the bound before and after them."""

from __future__ import annotations

import sys
import tempfile
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from bench.cases import RANDOM_MODEL, TINY_MODEL, Case
from bench.errors import BenchError
from bench.measurement import Measurement
from bench.peers import Probe, is_installed
from bench.worker_process import run_worker

Job = Callable[[str], dict[str, Any]]  # a worker's system name -> the JSON it wrote
Say = Callable[[str], None]

OURS = "sl-serve"
PLACEMENT = "placement"  # what sl-serve would do, without doing it


@dataclass(slots=True)
class Results:
    """All that a comparison needs. `runs` has a list of full runs per system that could run."""

    case: Case
    bound_rates: list[dict[str, float]] = field(default_factory=list)
    runs: dict[str, list[Measurement]] = field(default_factory=dict)
    probes: dict[str, Probe] = field(default_factory=dict)
    missing: dict[str, str] = field(default_factory=dict)  # peer -> why it has no figures


def run_case(case: Case, peers: Sequence[str], repeat: int, job: Job, say: Say) -> Results:
    """Measures sl-serve and every peer `repeat` times.

    A peer that is not installed or fails is noted in `missing`; if sl-serve fails, BenchError.
    """
    results = Results(case)
    installed = {peer: is_installed(peer) for peer in peers}
    results.missing = {p: "not installed" for p, there in installed.items() if not there}
    say("measuring the bound")
    results.bound_rates.append(job("bound")["rates"])
    systems = [OURS]
    for peer in (p for p, there in installed.items() if there):
        systems += _probe(results, peer, job, say)
    for turn in range(repeat):
        for system in [s for s in systems if s not in results.missing]:
            say(f"running {system} ({turn + 1} of {repeat})")
            _measure(results, system, job)
    say("measuring the bound again")
    results.bound_rates.append(job("bound")["rates"])
    return results


def _probe(results: Results, peer: str, job: Job, say: Say) -> list[str]:
    """The peer's variants worth a full run, as system names."""
    say(f"trying the settings of {peer}")
    try:
        probe = Probe(**job(f"{peer}:probe"))
    except BenchError as error:
        results.missing[peer] = f"failed: {error}"
        return []
    results.probes[peer] = probe
    return [f"{peer}:{variant}" for variant in probe.variants]


def _measure(results: Results, system: str, job: Job) -> None:
    try:
        measurement = Measurement(**job(system))
    except BenchError as error:
        if system == OURS:
            raise
        results.runs.pop(system, None)
        results.missing[system] = f"failed: {error}"
        return
    results.runs.setdefault(system, []).append(measurement)


@contextmanager
def model_of(case: Case) -> Iterator[Path]:
    """The case's model on this machine."""
    if case.model == RANDOM_MODEL:
        from bench.random_model import cached_random_model
        from sl_serve.weights.demo_model import cache_folder

        shape = RANDOM_MODEL.removeprefix("random-")
        yield cached_random_model(shape, cache_folder(), lambda said: print(said, file=sys.stderr))
        return
    if case.model != TINY_MODEL:
        from sl_serve.weights.locate import resolve_model

        yield resolve_model(case.model)
        return
    from bench.tiny import write_tiny_llama

    with tempfile.TemporaryDirectory(prefix="sl-serve-bench-") as folder:
        yield write_tiny_llama(Path(folder))


@dataclass(frozen=True, slots=True)
class SubprocessJob:
    """Starts `python -m bench worker` for each job."""

    case: Case
    model: Path

    def __call__(self, system: str) -> dict[str, Any]:
        """Raises BenchError with the last lines of what a failed worker printed."""
        model = ["--model", str(self.model)]
        return run_worker(system, ["worker", "--case", self.case.name, "--system", system, *model])
