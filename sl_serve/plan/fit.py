"""How much fits: the plan that is printed before anything is loaded, and refused with numbers."""

from __future__ import annotations

from dataclasses import dataclass, replace
from fractions import Fraction
from typing import NamedTuple

from sl_serve.config import EngineConfig, ModelConfig
from sl_serve.errors import MemoryBudgetError
from sl_serve.kv.formats import KV_FORMATS, stored_format
from sl_serve.kv.layout import KVOrder
from sl_serve.plan.block_memory import BlockMemory, block_memory
from sl_serve.plan.device_room import DeviceRoom, window_chunks, windows_bytes, windows_of
from sl_serve.plan.kv_size import (
    MARGIN_SHARE,
    Budget,
    holds_kv,
    kv_pool_bytes,
    useful_kv_bytes,
)
from sl_serve.plan.memory import MemoryPlan, WeightSizes
from sl_serve.plan.pools import KVPools, floor_power_of_two
from sl_serve.plan.step_memory import StepMemory, n_ring_slots, step_memory
from sl_serve.weights.direct_file import BOUNCE_BYTES
from sl_serve.weights.disk import slot_bytes
from sl_serve.weights.head import N_PIECES
from sl_serve.weights.head import PIECE_BYTES as HEAD_PIECE_BYTES
from sl_serve.weights.readers import N_READERS


def plan_memory(
    model: ModelConfig,
    config: EngineConfig,
    sizes: WeightSizes,
    order: KVOrder,
    available_bytes: int,
    device_available_bytes: int | None = None,
) -> MemoryPlan:
    """Fit weights, KV and what a step passes through into the memory of host and device.

    `device_available_bytes` None: what the device needs counts as host memory. Hidden states are
    swapped only where they and windows for all KV do not fit on the device together. Raises
    MemoryBudgetError with the sum and what would help.
    """
    # The processor attends where KV lies: in the order that it reads fastest.
    order = "row" if config.host_attends else order
    pools, device = KVPools(model, stored_format(config), order, KV_FORMATS[config.dtype]), None
    if device_available_bytes is not None:
        usable_bytes = int(device_available_bytes * (1 - MARGIN_SHARE))
        device = DeviceRoom(model, config, sizes, pools, usable_bytes)
    block = block_memory(model, config)
    fit = _Fit(model, config, sizes, pools, block, available_bytes, device, device_available_bytes)
    plan = None
    try:
        plan, kv_is_cut = _planned(fit, swaps_hidden=False)
    except MemoryBudgetError:
        if not fit.may_swap_hidden:
            raise
    if plan is not None and not (kv_is_cut and fit.may_swap_hidden):
        return plan
    try:
        swapping, _ = _planned(fit, swaps_hidden=True)
    except MemoryBudgetError:
        if plan is None:
            raise
        return plan
    return swapping if plan is None or swapping.kv_bytes > plan.kv_bytes else plan


def _planned(fit: _Fit, swaps_hidden: bool) -> tuple[MemoryPlan, bool]:
    """And whether the device has too little room for windows to all the KV that the host has."""
    model, config, sizes, pools, device = fit.model, fit.config, fit.sizes, fit.pools, fit.device
    step = fit.step(swaps_hidden)
    n_device_layers = fit.device_layers(step)
    if n_device_layers == model.n_layers:  # none passes through
        step = step._replace(slots_bytes=0)
    tiers = fit.tiers(step, n_device_layers)
    scheduler = config.scheduler
    spec = pools.spec(tiers.kv_bytes)
    n_chunks = tiers.kv_bytes // spec.chunk_bytes
    n_host_layers = model.n_layers - n_device_layers - tiers.n_disk_layers
    plan = MemoryPlan(
        weights_bytes=n_host_layers * sizes.layer_bytes,
        n_device_layers=n_device_layers,
        device_layers_bytes=n_device_layers * sizes.layer_bytes,
        n_disk_layers=tiers.n_disk_layers,
        disk_bytes=tiers.n_disk_layers * sizes.layer_bytes,
        ring_bytes=tiers.ring_bytes,
        embedding_on_disk=tiers.embedding_on_disk,
        head_on_disk=tiers.head_on_disk,
        static_bytes=tiers.static_bytes + fit.static_device_bytes,
        static_device_bytes=fit.static_device_bytes,
        kv=spec,
        device_kv=pools.device_spec(tiers.kv_bytes),
        host_attends=config.host_attends,
        n_chunks=n_chunks,
        n_device_chunks=device.kv_chunks(step, n_device_layers, tiers.kv_bytes) if device else 0,
        window_chunks=window_chunks(config, pools, tiers.kv_bytes) if step.n_windows else n_chunks,
        workspace_bytes=step.workspace_bytes,
        hidden_bytes=step.hidden_device_bytes + step.hidden_host_bytes,
        hidden_host_bytes=step.hidden_host_bytes,
        device_slots_bytes=step.slots_bytes,
        expansion_bytes=step.expansion_bytes,
        windows_bytes=windows_bytes(config, pools, step, tiers.kv_bytes),
        staging_bytes=step.staging_device_bytes + step.kv_expansion_bytes + step.staging_host_bytes,
        staging_host_bytes=step.staging_host_bytes,
        available_bytes=fit.available_bytes,
        device_available_bytes=fit.device_available_bytes,
        max_model_len=min(
            config.max_model_len or model.max_positions, pools.tokens_in(tiers.kv_bytes)
        ),
        max_rows=scheduler.max_rows,
        max_slab_width=floor_power_of_two(
            min(spec.chunk_tokens, scheduler.max_rows // scheduler.n_sub_batches)
        ),
        n_sub_batches=scheduler.n_sub_batches,
        prefill_tokens=step.prefill_tokens,
        look_ahead=scheduler.look_ahead,
    )
    if device and sizes.expert_bytes and n_device_layers < model.n_layers:
        n_experts = max(0, device.usable_bytes - plan.device_bytes) // sizes.expert_bytes
        n_experts = min(n_experts, (model.n_layers - n_device_layers) * model.n_experts)
        plan = replace(plan, expert_cache_bytes=n_experts * sizes.expert_bytes)
    return plan, tiers.kv_is_cut


class _Tiers(NamedTuple):
    kv_bytes: int
    static_bytes: int  # in host memory
    n_disk_layers: int = 0
    ring_bytes: int = 0
    embedding_on_disk: bool = False
    head_on_disk: bool = False
    kv_is_cut: bool = False  # to what windows on the device can pass


@dataclass(frozen=True, slots=True)
class _Fit:
    """What is to be fitted, and into what."""

    model: ModelConfig
    config: EngineConfig
    sizes: WeightSizes
    pools: KVPools
    block: BlockMemory
    available_bytes: int
    device: DeviceRoom | None  # where it has memory of its own
    device_available_bytes: int | None

    @property
    def in_place(self) -> bool:
        return self.config.device == "cpu"

    @property
    def static_device_bytes(self) -> int:
        return 0 if self.in_place else self.sizes.head_bytes + self.sizes.others_bytes

    @property
    def host_sizes(self) -> WeightSizes:
        """What host memory holds of the vocabulary: beside a device, the table that rows are looked
        up in, a second time where it is the head too."""
        if self.in_place:
            return self.sizes
        embedding = self.sizes.embedding_bytes or self.sizes.head_bytes
        return replace(self.sizes, embedding_bytes=embedding, head_bytes=0, others_bytes=0)

    @property
    def may_swap_hidden(self) -> bool:
        """Not where the processor attends: the queries, keys, values and results of a whole step
        lie on the device there, several times the hidden states."""
        return self.device is not None and not self.config.host_attends

    def step(self, swaps_hidden: bool) -> StepMemory:
        room = self.device.usable_bytes if self.device else self.available_bytes

        def fits(step: StepMemory) -> bool:
            return holds_kv(self.config, self.pools, self.host_budget(step, 0))

        def holds_rows(step: StepMemory) -> bool:
            everything = self.host_budget(step, 0)
            try:
                tiers = self._on_host(step, everything, self.model.n_layers)
            except MemoryBudgetError:
                return False
            return tiers.kv_bytes >= useful_kv_bytes(self.config, self.pools, self.available_bytes)

        parts = self.model, self.config, self.sizes, self.pools, self.block
        return step_memory(*parts, room, fits, holds_rows, swaps_hidden)

    def host_budget(self, step: StepMemory, n_device_layers: int) -> Budget:
        """With every layer that is not on the device in host memory."""
        others = step.on_host_bytes
        windows = Fraction(0)
        if self.in_place:
            others += step.workspace_bytes
        elif self.device is None:
            others += step.on_device_bytes + self.static_device_bytes
            windows = windows_of(step, self.pools)
        n_layers = self.model.n_layers
        layers = (n_layers - n_device_layers) * self.sizes.layer_bytes
        return Budget(
            weights_bytes=layers + self.host_sizes.static_bytes,
            others_bytes=others,
            # A window has one layer's part of every chunk.
            kv_share=Fraction(n_layers, n_layers + windows),
            available_bytes=self.available_bytes,
        )

    def device_layers(self, step: StepMemory) -> int:
        """As many as the device has room for beside what passes through it."""
        if self.device is None:
            return 0

        def host_kv_bytes(n_device_layers: int) -> int:
            budget = self.host_budget(step, n_device_layers)
            return self._on_host(step, budget, self.model.n_layers - n_device_layers).kv_bytes

        return self.device.layers(step, host_kv_bytes)

    def tiers(self, step: StepMemory, n_device_layers: int) -> _Tiers:
        """All weights in memory; or, where they do not fit, KV first, since the more requests pass
        through a layer the less its reading costs each, then the head and as many layers as there
        is room for. The embedding, of which a step reads a few rows, then stays on disk."""
        everything = self.host_budget(step, n_device_layers)
        tiers = self._on_host(step, everything, self.model.n_layers - n_device_layers)
        if self.device is None or not step.n_windows:
            return tiers
        most = self.device.most_kv_bytes(step, n_device_layers)
        return tiers._replace(kv_bytes=min(tiers.kv_bytes, most), kv_is_cut=most < tiers.kv_bytes)

    def _on_host(self, step: StepMemory, everything: Budget, n_layers: int) -> _Tiers:
        config, sizes = self.config, self.host_sizes
        if not sizes.disk_tier or holds_kv(config, self.pools, everything):
            return _Tiers(kv_pool_bytes(config, self.pools, everything), sizes.static_bytes)
        n_slots = n_ring_slots(self.in_place, config.scheduler.look_ahead)
        ring = n_slots * slot_bytes(sizes.layer_bytes) + N_READERS * BOUNCE_BYTES
        on_disk = sizes.vocabulary_in_file
        piece = slot_bytes(min(HEAD_PIECE_BYTES, sizes.head_bytes))
        pieces = N_PIECES * piece if on_disk else 0
        static = sizes.others_bytes if on_disk else sizes.static_bytes
        least = replace(
            everything, weights_bytes=static, others_bytes=everything.others_bytes + ring + pieces
        )
        kv_bytes = kv_pool_bytes(config, self.pools, least)
        left = least.usable_bytes - least.needed_bytes(kv_bytes)
        head_on_disk = on_disk and left + pieces < sizes.head_bytes
        if on_disk and not head_on_disk:
            left += pieces - sizes.head_bytes
            static, pieces = static + sizes.head_bytes, 0
        n_host_layers = min(left // sizes.layer_bytes, n_layers - 1)
        left -= n_host_layers * sizes.layer_bytes
        most_kv_bytes = kv_bytes + int(left * everything.kv_share)
        return _Tiers(
            kv_bytes=useful_kv_bytes(config, self.pools, most_kv_bytes),
            static_bytes=static,
            n_disk_layers=n_layers - n_host_layers,
            ring_bytes=ring + pieces,
            embedding_on_disk=on_disk and (head_on_disk or sizes.embedding_bytes > 0),
            head_on_disk=head_on_disk,
        )
