"""The command `sl-serve`. Answers go to standard output, everything else to standard error."""

from __future__ import annotations

import json
import logging
import os
import sys
from contextlib import closing
from typing import Annotated

import typer
from rich.console import Console

from sl_serve import __version__, cli_batches, cli_plan, cli_quantise, cli_run_batch
from sl_serve import cli_command_options as c
from sl_serve import cli_options as o
from sl_serve.cli_option_groups import EngineOptions, StepOptions, with_options
from sl_serve.config import QueueConfig
from sl_serve.core import SamplingParams
from sl_serve.errors import SlServeError, UserError

app = typer.Typer(
    name="sl-serve",
    no_args_is_help=True,
    pretty_exceptions_enable=False,
    help="Language-model inference for models larger than the accelerator: layers stream through "
    "it once per step, many requests pass through each. Every flag is also an environment "
    "variable, shown beside it.",
)
console = Console(stderr=True, highlight=False)
# OpenMP's default lets a waiting thread spin for milliseconds on a core that the event loop or a
# client on the same machine needs: with one busy neighbour on 2 cores, matmuls ran at 25 GFLOP/s;
# with this they run at 60, and as fast as before (160) when undisturbed.
OPENMP_SPINS = "20000"
QUEUE_DEFAULTS = QueueConfig()


@app.command()
@with_options
def serve(
    model: o.Model,
    *,
    host: c.Host = "127.0.0.1",
    port: c.Port = 8000,
    served_model_name: c.ServedNames = None,
    tool_parser: c.ToolParser = "auto",
    drain_timeout: c.DrainTimeout = 30.0,
    stall_floor: c.StallFloor = 120.0,
    log_json: c.LogJson = False,
    api_key: c.ApiKeys = None,
    allowed_host: c.AllowedHosts = None,
    cors_origin: c.CorsOrigins = None,
    jobs_dir: c.JobsDir = None,
    jobs_quota: c.JobsQuota = None,
    options: EngineOptions,
    step: StepOptions,
    queue_requests: o.QueueRequests = QUEUE_DEFAULTS.max_requests,
    queue_tokens: o.QueueTokens = QUEUE_DEFAULTS.max_tokens,
) -> None:
    """Serve MODEL over HTTP with OpenAI's API, until SIGTERM or Ctrl-C."""
    from server.batch.service import check_folder
    from server.run import EXIT_S, bind, end_within
    from server.run import serve as run_server
    from server.settings import ServerSettings
    from sl_serve.cli_load import load_engine, model_name
    from sl_serve.plan.budget import parse_size

    settings = ServerSettings(
        served_model_names=tuple(served_model_name or (model_name(model),)),
        api_keys=tuple(api_key or ()),
        host=host,
        port=port,
        allowed_hosts=tuple(allowed_host or ()),
        cors_origins=tuple(cors_origin or ()),
        tool_parser=tool_parser,
        drain_timeout_s=drain_timeout,
        stall_floor_s=stall_floor,
        log_json=log_json,
        jobs_dir=jobs_dir,
        jobs_quota_bytes=None if jobs_quota is None else parse_size(jobs_quota),
    )
    config = options.config(step, QueueConfig(queue_requests, queue_tokens))
    # before the model is loaded: a taken port or a folder that cannot be used is known at once
    listener = bind(host, port)
    if jobs_dir is not None:
        check_folder(jobs_dir)
    tuned = options.is_tuned(step)
    with closing(listener):
        engine = load_engine(model, config, console, tuned=tuned)
        code = run_server(engine, settings, listener)
    end_within(EXIT_S, code)
    raise typer.Exit(code)


@app.command()
@with_options
def generate(
    model: o.Model,
    prompt: c.Prompt,
    *,
    as_json: c.AsJson = False,
    chat: c.Chat = False,
    max_tokens: c.MaxTokens = None,
    temperature: c.Temperature = 0.0,
    top_p: c.TopP = 1.0,
    top_k: c.TopK = 0,
    seed: c.Seed = None,
    stop: c.Stop = None,
    options: EngineOptions,
) -> None:
    """Continue one prompt with MODEL and print the text as it comes."""
    from sl_serve.cli_load import generate_once, load_engine

    sampling = SamplingParams(
        max_tokens=max_tokens,
        temperature=temperature,
        top_p=top_p or 1.0,
        top_k=top_k,
        seed=seed,
        stop=tuple(stop or ()),
    )
    config = options.config(StepOptions(max_rows=1, sub_batches=1), QUEUE_DEFAULTS)
    engine = load_engine(model, config, console, quiet=as_json)
    try:
        text = sys.stdin.read() if prompt == "-" else prompt
        answer = generate_once(engine, text, sampling, chat=chat, show=not as_json)
    finally:
        engine.close()
    if as_json:
        print(json.dumps({"model": model, "prompt": text, **answer}, ensure_ascii=False))


@app.command()
def pull(
    name: Annotated[
        str, typer.Argument(metavar="NAME", help="A Hugging Face id (org/name), or smollm2.")
    ],
) -> None:
    """Fetch a model into the local cache and print where it lies."""
    from sl_serve.weights.locate import pull as fetch

    print(fetch(name, console.print))


cli_plan.register(app)
cli_run_batch.register(app)
cli_batches.register(app)
cli_quantise.register(app)


def _print_version(wanted: bool) -> None:
    if wanted:
        print(f"sl-serve {__version__}")
        raise typer.Exit


@app.callback()
def _root(
    _version: Annotated[
        bool,
        typer.Option("--version", callback=_print_version, is_eager=True, help="Print and exit."),
    ] = False,
) -> None:
    logging.basicConfig(format="%(levelname)s %(name)s: %(message)s", level=logging.WARNING)


def main() -> None:
    """Entry point: a user's mistake is one sentence and exit code 2, an engine failure 1."""
    os.environ.setdefault("GOMP_SPINCOUNT", OPENMP_SPINS)  # read when torch is imported, later
    try:
        app()
    except UserError as error:
        console.print(f"[bold red]error:[/] {error}", markup=True, soft_wrap=True)
        sys.exit(2)
    except SlServeError as error:
        console.print(f"[bold red]failed:[/] {error}", soft_wrap=True)
        sys.exit(1)
