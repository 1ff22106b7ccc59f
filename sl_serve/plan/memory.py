"""How much fits: the plan that is printed before anything is loaded, and refused with numbers."""

from __future__ import annotations

from dataclasses import dataclass

from sl_serve.config import LOGITS_BLOCK_LINES, EngineConfig, ModelConfig
from sl_serve.errors import MemoryBudgetError
from sl_serve.kv.layout import FULL_SLAB_CHUNKS, KVOrder, KVSpec
from sl_serve.plan.budget import gib

# One chunk's layer region: large enough for a link's full rate, small enough to waste little.
CHUNK_LAYER_BYTES = 4 << 20
MIN_CHUNK_TOKENS = 16
MIN_CHUNKS = 8
MIN_CONTEXT_TOKENS = 64
DEFAULT_PREFILL_TOKENS = 1024
# Left to the rest of the machine and to what is not counted one by one (interpreter, libraries).
MARGIN_SHARE = 0.08
# Of what is left after the weights, what KV takes unless told otherwise.
KV_SHARE = 0.6


@dataclass(frozen=True, slots=True)
class WeightSizes:
    layer_bytes: int
    static_bytes: int  # embedding, final norm, head


@dataclass(frozen=True, slots=True)
class MemoryPlan:
    """Sizes in bytes of everything that is allocated before the first step, and the limits that
    follow. `device_slots_bytes` is zero where host memory is device memory."""

    weights_bytes: int
    static_bytes: int
    kv: KVSpec
    n_chunks: int
    workspace_bytes: int
    device_slots_bytes: int
    available_bytes: int
    max_model_len: int
    max_rows: int
    max_slab_width: int
    n_sub_batches: int
    prefill_tokens: int
    look_ahead: int

    @property
    def kv_bytes(self) -> int:
        return self.n_chunks * self.kv.chunk_bytes

    @property
    def total_bytes(self) -> int:
        parts = (self.weights_bytes, self.static_bytes, self.kv_bytes, self.workspace_bytes)
        return sum(parts) + self.device_slots_bytes

    @property
    def max_step_tokens(self) -> int:
        return self.max_rows + self.prefill_tokens

    def table(self) -> list[tuple[str, int, str]]:
        """(what, bytes, remark) for people."""
        rows_at_full_length = self.n_chunks * self.kv.chunk_tokens // self.max_model_len
        kv_remark = (
            f"{self.n_chunks * self.kv.chunk_tokens} tokens: {rows_at_full_length} requests of "
            f"{self.max_model_len}, at most {self.max_rows} at once"
        )
        rows = [
            ("layers", self.weights_bytes, f"{self.kv.n_layers} layers, read once per step"),
            ("embedding and head", self.static_bytes, "resident"),
            ("KV cache", self.kv_bytes, kv_remark),
            ("workspace", self.workspace_bytes, f"up to {self.max_step_tokens} tokens a step"),
        ]
        if self.device_slots_bytes:
            rows.append(("layer slots", self.device_slots_bytes, f"look-ahead {self.look_ahead}"))
        return rows


def plan_memory(
    model: ModelConfig,
    config: EngineConfig,
    sizes: WeightSizes,
    itemsize: int,
    order: KVOrder,
    available_bytes: int,
) -> MemoryPlan:
    """Fit weights, KV and workspace into what is available.

    Raises MemoryBudgetError with the sum and what would help.
    """
    scheduler = config.scheduler
    prefill = scheduler.prefill_chunk_tokens or DEFAULT_PREFILL_TOKENS
    workspace = _workspace_bytes(model, scheduler.max_rows + prefill, itemsize)
    weights = model.n_layers * sizes.layer_bytes
    slots = 0 if config.device == "cpu" else (scheduler.look_ahead + 1) * sizes.layer_bytes
    fixed = weights + sizes.static_bytes + workspace + slots
    usable = int(available_bytes * (1 - MARGIN_SHARE))
    if fixed > usable:
        raise MemoryBudgetError(
            f"the model needs {gib(fixed)} ({gib(weights + sizes.static_bytes)} weights in "
            f"{config.dtype}), {gib(usable)} of {gib(available_bytes)} free memory may be used; "
            "free some memory or choose a smaller model"
        )
    wanted_len = min(config.max_model_len or model.max_positions, model.max_positions)
    token_bytes = 2 * model.n_layers * model.kv_size * itemsize
    kv_bytes = _kv_bytes(config, scheduler.max_rows * wanted_len * token_bytes, usable - fixed)
    spec = _kv_spec(model, itemsize, order, kv_bytes)
    n_chunks = kv_bytes // spec.chunk_bytes
    max_len = min(wanted_len, n_chunks * spec.chunk_tokens)
    too_short = max_len < min(MIN_CONTEXT_TOKENS, wanted_len) or n_chunks < FULL_SLAB_CHUNKS
    if too_short or (config.max_model_len or 0) > max_len:
        raise MemoryBudgetError(
            f"one request of {wanted_len} tokens needs {gib(wanted_len * token_bytes)} of KV "
            f"cache, {gib(kv_bytes)} is set aside for it; raise --kv-memory or lower "
            f"--max-model-len to {max_len}"
        )
    return MemoryPlan(
        weights_bytes=weights,
        static_bytes=sizes.static_bytes,
        kv=spec,
        n_chunks=n_chunks,
        workspace_bytes=workspace,
        device_slots_bytes=slots,
        available_bytes=available_bytes,
        max_model_len=max_len,
        max_rows=scheduler.max_rows,
        max_slab_width=_floor_power_of_two(
            min(spec.chunk_tokens, scheduler.max_rows // scheduler.n_sub_batches)
        ),
        n_sub_batches=scheduler.n_sub_batches,
        prefill_tokens=prefill,
        look_ahead=scheduler.look_ahead,
    )


def _kv_bytes(config: EngineConfig, useful_bytes: int, left_bytes: int) -> int:
    """At most what all rows at full length can use; a share of what is left unless given."""
    if config.kv_memory_bytes is None:
        return min(useful_bytes, int(left_bytes * KV_SHARE))
    if config.kv_memory_bytes > left_bytes:
        raise MemoryBudgetError(
            f"--kv-memory asks for {gib(config.kv_memory_bytes)}, {gib(left_bytes)} is left "
            "beside the weights"
        )
    return config.kv_memory_bytes


def _kv_spec(model: ModelConfig, itemsize: int, order: KVOrder, kv_bytes: int) -> KVSpec:
    token_layer_bytes = 2 * model.kv_size * itemsize
    by_copy = CHUNK_LAYER_BYTES // token_layer_bytes
    by_pool = kv_bytes // (MIN_CHUNKS * model.n_layers * token_layer_bytes)
    chunk_tokens = max(MIN_CHUNK_TOKENS, _floor_power_of_two(min(by_copy, by_pool)))
    return KVSpec(model.n_layers, model.n_kv_heads, model.head_dim, itemsize, chunk_tokens, order)


def _workspace_bytes(model: ModelConfig, n_tokens: int, itemsize: int) -> int:
    """Activations of a step: hidden states, the widest intermediates twice, one logits block."""
    qkv = model.q_size + 2 * model.kv_size
    per_token = 3 * model.hidden_size + max(qkv + model.q_size, 3 * model.intermediate_size)
    logits = LOGITS_BLOCK_LINES * model.vocab_size * itemsize
    return n_tokens * per_token * itemsize + logits


def _floor_power_of_two(n: int) -> int:
    return 1 << (max(n, 1).bit_length() - 1)
