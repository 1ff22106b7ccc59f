"""Options that several commands share, as one value of a command each."""

from __future__ import annotations

import inspect
from collections.abc import Callable, Iterator
from dataclasses import dataclass, fields, is_dataclass
from functools import wraps
from typing import Any, get_type_hints

from sl_serve import cli_options as o
from sl_serve.config import DeviceName, DTypeName, EngineConfig, QueueConfig, SchedulerConfig
from sl_serve.plan.budget import parse_size


@dataclass(frozen=True, slots=True)
class StepOptions:
    """The shape of a step."""

    max_rows: o.MaxRows = None
    sub_batches: o.SubBatches = None
    prefill_tokens: o.PrefillTokens = None
    look_ahead: o.LookAhead = o.DEFAULTS.look_ahead

    def scheduler(self) -> SchedulerConfig:
        max_rows = self.max_rows or o.DEFAULTS.max_rows
        return SchedulerConfig(
            max_rows=max_rows,
            n_sub_batches=min(self.sub_batches or o.DEFAULTS.n_sub_batches, max_rows),
            prefill_chunk_tokens=self.prefill_tokens or 0,
            look_ahead=self.look_ahead,
        )


@dataclass(frozen=True, slots=True)
class EngineOptions:
    device: o.Device = "cpu"
    dtype: o.DType = None
    kv_dtype: o.KvDType = "auto"
    load_format: o.Load = "auto"
    weights: o.Weights = "auto"
    kv_memory: o.KvMemory = None
    host_memory: o.HostMemory = None
    device_memory: o.DeviceMemory = None
    disk_dir: o.DiskDir = None
    max_model_len: o.MaxModelLen = None
    attention: o.Attention = "auto"
    activations: o.Activations = "float32"
    threads: o.Threads = None

    def config(self, step: StepOptions, queue: QueueConfig) -> EngineConfig:
        """Raises UserError for a size that cannot be read."""
        return EngineConfig(
            device=self.device,
            dtype=self.dtype or default_dtype(self.device),
            kv_dtype=self.kv_dtype,
            load_format=self.load_format,
            weights=self.weights,
            max_model_len=self.max_model_len,
            kv_memory_bytes=_bytes(self.kv_memory),
            host_memory_bytes=_bytes(self.host_memory),
            device_memory_bytes=_bytes(self.device_memory),
            disk_dir=self.disk_dir,
            attention=self.attention,
            activations=self.activations,
            n_threads=self.threads,
            scheduler=step.scheduler(),
            queue=queue,
        )

    def is_tuned(self, step: StepOptions) -> bool:
        """Whether the planner chooses the shape of a step: on a GPU, unless the user did."""
        return self.device == "cuda" and step.max_rows is None and step.sub_batches is None


def default_dtype(device: DeviceName) -> DTypeName:
    return "bfloat16" if device == "cuda" else "float32"


def with_options(command: Callable[..., None]) -> Callable[..., None]:
    """`command`, which typer sees with an option for each field of those of its parameters that are
    groups of options."""
    parameters = inspect.signature(command, eval_str=True).parameters.values()
    groups: dict[str, Any] = {
        p.name: p.annotation for p in parameters if is_dataclass(p.annotation)
    }

    @wraps(command)
    def run(**values: Any) -> None:
        for name, group in groups.items():
            values[name] = group(**{f.name: values.pop(f.name) for f in fields(group)})
        command(**values)

    singles = [single for p in parameters for single in _singles(p)]
    setattr(run, "__signature__", inspect.Signature(singles))  # noqa: B010
    return run


def _singles(parameter: inspect.Parameter) -> Iterator[inspect.Parameter]:
    """The parameter, or one for each field of the group that it is."""
    kind, group = inspect.Parameter.KEYWORD_ONLY, parameter.annotation
    if not is_dataclass(group):
        yield parameter.replace(kind=kind)
        return
    hints = get_type_hints(group, include_extras=True)
    for field in fields(group):
        yield inspect.Parameter(
            field.name, kind, default=field.default, annotation=hints[field.name]
        )


def _bytes(size: str | None) -> int | None:
    return None if size is None else parse_size(size)
