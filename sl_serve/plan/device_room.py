"""What fits into the memory of a device that has its own."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass
from fractions import Fraction

from sl_serve.config import EngineConfig, ModelConfig
from sl_serve.errors import MemoryBudgetError
from sl_serve.kv.layout import FULL_SLAB_CHUNKS
from sl_serve.plan.budget import MIB, exact_size, gib
from sl_serve.plan.kv_size import MARGIN_SHARE, useful_kv_bytes
from sl_serve.plan.memory import WeightSizes
from sl_serve.plan.pools import KVPools
from sl_serve.plan.step_memory import StepMemory


@dataclass(frozen=True, slots=True)
class DeviceRoom:
    """In this order: what passes through and the head, windows, layers that stay, KV that stays.

    Windows come before layers because they are what lets rows run, and layers before KV because a
    byte of a layer crosses the link in every step, one of KV only where a row has come so far.
    """

    model: ModelConfig
    config: EngineConfig
    sizes: WeightSizes
    pools: KVPools
    usable_bytes: int

    def layers(self, step: StepMemory, host_kv_bytes: Callable[[int], int]) -> int:
        """How many stay. `host_kv_bytes(n)`: of the KV in host memory when n layers do. Raises
        MemoryBudgetError."""
        n_layers, left = self.model.n_layers, self._left(step)
        # Host memory as free as it can become: KV gets no more than this.
        kv_bytes = host_kv_bytes(min(left // self.sizes.layer_bytes, n_layers))
        if step.n_windows:
            kv_bytes = min(kv_bytes, self.most_kv_bytes(step, 0))
        left -= windows_bytes(self.config, self.pools, step, kv_bytes)
        if n_layers * self.sizes.layer_bytes <= left + step.slots_bytes:
            return n_layers
        return min(left // self.sizes.layer_bytes, n_layers - 1)

    def kv_chunks(self, step: StepMemory, n_device_layers: int, kv_bytes: int) -> int:
        """Of KV that stays, beside so many layers and the windows for the host's kv_bytes."""
        left = self._left(step) - n_device_layers * self.sizes.layer_bytes
        left -= windows_bytes(self.config, self.pools, step, kv_bytes)
        # Chunks are of as many tokens as the host's, whose pools know how many are of use.
        n_chunks = left // self.pools.device_spec(kv_bytes).chunk_bytes
        host_chunk_bytes = self.pools.spec(kv_bytes).chunk_bytes
        most_bytes = n_chunks * host_chunk_bytes
        useful_bytes = useful_kv_bytes(self.config, self.pools, most_bytes)
        n_chunks = min(most_bytes, useful_bytes) // host_chunk_bytes
        return n_chunks if n_chunks >= FULL_SLAB_CHUNKS else 0

    def most_kv_bytes(self, step: StepMemory, n_device_layers: int) -> int:
        """Of KV in host memory, what windows can pass beside so many layers."""
        room = self._left(step) - n_device_layers * self.sizes.layer_bytes
        # Windows for all of it would do in any case; those of sub-batches are smaller.
        least = math.floor(room * self.model.n_layers / windows_of(step, self.pools))
        kv_bytes = least * self.config.scheduler.n_sub_batches
        while kv_bytes > least and windows_bytes(self.config, self.pools, step, kv_bytes) > room:
            kv_bytes = max(least, kv_bytes * 9 // 10)
        return kv_bytes

    def _left(self, step: StepMemory) -> int:
        """Beside slots, staging, activations and static weights. Raises MemoryBudgetError."""
        static_bytes = self.sizes.head_bytes + self.sizes.others_bytes
        needed = step.on_device_bytes + static_bytes
        share = windows_of(step, self.pools) / self.model.n_layers
        windows = math.floor(self.pools.smallest_bytes * share)
        if needed + windows > self.usable_bytes:
            passing = step.slots_bytes + step.expansion_bytes
            enough = math.ceil((needed + windows) / (1 - MARGIN_SHARE) / MIB + 1) * MIB
            raise MemoryBudgetError(
                f"the device needs {gib(needed + windows)} ({gib(passing)} for the layers that "
                f"pass through, {gib(static_bytes)} for the head), "
                f"{gib(self.usable_bytes)} of it may be used; raise --device-memory to "
                f"{exact_size(enough)}, or lower --prefill-tokens or --max-rows"
            )
        return self.usable_bytes - needed


def window_chunks(config: EngineConfig, pools: KVPools, kv_bytes: int) -> int:
    """Of the host's chunks, what a sub-batch may touch: its share of all and what may hang over,
    since slabs are not divided; and any request."""
    spec = pools.spec(kv_bytes)
    n_chunks = kv_bytes // spec.chunk_bytes
    longest = min(config.max_model_len or pools.model.max_positions, pools.tokens_in(kv_bytes))
    share = -(-n_chunks // config.scheduler.n_sub_batches) + FULL_SLAB_CHUNKS - 1
    return min(n_chunks, max(share, -(-longest // spec.chunk_tokens)))


def windows_bytes(config: EngineConfig, pools: KVPools, step: StepMemory, kv_bytes: int) -> int:
    region_bytes = pools.spec(kv_bytes).chunk_layer_bytes
    n_chunks = window_chunks(config, pools, kv_bytes)
    expanded = pools.device_spec(kv_bytes).chunk_layer_bytes if step.n_windows else 0
    return n_chunks * (step.n_windows * region_bytes + (expanded if pools.is_expanded else 0))


def windows_of(step: StepMemory, pools: KVPools) -> Fraction:
    """How many times a layer of the host's KV they hold; where KV is expanded, once more in the
    format of the arithmetic."""
    if not (step.n_windows and pools.is_expanded):
        return Fraction(step.n_windows)
    return step.n_windows + Fraction(pools.device_token_layer_bytes, pools.token_layer_bytes)
