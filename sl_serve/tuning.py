"""One-shot tuning: the planner's choice as the engine's settings, before anything is loaded."""

from __future__ import annotations

from dataclasses import replace
from typing import NamedTuple

import torch

from sl_serve.config import EngineConfig, SchedulerConfig
from sl_serve.device import device_budget_bytes
from sl_serve.errors import MemoryBudgetError
from sl_serve.kv.formats import KV_FORMATS, stored_format
from sl_serve.plan.model_reader import read_sizes, stored_formats, torch_dtype
from sl_serve.plan.placement import Workload
from sl_serve.plan.planner import Budgets, Plan, choose, engine_abilities
from sl_serve.plan.pools import KVPools, floor_power_of_two
from sl_serve.plan.probe import Say, measurable_folder, probe
from sl_serve.plan.probe_compute import Shapes
from sl_serve.stored_model import plan_checkpoint
from sl_serve.weights.checkpoint import Checkpoint
from sl_serve.weights.requantised import with_weights

# What is tuned for where nobody says more: many requests of a common length.
PROMPT_TOKENS, OUTPUT_TOKENS, N_REQUESTS = 512, 128, 1024


class Tuned(NamedTuple):
    config: EngineConfig
    plan: Plan


def tune(checkpoint: Checkpoint, config: EngineConfig, say: Say) -> Tuned:
    """`config` with the rows, sub-batches and prefill chunk that are predicted to be fastest on
    this machine, within its budgets. Takes some seconds of measuring.

    Raises UserError where this machine has no such device, MemoryBudgetError when nothing fits.
    """
    device_budget_bytes(config.device, config.device_memory_bytes)  # no use in measuring without
    settings, dtype = checkpoint.config, torch_dtype(config.dtype)
    folder = measurable_folder(config.disk_dir, checkpoint.path)
    n_threads = config.n_threads or torch.get_num_threads()
    shapes = Shapes(settings, dtype, config.dtype, kv_dtype=config.kv_dtype)
    hardware = probe(shapes, folder, n_threads, say)
    budgets = Budgets.of(hardware)
    budgets = replace(
        budgets,
        device=config.device_memory_bytes or budgets.device,
        host=config.host_memory_bytes or budgets.host,
    )
    longest = min(config.max_model_len or settings.max_positions, settings.max_positions)
    prompt = max(1, min(PROMPT_TOKENS, longest - OUTPUT_TOKENS, longest // 2))
    workload = Workload(prompt, max(1, min(OUTPUT_TOKENS, longest - prompt)), N_REQUESTS)
    formats = stored_formats(with_weights(checkpoint, config.weights), has_device=True)
    sizes = read_sizes(
        checkpoint.path.name, settings, dtype, dtype, formats, True, stored_format(config)
    )
    plan = choose(sizes, hardware, budgets, workload, engine_abilities(config.attention))
    return Tuned(_accepted(checkpoint, config, plan, workload), plan)


def _accepted(
    checkpoint: Checkpoint, config: EngineConfig, plan: Plan, workload: Workload
) -> EngineConfig:
    """The plan as settings, with fewer rows where the engine's own sum, which counts whole chunks
    of KV, finds them too many. Raises MemoryBudgetError if not even one row fits."""
    placement, rows = plan.placement, plan.placement.rows
    config = replace(config, attention=placement.attention)
    while True:
        scheduler = replace(
            config.scheduler,
            max_rows=rows * placement.n_sub_batches,
            n_sub_batches=placement.n_sub_batches,
            prefill_chunk_tokens=config.scheduler.prefill_chunk_tokens or placement.prefill_tokens,
        )
        kv_bytes = config.kv_memory_bytes or _kv_bytes(checkpoint, config, scheduler, workload)
        settings = replace(config, scheduler=scheduler, kv_memory_bytes=kv_bytes)
        try:
            plan_checkpoint(checkpoint, settings)
        except MemoryBudgetError:
            if rows == 1:
                raise
            rows = max(1, rows * 9 // 10)
        else:
            return settings


def _kv_bytes(
    checkpoint: Checkpoint, config: EngineConfig, scheduler: SchedulerConfig, workload: Workload
) -> int:
    """For every row at the workload's length."""
    pools = KVPools(checkpoint.config, stored_format(config), "position", KV_FORMATS[config.dtype])
    width = floor_power_of_two(scheduler.max_rows // scheduler.n_sub_batches)
    return pools.bytes_for_rows(scheduler.max_rows, workload.total_tokens, width)
