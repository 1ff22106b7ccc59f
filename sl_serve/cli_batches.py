"""The commands `batches`: jobs of a running server."""

from __future__ import annotations

import sys
import time
from collections.abc import Iterator
from contextlib import closing, contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer
from rich.console import Console
from rich.table import Table

from sl_serve.cli_batch_bar import BatchBar, batch_option, details
from sl_serve.errors import SlServeError

if TYPE_CHECKING:
    from clients.batches import Batches

CLIENT = "Server to ask"
POLL_S = 1.0

batches_app = typer.Typer(no_args_is_help=True, help="Batch jobs of a running server.")


def register(app: typer.Typer) -> None:
    app.add_typer(batches_app, name="batches")


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
    str, batch_option("--window", "-w", "Time to completion, like 24h or 7d; then it expires.")
]
Key = Annotated[
    str | None, batch_option("--key", "-k", "Idempotency key: the same one, the same batch.")
]
ResultFile = Annotated[
    Path | None, batch_option("--results", "-o", "Where to; default: standard output.")
]


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
        table.add_row(batch["id"], batch["status"], *counts, details(batch))
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
