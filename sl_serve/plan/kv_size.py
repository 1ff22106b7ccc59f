"""How much memory KV gets, or why what is asked for cannot be had and what can."""

from __future__ import annotations

import math
from dataclasses import dataclass
from fractions import Fraction

from sl_serve.config import EngineConfig
from sl_serve.errors import MemoryBudgetError
from sl_serve.plan.budget import MIB, exact_size, gib
from sl_serve.plan.pools import KVPools, floor_power_of_two

# Left to the rest of the machine and to what is not counted one by one (interpreter, libraries).
MARGIN_SHARE = 0.08
# Of what is left after the weights, what KV takes unless told otherwise.
KV_SHARE = 0.6


@dataclass(frozen=True, slots=True)
class Budget:
    """What is there, what is spoken for, and so what KV may take."""

    weights_bytes: int
    others_bytes: int
    kv_share: Fraction  # of the memory for KV, what the pool itself gets
    available_bytes: int

    @property
    def usable_bytes(self) -> int:
        return int(self.available_bytes * (1 - MARGIN_SHARE))

    @property
    def kv_bytes(self) -> int:
        left = self.usable_bytes - self.weights_bytes - self.others_bytes
        return math.floor(max(0, left) * self.kv_share)

    def needed_bytes(self, kv_bytes: int) -> int:
        return self.weights_bytes + self.others_bytes + math.ceil(kv_bytes / self.kv_share)


def holds_kv(config: EngineConfig, pools: KVPools, budget: Budget) -> bool:
    """Whether the KV cache that is asked for, or the smallest, fits beside the rest."""
    longest = min(config.max_model_len or 1, pools.model.max_positions)
    return max(pools.bytes_for(longest), config.kv_memory_bytes or 0) <= budget.kv_bytes


def kv_pool_bytes(config: EngineConfig, pools: KVPools, budget: Budget) -> int:
    """The size of the KV pool.

    Raises MemoryBudgetError with the numbers and a value that would do.
    """
    longest, asked = pools.model.max_positions, config.max_model_len
    needed = pools.bytes_for(min(asked or 1, longest))
    left, given = budget.kv_bytes, config.kv_memory_bytes
    if pools.smallest_bytes > left:
        raise _too_large(config, budget, max(needed, given or 0))
    if given is not None and given < pools.smallest_bytes:
        enough = needed if needed <= left else pools.smallest_bytes
        raise MemoryBudgetError(
            f"--kv-memory asks for {gib(given)}, the smallest KV cache has "
            f"{gib(pools.smallest_bytes)}; raise --kv-memory to {exact_size(enough)}"
        )
    if given is not None and given > left:
        whole = left // MIB * MIB  # easier to type
        raise MemoryBudgetError(
            f"--kv-memory asks for {gib(given)}, {gib(left)} is left beside the weights; lower "
            f"--kv-memory to {exact_size(whole if whole >= needed else left)}"
        )
    most = left if given is None else given
    if asked is not None and asked > longest:
        raise MemoryBudgetError(
            f"--max-model-len asks for {asked} tokens, the model has {longest} positions; lower "
            f"--max-model-len to {min(longest, pools.tokens_in(most))}"
        )
    if needed > most:
        more = f", or raise --kv-memory to {exact_size(needed)}" if needed <= left else ""
        raise MemoryBudgetError(
            f"one request of {asked} tokens needs {gib(needed)} of KV cache, {gib(most)} is there "
            f"for it; lower --max-model-len to {pools.tokens_in(most)}{more}"
        )
    return useful_kv_bytes(config, pools, max(needed, int(left * KV_SHARE)))


def useful_kv_bytes(config: EngineConfig, pools: KVPools, most_bytes: int) -> int:
    """What is asked for, or `most_bytes` as far as rows of full length can use it."""
    if config.kv_memory_bytes is not None:
        return config.kv_memory_bytes
    longest = pools.model.max_positions
    row_tokens = min(config.max_model_len or longest, longest)
    scheduler = config.scheduler
    max_slab_width = floor_power_of_two(scheduler.max_rows // scheduler.n_sub_batches)
    useful = pools.bytes_for_rows(scheduler.max_rows, row_tokens, max_slab_width)
    return min(most_bytes, useful)


def _too_large(config: EngineConfig, budget: Budget, kv_bytes: int) -> MemoryBudgetError:
    needed = budget.needed_bytes(kv_bytes)
    enough = math.ceil(needed / (1 - MARGIN_SHARE) / MIB + 1) * MIB
    return MemoryBudgetError(
        f"the model needs {gib(needed)} ({gib(budget.weights_bytes)} weights in {config.dtype}), "
        f"{gib(budget.usable_bytes)} of {gib(budget.available_bytes)} free memory may be used; "
        f"{_way_out(config, budget, enough)}, or choose a smaller model"
    )


def _way_out(config: EngineConfig, budget: Budget, enough_bytes: int) -> str:
    if config.host_memory_bytes is not None:
        more = config.host_memory_bytes - budget.available_bytes + enough_bytes
        more = -(-more // MIB) * MIB
        return f"raise --host-memory to {exact_size(more)}"
    return f"free some until {exact_size(enough_bytes)} are free"
