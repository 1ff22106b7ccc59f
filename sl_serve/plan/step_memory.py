"""What a step's tokens pass through: activations, slots, windows, staging."""

from __future__ import annotations

from collections.abc import Callable
from typing import NamedTuple

from sl_serve.config import LOGITS_BLOCK_LINES, EngineConfig, ModelConfig
from sl_serve.hidden import n_hidden_buffers
from sl_serve.kv.layout import EXPANSION_BYTES, HOST_STAGING_BUFFERS, n_windows
from sl_serve.ops.torch_ops import EXPANDED_ELEMENTS
from sl_serve.plan.block_memory import BlockMemory
from sl_serve.plan.memory import WeightSizes, sub_batch_tokens
from sl_serve.plan.pools import KVPools
from sl_serve.weights.formats import WIDENING_BYTES

DEFAULT_PREFILL_TOKENS = 1024
MIN_PREFILL_TOKENS = 64
MIN_LOGITS_LINES = 16  # prompt log probabilities pass through the same buffer
# Of the memory that is there, what a step's activations may take before the default prefill
# chunk is made smaller.
WORKSPACE_SHARE = 0.125
HOST_ITEMSIZE = 4  # bytes of a number as the processor computes with it: float32
ROPE_ITEMSIZE = 4  # of rotary tables, on any device
LOGITS_ITEMSIZE = 4  # of what tokens are drawn from


class StepMemory(NamedTuple):
    """Of a step of so many prompt tokens, and every row's one."""

    prefill_tokens: int
    workspace_bytes: int
    hidden_device_bytes: int  # of hidden states that are swapped
    hidden_host_bytes: int
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
        return self.workspace_bytes + self.hidden_device_bytes + passing

    @property
    def on_host_bytes(self) -> int:
        """Beside a device with memory of its own."""
        return self.staging_host_bytes + self.hidden_host_bytes


def step_memory(
    model: ModelConfig,
    config: EngineConfig,
    sizes: WeightSizes,
    pools: KVPools,
    block: BlockMemory,
    room_bytes: int,
    fits: Callable[[StepMemory], bool],
    holds_rows: Callable[[StepMemory], bool],
    swaps_hidden: bool,
) -> StepMemory:
    """With the prefill chunk asked for, or the largest that takes no more than its share of
    room_bytes and leaves room for everything else. Where no chunk does, layers go to disk: then
    the largest beside which every row still fits, since rows that wait cost passes over the disk.
    `swaps_hidden`: hidden states, where that saves memory of the device.
    """

    def with_prefill(tokens: int) -> StepMemory:
        return _with_prefill(model, config, sizes, pools, block, tokens, swaps_hidden)

    asked = config.scheduler.prefill_chunk_tokens
    if asked:
        return with_prefill(asked)
    shares = []
    tokens = DEFAULT_PREFILL_TOKENS
    while tokens >= MIN_PREFILL_TOKENS:
        step = with_prefill(tokens)
        if step.workspace_bytes <= WORKSPACE_SHARE * room_bytes:
            if fits(step):
                return step
            shares.append(step)
        tokens //= 2
    if shares and sizes.disk_tier:
        return next(filter(holds_rows, shares), shares[0])
    return with_prefill(MIN_PREFILL_TOKENS)


def _with_prefill(
    model: ModelConfig,
    config: EngineConfig,
    sizes: WeightSizes,
    pools: KVPools,
    block: BlockMemory,
    prefill: int,
    swaps_hidden: bool,
) -> StepMemory:
    scheduler, in_place = config.scheduler, config.device == "cpu"
    tokens, itemsize = scheduler.max_rows + prefill, pools.device_format.block_bytes
    of_sub_batch = sub_batch_tokens(scheduler.max_rows, scheduler.n_sub_batches, prefill)
    windows = 0 if in_place or config.host_attends else n_windows(scheduler.look_ahead)
    staging = of_sub_batch * pools.token_layer_bytes
    staging_device, staging_host = windows * staging, HOST_STAGING_BUFFERS * staging
    if config.host_attends:
        staging_device, staging_host = (
            tokens * n for n in host_attention_token_bytes(model.q_size, model.kv_size, itemsize)
        )
    line_bytes = model.hidden_size * itemsize
    buffers = n_hidden_buffers(scheduler.look_ahead) * of_sub_batch * line_bytes
    swaps_hidden = swaps_hidden and buffers < tokens * line_bytes
    states = 0 if swaps_hidden else tokens * line_bytes
    rope = tokens * 2 * sum(model.rotated_pairs) * ROPE_ITEMSIZE
    waits = bool(model.n_experts) or config.host_attends
    waiting = block.waiting.at(tokens - of_sub_batch) if waits else 0
    n_slots = n_layer_slots(scheduler.look_ahead, config.host_attends)
    n_in_use = n_layers_in_use(scheduler.look_ahead, config.host_attends)
    return StepMemory(
        prefill_tokens=prefill,
        workspace_bytes=states
        + rope
        + block.computed.at(of_sub_batch)
        + waiting
        + (_expert_bytes(model, block, tokens, itemsize) if model.n_experts else 0)
        + _logits_bytes(model, scheduler.max_rows, itemsize),
        hidden_device_bytes=buffers if swaps_hidden else 0,
        hidden_host_bytes=tokens * line_bytes if swaps_hidden else 0,
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


def _expert_bytes(model: ModelConfig, block: BlockMemory, tokens: int, itemsize: int) -> int:
    """Of all tokens of a step, which may all ask one expert: what experts are given, of each
    sub-batch and together, gathered for one, made by it, weighed and added up."""
    return block.expert.at(tokens) + 5 * tokens * model.hidden_size * itemsize


def _logits_bytes(model: ModelConfig, max_rows: int, itemsize: int) -> int:
    """One block; tokens are drawn from float32, a copy where that is not what is computed with."""
    copied = 0 if itemsize == LOGITS_ITEMSIZE else LOGITS_ITEMSIZE
    return logits_lines(max_rows) * model.vocab_size * (itemsize + copied)
