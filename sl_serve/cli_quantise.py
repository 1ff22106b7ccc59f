"""The command `quantise`: weights in few bits, calibrated once, in a folder that loads as it is."""

from __future__ import annotations

from contextlib import closing

import typer
from rich.console import Console
from rich.progress import (
    BarColumn,
    MofNCompleteColumn,
    Progress,
    TextColumn,
    TimeRemainingColumn,
)

from sl_serve import cli_command_options as c
from sl_serve import cli_options as o
from sl_serve.config import EngineConfig
from sl_serve.plan.budget import parse_size

DEFAULT_TOKENS = 32_768


def register(app: typer.Typer) -> None:
    app.command()(quantise)


def quantise(
    model: o.Model,
    out: c.Out,
    weights: c.CalibratedWeights = "int4",
    text: c.CalibrationText = None,
    tokens: c.CalibrationTokens = DEFAULT_TOKENS,
    host_memory: o.HostMemory = None,
    disk_dir: o.DiskDir = None,
    threads: o.Threads = None,
) -> None:
    """Quantise MODEL once, calibrated with a text (GPTQ), into OUT: a folder to serve.

    One layer at a time is in memory, and all hidden states of the text."""
    import torch

    from sl_serve.llm import open_model
    from sl_serve.quantising.folder import check_absent
    from sl_serve.quantising.run import check_weights, quantise_model
    from sl_serve.quantising.text import calibration_windows

    check_weights(weights)
    check_absent(out)
    config = EngineConfig(
        host_memory_bytes=None if host_memory is None else parse_size(host_memory),
        disk_dir=disk_dir,
        n_threads=threads,
    )
    if threads is not None:
        torch.set_num_threads(threads)
    console = Console(stderr=True, highlight=False)
    columns = (TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn())
    bar = Progress(*columns, TimeRemainingColumn(), console=console)
    with closing(open_model(model, progress=console.print)) as checkpoint, bar:
        reading = bar.add_task("tokens to calibrate with", total=tokens)
        windows = calibration_windows(
            model, checkpoint, text, tokens, config, lambda n: bar.advance(reading, n)
        )
        bar.update(reading, total=windows.numel(), completed=windows.numel())
        layers = bar.add_task("layers", total=checkpoint.config.n_layers)
        quantise_model(checkpoint, weights, windows, out, lambda: bar.advance(layers))
    print(out)
