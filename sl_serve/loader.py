"""From a checkpoint to the parts an engine runs: planned, then loaded, never twice in memory."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch

from sl_serve.config import EngineConfig
from sl_serve.device import Device, open_device
from sl_serve.kv.access import InPlaceKV, KVAccess
from sl_serve.kv.host import HostKV
from sl_serve.kv.windows import WindowedKV
from sl_serve.logits import Head
from sl_serve.models import Family, load_family
from sl_serve.ops import Ops, choose_ops
from sl_serve.plan.budget import available_bytes
from sl_serve.plan.memory import MemoryPlan, WeightSizes, plan_memory
from sl_serve.sched.residents import Residents
from sl_serve.step import Sweep
from sl_serve.weights.checkpoint import Checkpoint
from sl_serve.weights.host import HostWeights, StaticWeights, check_checkpoint
from sl_serve.weights.layout import LayerLayout
from sl_serve.weights.streamer import weight_source

OnPlan = Callable[[MemoryPlan], None]
OnLayer = Callable[[], None]


@dataclass(frozen=True, slots=True)
class Parts:
    """A model, ready to step. The engine owns them from here on."""

    plan: MemoryPlan
    sweep: Sweep
    head: Head
    residents: Residents
    n_parameters: int


def plan_checkpoint(checkpoint: Checkpoint, config: EngineConfig) -> MemoryPlan:
    """The memory plan, without reading any weight. Raises CheckpointError, MemoryBudgetError."""
    model, family = checkpoint.config, load_family(checkpoint.config.family)
    dtype = _torch_dtype(config)
    layout = LayerLayout(family.layer_params(model), dtype)
    static = dict(family.static_tensors(model).values())
    check_checkpoint(checkpoint, family.layer_params(model), static)
    static_bytes = sum(torch.Size(s).numel() for s in static.values()) * dtype.itemsize
    return plan_memory(
        model,
        config,
        WeightSizes(layout.image_bytes, static_bytes),
        dtype.itemsize,
        # Attention reads host memory in place, or one bulk copy takes the prefix over the link.
        "row" if config.device == "cpu" else "position",
        available_bytes(),
    )


def load(
    checkpoint: Checkpoint,
    config: EngineConfig,
    on_plan: OnPlan = lambda _: None,
    on_layer: OnLayer = lambda: None,
    device: Device | None = None,
) -> Parts:
    """Load everything; `on_plan` hears the plan before, `on_layer` each layer as it arrives.

    `device` overrides the one that `config` names, for simulations with a profile of their own.
    """
    plan = plan_checkpoint(checkpoint, config)
    on_plan(plan)
    n_threads = config.n_threads or torch.get_num_threads()
    torch.set_num_threads(n_threads)
    model, family = checkpoint.config, load_family(checkpoint.config.family)
    dtype = _torch_dtype(config)
    host = HostWeights(LayerLayout(family.layer_params(model), dtype), model.n_layers)
    host.load(checkpoint, on_layer)
    names = {ours: source for ours, (source, _) in family.static_tensors(model).items()}
    static = StaticWeights.load(checkpoint, names, dtype)
    device = device or open_device(config.device)
    ops = choose_ops(config.dtype, n_threads, config.native)
    sweep = Sweep(
        config=model,
        family=family,
        ops=ops,
        device=device,
        static=static.tensors,
        weights=weight_source(device, host, plan.look_ahead),
        kv=_kv_access(plan, device, ops, dtype),
    )
    eos = checkpoint.config.eos_token_ids
    return Parts(
        plan=plan,
        sweep=sweep,
        head=_head(family, sweep, eos),
        residents=Residents(plan.kv, plan.n_chunks, plan.max_rows, plan.max_slab_width),
        n_parameters=(host.n_bytes + static.n_bytes) // dtype.itemsize,
    )


def _kv_access(plan: MemoryPlan, device: Device, ops: Ops, dtype: torch.dtype) -> KVAccess:
    host = HostKV(plan.kv, plan.n_chunks)
    if device.in_place:
        return InPlaceKV(host)
    return WindowedKV(
        device, ops, host, dtype, plan.look_ahead, plan.max_step_tokens, plan.n_chunks
    )


def _head(family: Family, sweep: Sweep, eos_token_ids: tuple[int, ...]) -> Head:
    def head_input(x: torch.Tensor) -> torch.Tensor:
        return family.head_input(sweep.config, sweep.ops, sweep.static, x)

    return Head(sweep.ops, sweep.static["head"], head_input, eos_token_ids)


def _torch_dtype(config: EngineConfig) -> torch.dtype:
    dtype = getattr(torch, config.dtype)
    assert isinstance(dtype, torch.dtype)
    return dtype
