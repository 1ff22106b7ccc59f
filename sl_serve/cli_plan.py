"""The commands `plan` and `doctor`. What they find goes to standard output."""

from __future__ import annotations

import json
import os
import shlex
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import asdict, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

import typer
from rich.console import Console
from rich.progress import Progress, SpinnerColumn, TextColumn, TimeElapsedColumn

from sl_serve import cli_command_options as c
from sl_serve import cli_options as o
from sl_serve.cli_option_groups import default_dtype
from sl_serve.config import KVDTypeName
from sl_serve.errors import UserError
from sl_serve.plan.budget import parse_size

if TYPE_CHECKING:  # these import torch, which takes seconds
    from sl_serve.plan.hardware import Hardware
    from sl_serve.plan.planner import Budgets
    from sl_serve.weights.checkpoint import Checkpoint


def register(app: typer.Typer) -> None:
    app.command()(plan)
    app.command()(doctor)


def plan(
    model: o.Model,
    profile: c.Profile = None,
    prompt: c.PromptTokens = 512,
    gen: c.OutputTokens = 128,
    requests: c.Requests = 256,
    device_memory: o.DeviceMemory = None,
    host_memory: o.HostMemory = None,
    disk_dir: c.MeasuredDir = None,
    load_format: o.Load = "auto",
    weights: o.Weights = "auto",
    attention: o.Attention = "auto",
    kv_dtype: o.KvDType = "auto",
    threads: o.Threads = None,
    as_json: c.ReportJson = False,
) -> None:
    """Tell what would go where, how fast MODEL would run, and what would help; loads nothing."""
    from sl_serve.kv.formats import kv_format
    from sl_serve.plan.model_reader import (
        compute_dtype,
        read_sizes,
        stored_dtype,
        stored_formats,
        torch_dtype,
    )
    from sl_serve.plan.placement import Workload
    from sl_serve.plan.planner import choose, engine_abilities
    from sl_serve.plan.probe import measurable_folder
    from sl_serve.plan.report import plan_dict, plan_view
    from sl_serve.plan.what_if import what_helps

    with _opened(model, load_format, weights) as checkpoint:
        settings, stored = checkpoint.config, stored_dtype(checkpoint)
        folder = measurable_folder(disk_dir, checkpoint.path)
        hardware = (
            _profile(profile) if profile else _measured(checkpoint, folder, threads, kv_dtype)
        )
        has_device = hardware.has_device
        formats = stored_formats(checkpoint, has_device)
    if has_device and formats:
        stored = "bfloat16"  # what blocks are expanded to there, unless --dtype says otherwise
    compute = compute_dtype(stored, has_device)
    dtypes, kv = (torch_dtype(stored), torch_dtype(compute)), kv_format(kv_dtype, compute)
    sizes = read_sizes(model, settings, *dtypes, formats, has_device, kv)
    workload = Workload(prompt, gen, requests)
    budgets = _budgets(hardware, device_memory, host_memory)
    abilities = engine_abilities(attention)
    chosen = choose(sizes, hardware, budgets, workload, abilities)
    helps = what_helps(sizes, hardware, budgets, workload, chosen, abilities)
    default = default_dtype("cuda" if has_device else "cpu")
    told = _flags(
        device="cuda" if has_device else None,
        dtype=None if compute == default else compute,
        weights=weights,
        kv_dtype=kv_dtype,
        attention=None if attention == "host" else attention,  # which the placement says
        device_memory=device_memory,
        host_memory=host_memory,
        disk_dir=disk_dir,
        load_format="dummy" if _is_shape(model) else load_format,
        threads=threads,
    )
    if as_json:
        print(json.dumps(plan_dict(sizes, hardware, budgets, workload, chosen, helps, told)))
    else:
        Console().print(plan_view(sizes, hardware, budgets, workload, chosen, helps, told))


def doctor(disk_dir: c.MeasuredDir = None, as_json: c.ReportJson = False) -> None:
    """Measure this machine and tell what keeps it from its best."""
    from sl_serve.plan.doctor import examine
    from sl_serve.plan.facts import gather
    from sl_serve.plan.report import doctor_view

    with _progress() as say:
        facts = gather(None if disk_dir is None else Path(disk_dir), say)
    findings = examine(facts)
    if as_json:
        print(json.dumps({"facts": asdict(facts), "findings": [asdict(f) for f in findings]}))
    else:
        Console().print(doctor_view(facts, findings))


@contextmanager
def _opened(model: str, load_format: Any, weights: str) -> Iterator[Checkpoint]:
    """Headers only. The name of a built-in shape needs no --load-format."""
    from sl_serve.llm import open_model
    from sl_serve.weights.requantised import with_weights

    checkpoint = open_model(model, "dummy" if _is_shape(model) else load_format)
    try:
        yield with_weights(checkpoint, weights)
    finally:
        checkpoint.close()


def _is_shape(model: str) -> bool:
    from sl_serve.weights.shapes import SHAPES

    return model in SHAPES and not os.path.exists(model)


def _flags(**options: str | int | None) -> list[str]:
    """For a shell; what has its default value is left out."""
    return [
        f"--{name.replace('_', '-')} {shlex.quote(str(value))}"
        for name, value in options.items()
        if value not in (None, "auto")
    ]


def _profile(name: str) -> Hardware:
    from sl_serve.plan.profiles import PROFILES

    if name not in PROFILES:
        raise UserError(f"no profile is named {name[:80]!r}; there are: {', '.join(PROFILES)}")
    return PROFILES[name]


def _measured(
    checkpoint: Checkpoint, folder: Path | None, threads: int | None, kv_dtype: KVDTypeName
) -> Hardware:
    import torch

    from sl_serve.plan.model_reader import (
        compute_dtype,
        stored_dtype,
        stored_formats,
        torch_dtype,
    )
    from sl_serve.plan.probe import probe
    from sl_serve.plan.probe_compute import Shapes

    n_threads = threads or torch.get_num_threads()
    torch.set_num_threads(n_threads)
    stored = stored_dtype(checkpoint)
    has_device = torch.cuda.is_available()
    compute = compute_dtype(stored, has_device)
    formats = {} if has_device else stored_formats(checkpoint)
    shapes = Shapes(checkpoint.config, torch_dtype(stored), compute, formats, kv_dtype)
    with _progress() as say:
        return probe(shapes, folder, n_threads, say)


def _budgets(hardware: Hardware, device_memory: str | None, host_memory: str | None) -> Budgets:
    from sl_serve.plan.planner import Budgets

    budgets = Budgets.of(hardware)
    if device_memory is not None:
        budgets = replace(budgets, device=parse_size(device_memory))
    if host_memory is not None:
        budgets = replace(budgets, host=parse_size(host_memory))
    return budgets


@contextmanager
def _progress() -> Iterator[Callable[[str], None]]:
    """Shows what is measured, on standard error, gone when it is done."""
    columns = (SpinnerColumn(), TextColumn("measuring {task.description}"), TimeElapsedColumn())
    with Progress(*columns, console=Console(stderr=True), transient=True) as progress:
        task = progress.add_task("")
        yield lambda what: progress.update(task, description=what)
