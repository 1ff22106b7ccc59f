"""`python -m bench gpu`: models larger than the GPU's memory, beside peers that offload too."""

from __future__ import annotations

import json
import subprocess
import sys
import tempfile
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer
from rich.console import Console

from bench.errors import BenchError
from bench.gpu_cases import GPU_CASES, GpuCase, find_gpu_cases
from bench.machine import about_now
from bench.runner import OURS

if TYPE_CHECKING:
    from bench.gpu_report import GpuResults

LINK = "link"
PEERS = ("accelerate", "flexgen", "vllm")

Job = Callable[[str, str], dict[str, Any]]  # system, case name -> what the worker wrote
Say = Callable[[str], None]


def run(
    cases: Annotated[
        str, typer.Option(help="Comma-separated names, or beginnings of names. Default: all.")
    ] = "",
    peers: Annotated[str, typer.Option(help="Comma-separated.")] = ",".join(PEERS),
    json_path: Annotated[Path | None, typer.Option("--json", help="Where to write it all.")] = None,
    timeline: Annotated[Path | None, typer.Option(help="Folder for SVGs of one step each.")] = None,
) -> None:
    """Measure sl-serve and its peers on the GPU, each in a process of its own."""
    from bench.gpu_report import build_report, render

    progress = Console(stderr=True, log_path=False)
    chosen = find_gpu_cases(cases)
    names = [name for name in peers.split(",") if name]
    unknown = set(names) - set(PEERS)
    if unknown:
        raise BenchError(f"no peer is named {unknown.pop()!r}; there are: {', '.join(PEERS)}")
    progress.log("measuring the link")
    link = start_worker(LINK, "")
    reports = [build_report(run_case(c, link, names, start_worker, progress.log)) for c in chosen]
    Console().print(render(link, reports))
    if timeline is not None:
        write_timelines(reports, timeline)
    if json_path is not None:
        json_path.write_text(
            json.dumps(about_now() | {"link": link, "cases": reports}, indent=2) + "\n"
        )


def worker(
    system: Annotated[str, typer.Option()],
    json_path: Annotated[Path, typer.Option("--json")],
    case_name: Annotated[str, typer.Option("--case")] = "",
) -> None:
    """One job in this process."""
    json_path.write_text(json.dumps(run_job(system, case_name)))


def run_job(system: str, case_name: str) -> dict[str, Any]:
    """`system` is "link", "sl-serve" or a peer; the answer is JSON-ready."""
    from bench import gpu_work

    if system == LINK:
        return gpu_work.measure_link()
    case = GPU_CASES[case_name]
    if system == OURS:
        return gpu_work.measure_ours(case)
    from bench.gpu_peers import MEASURE, PACKAGES, find_module

    if find_module(PACKAGES[system]) is None:
        raise BenchError("not installed")
    return MEASURE[system](case)


def run_case(
    case: GpuCase, link: dict[str, Any], peers: Sequence[str], job: Job, say: Say
) -> GpuResults:
    """Every system once; one that cannot run is noted, with its last words."""
    from bench.gpu_report import GpuResults

    results = GpuResults(case, link)
    for system in (OURS, *peers):
        say(f"{case.name}: {system}")
        try:
            results.runs[system] = job(system, case.name)
        except BenchError as error:
            results.missing[system] = str(error)
    return results


def start_worker(system: str, case_name: str) -> dict[str, Any]:
    """Raises BenchError with the last line of what a failed worker printed."""
    with tempfile.TemporaryDirectory(prefix="sl-serve-bench-") as folder:
        answer = Path(folder) / "answer.json"
        command = [sys.executable, "-m", "bench", "gpu-worker", "--system", system]
        command += ["--case", case_name, "--json", str(answer)]
        done = subprocess.run(command, capture_output=True, text=True, check=False)
        if done.returncode:
            lines = done.stderr.strip().splitlines() or ["it printed nothing"]
            raise BenchError(lines[-1].removeprefix("bench: "))
        result: dict[str, Any] = json.loads(answer.read_text())
        return result


def write_timelines(reports: Sequence[dict[str, Any]], folder: Path) -> None:
    from bench.timeline import Timeline, draw
    from sl_serve.device import Span

    folder.mkdir(parents=True, exist_ok=True)
    for report in reports:
        ours = report["systems"].get(OURS)
        if ours is not None:
            spans = [Span(**span) for span in ours["timeline"]["spans"]]
            image = draw(Timeline.of(spans), f"{report['case']}: one step")
            (folder / f"{report['case']}.svg").write_text(image)
