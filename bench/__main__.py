"""`python -m bench`: list, run, and the worker that `run` starts for each system."""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import Annotated, Any

import typer
from rich.console import Console

from bench import attention, batch, decode, disk, gpu, quality
from bench.cases import CASES, find_case
from bench.errors import BenchError
from bench.machine import about_now
from bench.peers import is_installed
from bench.runner import SubprocessJob, model_of, run_case
from bench.worker import run_job
from sl_serve.errors import UserError

app = typer.Typer(add_completion=False, no_args_is_help=True, help="Named cases, side by side.")


@app.command("list")
def list_cases() -> None:
    """The cases."""
    for case in CASES.values():
        print(f"{case.name:24} {case.about}")


@app.command()
def run(
    case_name: Annotated[str, typer.Option("--case", help="One of those that `list` shows.")],
    peers: Annotated[str, typer.Option(help="Comma-separated, e.g. transformers.")] = "",
    json_path: Annotated[Path | None, typer.Option("--json", help="Where to write it all.")] = None,
    repeat: Annotated[int, typer.Option(min=1, help="Runs of each system, in turns.")] = 1,
) -> None:
    """Measure sl-serve and its peers, each in a process of its own."""
    from bench.bound import model_matrices, read_model_config
    from bench.report import build_report, render

    case = find_case(case_name)
    names = [name for name in peers.split(",") if name]
    for name in names:
        is_installed(name)  # an unknown name is told before minutes are spent
    progress = Console(stderr=True, log_path=False)
    about = about_now()
    with model_of(case) as model:
        job = SubprocessJob(case, model)
        results = run_case(case, names, repeat, job, progress.log)
        report = about | build_report(results, model_matrices(read_model_config(model)))
    Console().print(render(report))
    if json_path is not None:
        json_path.write_text(json.dumps(report, indent=2) + "\n")


@app.command()
def predict(
    case_names: Annotated[
        str, typer.Option("--case", help="On this machine, then run; comma-separated.")
    ] = "",
    flexgen: Annotated[bool, typer.Option("--flexgen", help="On FlexGen's, published.")] = False,
    simulate: Annotated[
        str, typer.Option(help="On a profile, such as t4, stepped through on the virtual clock.")
    ] = "",
    shape: Annotated[
        str, typer.Option(help="Model to simulate, with random weights.")
    ] = "opt-125m",
    json_path: Annotated[Path | None, typer.Option("--json", help="Where to write it all.")] = None,
) -> None:
    """What the planner predicts, beside what is measured, simulated or was published."""
    from bench import predict as p
    from bench.simulate import simulation, simulation_table

    if bool(case_names) + flexgen + bool(simulate) != 1:
        raise BenchError("give one of --case NAME, --flexgen and --simulate PROFILE")
    if simulate:
        report = simulation(shape, simulate)
        Console().print(simulation_table(report))
        _write(report, json_path)
        return
    if flexgen:
        rows = p.predict_flexgen()
        Console().print(p.flexgen_table(rows))
        _write({"rows": rows}, json_path)
        return
    cases = [find_case(name) for name in case_names.split(",")]
    progress = Console(stderr=True, log_path=False)
    reports = []
    for case in cases:
        with model_of(case) as model:
            reports.append(p.predict_case(case, model, SubprocessJob(case, model), progress.log))
    Console().print(p.cases_table(reports))
    _write({"cases": reports}, json_path)


def _write(report: dict[str, Any], json_path: Path | None) -> None:
    """With where and when it was made."""
    if json_path is None:
        return
    json_path.write_text(json.dumps(about_now() | report, indent=2) + "\n")


@app.command(hidden=True)
def worker(
    case_name: Annotated[str, typer.Option("--case")],
    system: Annotated[str, typer.Option()],
    json_path: Annotated[Path, typer.Option("--json")],
    model: Annotated[Path | None, typer.Option()] = None,
) -> None:
    """One job in this process; see bench.worker."""
    case = find_case(case_name)
    if model is not None:
        json_path.write_text(json.dumps(run_job(case, system, model)))
        return
    with model_of(case) as found:
        json_path.write_text(json.dumps(run_job(case, system, found)))


app.command("attention")(attention.run)
app.command("batch")(batch.run)
app.command("batch-worker", hidden=True)(batch.worker)
app.command("decode")(decode.run)
app.command("decode-worker", hidden=True)(decode.worker)
app.command("gpu")(gpu.run)
app.command("gpu-worker", hidden=True)(gpu.worker)
app.command("quality")(quality.run)
app.command("disk")(disk.run)
app.command("disk-worker", hidden=True)(disk.worker)


def main() -> None:
    try:
        app()
    except UserError as error:
        print(f"bench: {error}", file=sys.stderr)
        sys.exit(2)


if __name__ == "__main__":
    main()
