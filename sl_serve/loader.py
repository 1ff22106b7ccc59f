"""From a checkpoint to the parts an engine runs: planned, then loaded, never twice in memory."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from functools import partial
from pathlib import Path

import torch

from sl_serve.config import EngineConfig, ModelConfig
from sl_serve.device import Device, open_device
from sl_serve.hidden import HiddenStates, ResidentHidden, SwappedHidden
from sl_serve.kv.access import InPlaceKV, KVAccess
from sl_serve.kv.attention import Attention, DeviceAttention
from sl_serve.kv.host import HostKV
from sl_serve.kv.host_attention import HostAttention
from sl_serve.kv.resident import ResidentAccess, ResidentKV, TieredKV
from sl_serve.kv.split_attention import SplitAttention
from sl_serve.kv.windows import WindowedKV
from sl_serve.logits import Head
from sl_serve.openmp import release_workers
from sl_serve.ops import Ops, choose_ops
from sl_serve.plan.memory import MemoryPlan
from sl_serve.plan.model_reader import torch_dtype
from sl_serve.plan.step_memory import (
    logits_lines,
    n_layer_slots,
    n_layers_in_use,
    n_ring_slots,
)
from sl_serve.sched.residents import Residents
from sl_serve.step import Sweep
from sl_serve.stored_model import StoredModel
from sl_serve.weights.checkpoint import Checkpoint
from sl_serve.weights.embedding import (
    Embedding,
    FileEmbedding,
    QuantisedEmbedding,
    ResidentEmbedding,
)
from sl_serve.weights.expander import Expander
from sl_serve.weights.head import FileHead, HeadWeight, ResidentHead
from sl_serve.weights.host import (
    load_image,
    load_static,
    plain_rows,
)
from sl_serve.weights.layout import LayerLayout, LayerWeights
from sl_serve.weights.quantised import QuantisedRows, Rows
from sl_serve.weights.readers import Readers, make_readers
from sl_serve.weights.source import WeightSource
from sl_serve.weights.store import LayerStore
from sl_serve.weights.streamer import load_resident, weight_source
from sl_serve.weights.tiers import OnLayer, open_store, spread

OnPlan = Callable[[MemoryPlan], None]


@dataclass(frozen=True, slots=True)
class Parts:
    """A model, ready to step. The engine owns them from here on."""

    plan: MemoryPlan
    sweep: Sweep
    head: Head
    residents: Residents
    store: LayerStore
    readers: Readers
    n_parameters: int

    def close(self) -> None:
        """After the last step: stop reading, close files."""
        self.readers.close()
        self.store.close()
        self.head.close()
        self.sweep.embedding.close()
        self.sweep.attention.close()
        self.sweep.device.close()


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
    model, plan = StoredModel.planned(checkpoint, config)
    checkpoint = model.checkpoint
    on_plan(plan)
    n_threads = config.n_threads or torch.get_num_threads()
    torch.set_num_threads(n_threads)
    device = device or open_device(config.device)
    ops = choose_ops(config.dtype, n_threads, config.native, device, config.activations)
    names, dtype = model.static_names(plan), model.layout.dtype
    host_static = load_static(checkpoint, names, dtype, model.formats)
    readers = make_readers()
    store, weights = _weights(model, plan, device, ops, readers, on_layer)
    sweep = Sweep(
        config=checkpoint.config,
        family=model.family,
        ops=ops,
        device=device,
        static=_static_on(device, host_static, dtype),
        embedding=_embedding(model, plan, host_static),
        weights=weights,
        attention=_attention(model, plan, device, ops, n_threads),
        hidden=_hidden(plan, device, ops, checkpoint.config),
    )
    release_workers()  # from here on the engine's thread computes
    return Parts(
        plan=plan,
        sweep=sweep,
        head=_head(model, sweep, plan, _head_weight(model, plan, sweep, readers)),
        residents=Residents(
            plan.kv,
            plan.n_chunks,
            plan.max_rows,
            plan.max_slab_width,
            plan.n_device_chunks,
            plan.window_chunks,
        ),
        store=store,
        readers=readers,
        n_parameters=model.n_parameters,
    )


def _static_on(device: Device, host_static: Mapping[str, Rows], dtype: torch.dtype) -> LayerWeights:
    """All but the embedding, which is looked up on the host: a step needs few of its rows. A
    device gets numbers of `dtype`, which are computed with in every step."""
    names = [name for name in host_static if name != "embed"]
    if device.in_place:
        return {name: host_static[name] for name in names}
    return {name: device.upload(plain_rows(host_static[name], dtype)) for name in names}


def _weights(
    model: StoredModel,
    plan: MemoryPlan,
    device: Device,
    ops: Ops,
    readers: Readers,
    on_layer: OnLayer,
) -> tuple[LayerStore, WeightSource]:
    """Every layer on its tier, and the way from there to the arithmetic."""
    checkpoint, layout, config = model.checkpoint, model.layout, model.config
    n_layers = checkpoint.config.n_layers
    on_device = spread(n_layers, plan.n_device_layers)
    resident = load_resident(device, layout, on_device, partial(load_image, checkpoint, layout))
    store = open_store(
        checkpoint,
        layout,
        [i for i in range(n_layers) if i not in resident],
        plan.n_disk_layers,
        n_ring_slots(device.in_place, plan.look_ahead),
        Path(config.disk_dir) if config.disk_dir else None,
        readers,
        on_layer,
        device.host_empty,
    )
    expander = _expander(device, ops, layout, plan)
    n_slots = n_layer_slots(plan.look_ahead, plan.host_attends)
    source = weight_source(
        device, store, plan.look_ahead, resident, expander, n_slots, plan.expert_cache_bytes
    )
    return store, source


def _expander(device: Device, ops: Ops, layout: LayerLayout, plan: MemoryPlan) -> Expander | None:
    needed = layout.expanded_bytes > 0 and not device.in_place
    n_layers = n_layers_in_use(plan.look_ahead, plan.host_attends)
    return Expander(device, ops, layout, n_layers) if needed else None


def _hidden(plan: MemoryPlan, device: Device, ops: Ops, settings: ModelConfig) -> HiddenStates:
    if not plan.swaps_hidden:
        return ResidentHidden()
    sizes = settings.hidden_size, settings.n_layers, plan.max_sub_batch_tokens, plan.max_step_tokens
    return SwappedHidden(device, ops.dtype, *sizes, plan.look_ahead)


def _attention(
    model: StoredModel, plan: MemoryPlan, device: Device, ops: Ops, n_threads: int
) -> Attention:
    if plan.host_attends:
        n_heads = model.checkpoint.config.n_heads
        return _host_attention(plan, device, ops, model.config, n_heads, n_threads)
    return DeviceAttention(ops, _kv_access(plan, device, ops, torch_dtype(model.config.dtype)))


def _kv_access(plan: MemoryPlan, device: Device, ops: Ops, dtype: torch.dtype) -> KVAccess:
    host = HostKV(plan.kv, plan.n_chunks, device.host_empty)
    if device.in_place:
        return InPlaceKV(host)
    windows = WindowedKV(
        device, ops, host, dtype, plan.look_ahead, plan.max_sub_batch_tokens, plan.window_chunks
    )
    if not plan.n_device_chunks:
        return windows
    return TieredKV(device, _resident_kv(plan, device, ops), windows)


def _resident_kv(plan: MemoryPlan, device: Device, ops: Ops) -> ResidentKV:
    return ResidentKV(device, ops, plan.device_kv, plan.n_device_chunks, stored=plan.kv.format)


def _host_attention(
    plan: MemoryPlan, device: Device, ops: Ops, config: EngineConfig, n_heads: int, n_threads: int
) -> Attention:
    on_host = HostAttention(
        device,
        choose_ops("float32", n_threads, config.native),
        HostKV(plan.kv, plan.n_chunks),
        torch_dtype(config.dtype),
        n_heads,
        plan.max_step_tokens,
        is_beside=plan.look_ahead > 0,
    )
    if not plan.n_device_chunks:
        return on_host
    access = ResidentAccess(device, _resident_kv(plan, device, ops))
    return SplitAttention(DeviceAttention(ops, access), on_host)


def _embedding(model: StoredModel, plan: MemoryPlan, static: LayerWeights) -> Embedding:
    if not plan.embedding_on_disk:
        table = static["embed"]
        quantised = isinstance(table, QuantisedRows)
        return QuantisedEmbedding(table) if quantised else ResidentEmbedding(table)
    source, (n_rows, width) = model.static["embed"]
    location = model.checkpoint.location(source)
    assert location is not None
    return FileEmbedding(location, n_rows, width)


def _head_weight(
    model: StoredModel, plan: MemoryPlan, sweep: Sweep, readers: Readers
) -> HeadWeight:
    if not plan.head_on_disk:
        return ResidentHead(sweep.static["head"])
    source, (n_rows, width) = model.static["head"]
    location = model.checkpoint.location(source)
    assert location is not None
    return FileHead(location, (n_rows, width), readers, sweep.device)


def _head(model: StoredModel, sweep: Sweep, plan: MemoryPlan, weight: HeadWeight) -> Head:
    def head_input(x: torch.Tensor) -> torch.Tensor:
        return model.family.head_input(sweep.config, sweep.ops, sweep.static, x)

    lines = logits_lines(plan.max_rows)
    config, device = sweep.config, sweep.device.torch_device
    eos, softcap = config.eos_token_ids, config.logit_softcap
    bias = sweep.static.get("head_bias")
    return Head(sweep.ops, weight, head_input, eos, lines, device, softcap, bias)
