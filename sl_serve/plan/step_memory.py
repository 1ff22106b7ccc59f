"""What a step's tokens pass through: activations, slots, windows, staging."""

from __future__ import annotations

from collections.abc import Callable
from typing import NamedTuple

from sl_serve.config import LOGITS_BLOCK_LINES, EngineConfig, ModelConfig
from sl_serve.kv.layout import EXPANSION_BYTES, HOST_STAGING_BUFFERS, n_windows
from sl_serve.ops.torch_ops import EXPANDED_ELEMENTS
from sl_serve.plan.memory import WeightSizes
from sl_serve.plan.pools import KVPools
from sl_serve.weights.formats import WIDENING_BYTES

DEFAULT_PREFILL_TOKENS = 1024
MIN_PREFILL_TOKENS = 64
MIN_LOGITS_LINES = 16  # prompt log probabilities pass through the same buffer
# Of the memory that is there, what a step's activations may take before the default prefill
# chunk is made smaller.
WORKSPACE_SHARE = 0.125
HOST_ITEMSIZE = 4  # bytes of a number as the processor computes with it: float32


class StepMemory(NamedTuple):
    """Of a step of so many prompt tokens, and every row's one."""

    prefill_tokens: int
    workspace_bytes: int
    slots_bytes: int
    expansion_bytes: int  # layers in use, expanded
    kv_expansion_bytes: int  # what KV passes through when it is expanded
    n_windows: int
    staging_device_bytes: int
    staging_host_bytes: int

    @property
    def on_device_bytes(self) -> int:
        passing = self.slots_bytes + self.expansion_bytes
        passing += self.staging_device_bytes + self.kv_expansion_bytes
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
    tokens, itemsize = scheduler.max_rows + prefill, pools.device_format.block_bytes
    windows = 0 if in_place or config.host_attends else n_windows(scheduler.look_ahead)
    staging = tokens * pools.token_layer_bytes
    staging_device, staging_host = windows * staging, HOST_STAGING_BUFFERS * staging
    if config.host_attends:
        staging_device, staging_host = (
            tokens * n for n in host_attention_token_bytes(model.q_size, model.kv_size, itemsize)
        )
    n_slots = n_layer_slots(scheduler.look_ahead, config.host_attends)
    n_in_use = n_layers_in_use(scheduler.look_ahead, config.host_attends)
    return StepMemory(
        prefill_tokens=prefill,
        workspace_bytes=_workspace_bytes(model, tokens, scheduler.max_rows, itemsize),
        slots_bytes=0 if in_place else n_slots * sizes.layer_bytes,
        expansion_bytes=expansion_bytes(sizes.expanded_layer_bytes, n_in_use),
        kv_expansion_bytes=EXPANSION_BYTES if windows and pools.is_expanded else 0,
        n_windows=windows,
        staging_device_bytes=staging_device,
        staging_host_bytes=0 if in_place else staging_host,
    )


def expansion_bytes(expanded_layer_bytes: int, n_in_use: int) -> int:
    """For the layers in use and what widening a piece of one takes; none where none is expanded."""
    if not expanded_layer_bytes:
        return 0
    return n_in_use * expanded_layer_bytes + EXPANDED_ELEMENTS * WIDENING_BYTES


def host_attention_token_bytes(q_size: int, kv_size: int, itemsize: int) -> tuple[int, int]:
    """What one token of a step takes on the device and on the host where the processor attends:
    q, k, v and the results on either side; as the processor computes with them, the results and,
    where the device's numbers are shorter, the others too."""
    crossing = (2 * q_size + 2 * kv_size) * itemsize
    widened = q_size + (q_size + 2 * kv_size) * (itemsize != HOST_ITEMSIZE)
    return crossing, crossing + widened * HOST_ITEMSIZE


def n_layer_slots(look_ahead: int, host_attends: bool) -> int:
    """On the device: the layers in use and those that are coming."""
    return look_ahead + n_layers_in_use(look_ahead, host_attends)


def n_layers_in_use(look_ahead: int, host_attends: bool) -> int:
    """At a time: two where the processor attends, unless everything waits for everything."""
    return 2 if host_attends and look_ahead > 0 else 1


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
