"""The command `run-batch`: a file's lines through a model, without a server."""

from __future__ import annotations

import signal
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer
from rich.console import Console

from sl_serve import cli_command_options as c
from sl_serve import cli_options as o
from sl_serve.cli_batch_bar import BatchBar, batch_option
from sl_serve.cli_option_groups import EngineOptions, StepOptions, with_options
from sl_serve.config import EngineConfig
from sl_serve.errors import UserError

if TYPE_CHECKING:  # these import torch or the server's packages, which take seconds
    from server.batch.file_run import RunPaths

INTERRUPTED = 130  # exit code of a process ended by SIGINT

Input = Annotated[Path, batch_option("--input", "-i", "JSON lines, as for OpenAI's batches.")]
Output = Annotated[
    Path, batch_option("--output", "-o", "Answers; lines that failed go beside it (.errors).")
]
Resume = Annotated[
    bool, batch_option("--resume", "-r", "Continue what was interrupted; does no line twice.")
]
BatchSeed = Annotated[int, batch_option("--seed", "-s", "For lines that have none of their own.")]


def register(app: typer.Typer) -> None:
    app.command()(with_options(run_batch))


def run_batch(
    model: o.Model,
    source: Input,
    output: Output,
    *,
    resume: Resume = False,
    seed: BatchSeed = 0,
    served_model_name: c.ServedNames = None,
    options: EngineOptions,
    step: StepOptions,
) -> None:
    """Run every line of a file through MODEL. Ctrl-C loses nothing: --resume goes on."""
    from server.batch.file_run import RunPaths
    from sl_serve.cli_load import model_name
    from sl_serve.llm import UNBOUNDED_QUEUE

    console = Console(stderr=True, highlight=False)
    paths = RunPaths(source, output)
    if paths.is_done(resume):
        console.print(f"{output} is complete already")
        return
    config = options.config(step, UNBOUNDED_QUEUE)
    tuned = options.is_tuned(step)
    names = tuple(served_model_name or (model_name(model),))
    raise typer.Exit(_run(console, model, config, tuned, names, paths, seed))


def _run(
    console: Console,
    model: str,
    config: EngineConfig,
    tuned: bool,
    names: tuple[str, ...],
    paths: RunPaths,
    seed: int,
) -> int:
    """Exit code: 0, or 1 if lines failed, or 130 when interrupted."""
    from server.batch.file_run import clear, complaints, run_file
    from server.batch.service import BatchService
    from server.context import ServerContext
    from server.logs import configure_logging
    from server.settings import ServerSettings
    from sl_serve.cli_load import load_engine

    configure_logging(as_json=False)
    with ExitStack() as stack:
        stack.enter_context(_interruptible(console, paths))
        engine = load_engine(model, config, console, tuned=tuned)
        stack.callback(engine.close)
        settings = ServerSettings(served_model_names=names)
        context = ServerContext(engine, settings)
        stack.callback(context.close)
        service = context.batches = BatchService(context, paths.folder)
        stack.callback(engine.drain, settings.drain_timeout_s)  # a step may take long
        stack.callback(service.pause)
        bar = stack.enter_context(BatchBar(console))
        batch = run_file(service, engine, paths, seed, bar.show)
    clear(paths)
    if batch.errors is not None:
        raise UserError(f"{paths.source} was refused, nothing ran: {complaints(batch)}")
    console.print(f"{batch.completed} answers in {paths.output}")
    if batch.failed:
        console.print(f"[red]{batch.failed} lines failed[/]: {paths.errors}")
    return int(batch.failed > 0)


@contextmanager
def _interruptible(console: Console, paths: RunPaths) -> Iterator[None]:
    """SIGINT and SIGTERM end the run in order, once; what has come is kept."""

    def interrupt(number: int, _: object) -> None:
        signal.signal(number, signal.SIG_IGN)
        raise KeyboardInterrupt

    before = signal.signal(signal.SIGTERM, interrupt)
    try:
        yield
    except KeyboardInterrupt:
        console.print(f"interrupted; --resume goes on with what is in {paths.folder}")
        raise typer.Exit(INTERRUPTED) from None
    finally:
        signal.signal(signal.SIGTERM, before)
