"""How much fits: the plan that is printed before anything is loaded, and refused with numbers."""

from __future__ import annotations

from dataclasses import dataclass
from fractions import Fraction

from sl_serve.config import LOGITS_BLOCK_LINES, EngineConfig, ModelConfig
from sl_serve.kv.layout import HOST_STAGING_BUFFERS, KVOrder, KVSpec, n_windows
from sl_serve.plan.kv_size import Budget, kv_pool_bytes
from sl_serve.plan.pools import KVPools, floor_power_of_two

DEFAULT_PREFILL_TOKENS = 1024


@dataclass(frozen=True, slots=True)
class WeightSizes:
    layer_bytes: int
    static_bytes: int  # embedding, final norm, head


@dataclass(frozen=True, slots=True)
class MemoryPlan:
    """Sizes in bytes of everything that is allocated before the first step, and the limits that
    follow. Slots, windows and staging are zero where host memory is device memory."""

    weights_bytes: int
    static_bytes: int
    kv: KVSpec
    n_chunks: int
    workspace_bytes: int
    device_slots_bytes: int
    windows_bytes: int  # for KV prefixes on the device
    staging_bytes: int  # for new K and V on their way up, on device and host
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
        return sum(parts) + self.device_slots_bytes + self.windows_bytes + self.staging_bytes

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
            rows += [
                ("layer slots", self.device_slots_bytes, f"look-ahead {self.look_ahead}"),
                ("KV windows", self.windows_bytes, "prefixes on their way to the device"),
                ("KV staging", self.staging_bytes, "new tokens on their way from the device"),
            ]
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
    pools = KVPools(model, itemsize, order)
    prefill = scheduler.prefill_chunk_tokens or DEFAULT_PREFILL_TOKENS
    step_tokens = scheduler.max_rows + prefill
    in_place = config.device == "cpu"
    windows = 0 if in_place else n_windows(scheduler.look_ahead)
    staging_buffers = 0 if in_place else windows + HOST_STAGING_BUFFERS
    workspace = _workspace_bytes(model, step_tokens, itemsize)
    weights = model.n_layers * sizes.layer_bytes
    slots = 0 if in_place else (scheduler.look_ahead + 1) * sizes.layer_bytes
    staging = staging_buffers * step_tokens * pools.token_layer_bytes
    budget = Budget(
        weights_bytes=weights + sizes.static_bytes,
        others_bytes=workspace + slots + staging,
        # A window has one layer's part of every chunk.
        kv_share=Fraction(model.n_layers, model.n_layers + windows),
        available_bytes=available_bytes,
    )
    kv_bytes = kv_pool_bytes(config, pools, budget)
    spec = pools.spec(kv_bytes)
    n_chunks = kv_bytes // spec.chunk_bytes
    return MemoryPlan(
        weights_bytes=weights,
        static_bytes=sizes.static_bytes,
        kv=spec,
        n_chunks=n_chunks,
        workspace_bytes=workspace,
        device_slots_bytes=slots,
        windows_bytes=windows * n_chunks * spec.chunk_layer_bytes,
        staging_bytes=staging,
        available_bytes=available_bytes,
        max_model_len=min(config.max_model_len or model.max_positions, pools.tokens_in(kv_bytes)),
        max_rows=scheduler.max_rows,
        max_slab_width=floor_power_of_two(
            min(spec.chunk_tokens, scheduler.max_rows // scheduler.n_sub_batches)
        ),
        n_sub_batches=scheduler.n_sub_batches,
        prefill_tokens=prefill,
        look_ahead=scheduler.look_ahead,
    )


def _workspace_bytes(model: ModelConfig, n_tokens: int, itemsize: int) -> int:
    """Activations of a step: hidden states, the widest intermediates twice, one logits block."""
    qkv = model.q_size + 2 * model.kv_size
    per_token = 3 * model.hidden_size + max(qkv + model.q_size, 3 * model.intermediate_size)
    logits = LOGITS_BLOCK_LINES * model.vocab_size * itemsize
    return n_tokens * per_token * itemsize + logits
