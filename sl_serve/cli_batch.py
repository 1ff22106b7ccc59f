"""The commands `run-batch`, without a server, and `batches`, against a running one."""

from __future__ import annotations

import signal
import sys
import time
from collections.abc import Iterator
from contextlib import ExitStack, closing, contextmanager
from datetime import timedelta
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TaskID, TextColumn
from rich.table import Table

from sl_serve import cli_options as o
from sl_serve.config import EngineConfig
from sl_serve.errors import SlServeError, UserError

if TYPE_CHECKING:  # these import torch or the server's packages, which take seconds
    from clients.batches import Batches
    from server.batch.file_run import RunPaths

BATCH, CLIENT = "Batch", "Server to ask"
INTERRUPTED = 130  # exit code of a process ended by SIGINT
POLL_S = 1.0

batches_app = typer.Typer(no_args_is_help=True, help="Batch jobs of a running server.")


def register(app: typer.Typer) -> None:
    app.command()(run_batch)
    app.add_typer(batches_app, name="batches")


def _batch_option(flag: str, short: str, help_text: str) -> Any:
    variable = "SL_SERVE_BATCH_" + flag.removeprefix("--").replace("-", "_").upper()
    return typer.Option(flag, short, envvar=variable, rich_help_panel=BATCH, help=help_text)


Input = Annotated[Path, _batch_option("--input", "-i", "JSON lines, as for OpenAI's batches.")]
Output = Annotated[
    Path, _batch_option("--output", "-o", "Answers; lines that failed go beside it (.errors).")
]
Resume = Annotated[
    bool, _batch_option("--resume", "-r", "Continue what was interrupted; does no line twice.")
]
BatchSeed = Annotated[int, _batch_option("--seed", "-s", "For lines that have none of their own.")]
BatchId = Annotated[str, typer.Argument(metavar="BATCH", help="Its id: batch_...")]
Url = Annotated[
    str | None,
    typer.Option(
        envvar="SL_SERVE_URL", rich_help_panel=CLIENT, help="Default: http://127.0.0.1:8000."
    ),
]
ClientKey = Annotated[
    str | None, typer.Option(envvar="SL_SERVE_API_KEY", rich_help_panel=CLIENT, help="If it asks.")
]
Window = Annotated[
    str, _batch_option("--window", "-w", "Time to completion, like 24h or 7d; then it expires.")
]
Key = Annotated[
    str | None, _batch_option("--key", "-k", "Idempotency key: the same one, the same batch.")
]
ResultFile = Annotated[
    Path | None, _batch_option("--results", "-o", "Where to; default: standard output.")
]


def run_batch(
    model: o.Model,
    source: Input,
    output: Output,
    resume: Resume = False,
    seed: BatchSeed = 0,
    served_model_name: o.ServedNames = None,
    device: o.Device = "cpu",
    dtype: o.DType = None,
    kv_dtype: o.KvDType = "auto",
    load_format: o.Load = "auto",
    weights: o.Weights = "auto",
    kv_memory: o.KvMemory = None,
    host_memory: o.HostMemory = None,
    device_memory: o.DeviceMemory = None,
    disk_dir: o.DiskDir = None,
    max_model_len: o.MaxModelLen = None,
    max_rows: o.MaxRows = None,
    sub_batches: o.SubBatches = None,
    prefill_tokens: o.PrefillTokens = None,
    look_ahead: o.LookAhead = o.DEFAULTS.look_ahead,
    attention: o.Attention = "auto",
    activations: o.Activations = "float32",
    threads: o.Threads = None,
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
    config = o.engine_config(
        device=device,
        dtype=dtype,
        kv_dtype=kv_dtype,
        load_format=load_format,
        weights=weights,
        kv_memory=kv_memory,
        host_memory=host_memory,
        device_memory=device_memory,
        disk_dir=disk_dir,
        max_model_len=max_model_len,
        max_rows=max_rows,
        sub_batches=sub_batches,
        prefill_tokens=prefill_tokens,
        look_ahead=look_ahead,
        attention=attention,
        activations=activations,
        threads=threads,
        queue=UNBOUNDED_QUEUE,
    )
    tuned = o.is_tuned(device, max_rows, sub_batches)
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


class BatchBar:
    """A batch object, as a progress bar; of the same look here and in `batches watch`."""

    def __init__(self, console: Console) -> None:
        columns = (TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn())
        details = TextColumn("{task.fields[details]}")
        self._bar = Progress(*columns, details, console=console)
        self._task: TaskID = self._bar.add_task("validating", total=None, details="")

    def __enter__(self) -> BatchBar:
        self._bar.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._bar.stop()

    def show(self, batch: dict[str, Any]) -> None:
        progress = batch["progress"]
        self._bar.update(
            self._task,
            description=batch["status"],
            completed=progress["lines"],
            total=progress["total"] or None,
            details=_details(batch),
        )


def _details(batch: dict[str, Any]) -> str:
    progress, failed = batch["progress"], batch["request_counts"]["failed"]
    parts = [f"{failed} failed"] if failed else []
    if progress["tokens_per_second"] is not None:
        parts.append(f"{progress['tokens_per_second']:.1f} tokens/s")
    if progress["expected_at"] is not None:
        left_s = max(0, progress["expected_at"] - int(time.time()))
        parts.append(f"{timedelta(seconds=left_s)} left")
    return ", ".join(parts)


@contextmanager
def _server(url: str | None, api_key: str | None) -> Iterator[Batches]:
    from clients.batches import Batches
    from clients.client import Client
    from clients.protocol import ClientError

    try:
        with Client(url, api_key=api_key) as client:
            yield Batches(client)
    except ClientError as error:
        raise SlServeError(str(error)) from None


@batches_app.command()
def submit(
    path: Annotated[Path, typer.Argument(metavar="FILE", help="JSON lines.")],
    window: Window = "24h",
    key: Key = None,
    url: Url = None,
    api_key: ClientKey = None,
) -> None:
    """Upload FILE, make a batch of it and print its id."""
    with _server(url, api_key) as batches:
        print(batches.submit(path, window, key)["id"])


@batches_app.command("list")
def list_batches(
    limit: Annotated[int, typer.Option("--limit", "-n", envvar="SL_SERVE_BATCH_LIMIT")] = 20,
    url: Url = None,
    api_key: ClientKey = None,
) -> None:
    """The newest batches."""
    with _server(url, api_key) as batches:
        newest = batches.newest(limit)
    table = Table("batch", "status", "done", "failed", "total", "")
    for batch in newest:
        counts = [str(batch["request_counts"][name]) for name in ("completed", "failed", "total")]
        table.add_row(batch["id"], batch["status"], *counts, _details(batch))
    Console(highlight=False, soft_wrap=True).print(table)


@batches_app.command()
def watch(batch_id: BatchId, url: Url = None, api_key: ClientKey = None) -> None:
    """Show how BATCH gets on until it has ended. Ctrl-C stops looking, not the batch."""
    from clients.batches import ENDED

    with _server(url, api_key) as batches, BatchBar(Console(stderr=True)) as bar:
        while True:
            batch = batches.get(batch_id)
            bar.show(batch)
            if batch["status"] in ENDED:
                break
            time.sleep(POLL_S)
    print(batch["status"])
    for error in (batch["errors"] or {}).get("data", []):
        Console(stderr=True).print(f"line {error['line']}: {error['message']}", markup=False)
    raise typer.Exit(0 if batch["status"] == "completed" else 1)


@batches_app.command()
def cancel(batch_id: BatchId, url: Url = None, api_key: ClientKey = None) -> None:
    """Stop BATCH; lines that have ended are kept."""
    with _server(url, api_key) as batches:
        print(batches.cancel(batch_id)["status"])


@batches_app.command()
def retry(batch_id: BatchId, url: Url = None, api_key: ClientKey = None) -> None:
    """Run the lines of BATCH again that failed or never ran."""
    with _server(url, api_key) as batches:
        print(batches.retry(batch_id)["status"])


@batches_app.command()
def results(
    batch_id: BatchId, to: ResultFile = None, url: Url = None, api_key: ClientKey = None
) -> None:
    """Fetch answers and errors of BATCH as JSON lines, those that there are so far."""
    with _server(url, api_key) as batches:
        pieces = batches.results(batch_id)
        if to is None:
            for piece in pieces:
                sys.stdout.buffer.write(piece)
            sys.stdout.buffer.flush()
            return
        with closing(to.open("wb")) as file:
            file.writelines(pieces)
