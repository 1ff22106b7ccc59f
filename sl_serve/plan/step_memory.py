"""What a step's tokens pass through: activations, slots, windows, staging."""

from __future__ import annotations

from collections.abc import Callable
from typing import NamedTuple

from sl_serve.config import LOGITS_BLOCK_LINES, EngineConfig, ModelConfig
from sl_serve.kv.layout import EXPANSION_BYTES, HOST_STAGING_BUFFERS, n_windows
from sl_serve.plan.memory import WeightSizes
from sl_serve.plan.pools import KVPools

DEFAULT_PREFILL_TOKENS = 1024
MIN_PREFILL_TOKENS = 64
MIN_LOGITS_LINES = 16  # prompt log probabilities pass through the same buffer
# Of the memory that is there, what a step's activations may take before the default prefill
# chunk is made smaller.
WORKSPACE_SHARE = 0.125


class StepMemory(NamedTuple):
    """Of a step of so many prompt tokens, and every row's one."""

    prefill_tokens: int
    workspace_bytes: int
    slots_bytes: int
    expansion_bytes: int  # what KV passes through when it is expanded
    n_windows: int
    staging_device_bytes: int
    staging_host_bytes: int

    @property
    def on_device_bytes(self) -> int:
        passing = self.slots_bytes + self.staging_device_bytes + self.expansion_bytes
        return self.workspace_bytes + passing


def step_memory(
    model: ModelConfig,
    config: EngineConfig,
    sizes: WeightSizes,
    pools: KVPools,
    room_bytes: int,
    fits: Callable[[StepMemory], bool],
    holds_rows: Callable[[StepMemory], bool],
) -> StepMemory:
    """With the prefill chunk asked for, or the largest that takes no more than its share of
    room_bytes and leaves room for everything else. Where no chunk does, layers go to disk: then
    the largest beside which every row still fits, since rows that wait cost passes over the disk.
    """
    asked = config.scheduler.prefill_chunk_tokens
    if asked:
        return _with_prefill(model, config, sizes, pools, asked)
    shares = []
    tokens = DEFAULT_PREFILL_TOKENS
    while tokens >= MIN_PREFILL_TOKENS:
        step = _with_prefill(model, config, sizes, pools, tokens)
        if step.workspace_bytes <= WORKSPACE_SHARE * room_bytes:
            if fits(step):
                return step
            shares.append(step)
        tokens //= 2
    if shares and sizes.disk_tier:
        return next(filter(holds_rows, shares), shares[0])
    return _with_prefill(model, config, sizes, pools, MIN_PREFILL_TOKENS)


def _with_prefill(
    model: ModelConfig, config: EngineConfig, sizes: WeightSizes, pools: KVPools, prefill: int
) -> StepMemory:
    scheduler, in_place = config.scheduler, config.device == "cpu"
    tokens = scheduler.max_rows + prefill
    windows = 0 if in_place else n_windows(scheduler.look_ahead)
    staging = 0 if in_place else tokens * pools.token_layer_bytes
    return StepMemory(
        prefill_tokens=prefill,
        workspace_bytes=_workspace_bytes(
            model, tokens, scheduler.max_rows, pools.device_format.block_bytes
        ),
        slots_bytes=0 if in_place else (scheduler.look_ahead + 1) * sizes.layer_bytes,
        expansion_bytes=EXPANSION_BYTES if windows and pools.is_expanded else 0,
        n_windows=windows,
        staging_device_bytes=windows * staging,
        staging_host_bytes=HOST_STAGING_BUFFERS * staging,
    )


def n_ring_slots(in_place: bool, look_ahead: int) -> int:
    """Of the disk tier: as many layers as are used or looked ahead to, and one more where a layer
    stays in its slot until its copy to the device is done."""
    return look_ahead + (1 if in_place else 2)


def logits_lines(max_rows: int) -> int:
    """Lines of the one buffer for the head's product."""
    return max(MIN_LOGITS_LINES, min(LOGITS_BLOCK_LINES, max_rows))


def _workspace_bytes(model: ModelConfig, n_tokens: int, max_rows: int, itemsize: int) -> int:
    """Activations of a step: hidden states, the widest intermediates twice, one logits block."""
    qkv = model.q_size + 2 * model.kv_size
    per_token = 3 * model.hidden_size + max(qkv + model.q_size, 3 * model.intermediate_size)
    logits = logits_lines(max_rows) * model.vocab_size * itemsize
    return n_tokens * per_token * itemsize + logits
