"""What a memory plan says: what lies where, in bytes, and the limits that follow."""

from __future__ import annotations

from dataclasses import dataclass

from sl_serve.kv.layout import KVSpec
from sl_serve.plan.budget import gib
from sl_serve.stats import MemoryTier


@dataclass(frozen=True, slots=True)
class WeightSizes:
    """As stored; on a device the head as it is computed with. A tied head counts as head alone, or
    where it differs from the table in host memory, as both."""

    layer_bytes: int
    embedding_bytes: int
    head_bytes: int
    others_bytes: int  # final norm and the like
    expanded_layer_bytes: int = 0  # on a device, of a layer that is not computed with as stored
    disk_tier: bool = False  # layers may stay on disk
    vocabulary_in_file: bool = False  # embedding and head may: rows and pieces of them are read
    expert_bytes: int = 0  # of one, the largest

    @property
    def static_bytes(self) -> int:
        return self.embedding_bytes + self.head_bytes + self.others_bytes


def sub_batch_tokens(max_rows: int, n_sub_batches: int, prefill_tokens: int) -> int:
    """The most of one: its share of the rows, and perhaps the step's whole prefill. A slab, which
    is never divided, has no more."""
    return -(-max_rows // n_sub_batches) + prefill_tokens


@dataclass(frozen=True, slots=True)
class MemoryPlan:
    """Sizes in bytes of everything that is allocated before the first step, and the limits that
    follow. Slots, windows and staging are zero where host memory is device memory."""

    weights_bytes: int  # of the layers in host memory
    n_device_layers: int  # that never leave the device
    device_layers_bytes: int
    n_disk_layers: int
    disk_bytes: int  # of the layers on disk
    ring_bytes: int  # host memory that the disk's layers come through
    embedding_on_disk: bool
    head_on_disk: bool
    static_bytes: int
    static_device_bytes: int  # of static_bytes, what a device with memory of its own holds
    kv: KVSpec  # in host memory
    device_kv: KVSpec  # the same on a device with memory of its own, as it is computed with
    host_attends: bool  # to its KV; else that passes through windows, or there is no device
    n_chunks: int  # in host memory
    n_device_chunks: int  # beside them, of rows whose KV stays on the device
    window_chunks: int  # of the host's, what a sub-batch may touch
    workspace_bytes: int
    hidden_bytes: int  # hidden states that are swapped: in host memory, and buffers on the device
    hidden_host_bytes: int  # of hidden_bytes
    device_slots_bytes: int
    expansion_bytes: int  # on a device: for one layer expanded, and what that takes on its way
    windows_bytes: int  # for KV prefixes on the device
    staging_bytes: int  # for new K and V on their way up, on device and host
    staging_host_bytes: int  # of staging_bytes
    available_bytes: int  # on the host
    device_available_bytes: int | None  # None: the device has no memory of its own, or no ceiling
    max_model_len: int
    max_rows: int
    max_slab_width: int
    n_sub_batches: int
    prefill_tokens: int
    look_ahead: int
    expert_cache_bytes: int = 0  # on the device, for experts that were needed lately

    @property
    def kv_bytes(self) -> int:
        return self.n_chunks * self.kv.chunk_bytes

    @property
    def device_kv_bytes(self) -> int:
        return self.n_device_chunks * self.device_kv.chunk_bytes

    @property
    def device_bytes(self) -> int:
        """Zero where host memory is device memory."""
        if not (self.device_slots_bytes or self.n_device_layers):
            return 0
        weights = self.device_layers_bytes + self.device_slots_bytes + self.static_device_bytes
        staging = self.staging_bytes - self.staging_host_bytes
        kv = self.windows_bytes + self.device_kv_bytes
        hidden = self.hidden_bytes - self.hidden_host_bytes
        weights += self.expansion_bytes + self.expert_cache_bytes
        return weights + kv + staging + hidden + self.workspace_bytes

    @property
    def total_bytes(self) -> int:
        weights = self.weights_bytes + self.device_layers_bytes + self.ring_bytes
        passing = self.device_slots_bytes + self.expansion_bytes + self.expert_cache_bytes
        passing += self.windows_bytes + self.staging_bytes
        kv = self.kv_bytes + self.device_kv_bytes
        passing += self.hidden_bytes
        return weights + self.static_bytes + kv + self.workspace_bytes + passing

    @property
    def host_bytes(self) -> int:
        return self.total_bytes - self.device_bytes

    @property
    def max_step_tokens(self) -> int:
        return self.max_rows + self.prefill_tokens

    @property
    def max_sub_batch_tokens(self) -> int:
        return sub_batch_tokens(self.max_rows, self.n_sub_batches, self.prefill_tokens)

    @property
    def swaps_hidden(self) -> bool:
        """Whether hidden states pass through the device instead of staying there."""
        return self.hidden_bytes > 0

    def tiers(self) -> tuple[MemoryTier, ...]:
        """What `host_bytes`, `device_bytes` and `disk_bytes` consist of; no tier without parts."""
        on_device = self.device_bytes > 0
        host = [
            ("layers", self.weights_bytes),
            ("disk ring", self.ring_bytes),
            (self._static_name(), self.static_bytes - on_device * self.static_device_bytes),
            ("KV cache", self.kv_bytes),
            ("hidden states", self.hidden_host_bytes),
            ("KV staging", self.staging_host_bytes),
            ("workspace", 0 if on_device else self.workspace_bytes),
        ]
        device = [
            ("layers", self.device_layers_bytes),
            (self._static_name(), self.static_device_bytes),
            ("KV cache", self.device_kv_bytes),
            ("layer slots", self.device_slots_bytes),
            ("expanded layer", self.expansion_bytes),
            ("expert cache", self.expert_cache_bytes),
            ("KV windows", self.windows_bytes),
            ("hidden states", self.hidden_bytes - self.hidden_host_bytes),
            ("KV staging", self.staging_bytes - self.staging_host_bytes),
            ("workspace", self.workspace_bytes),
        ]
        tiers = (
            ("host", host, self.available_bytes),
            ("device", device if on_device else [], self.device_available_bytes),
            ("disk", [("layers", self.disk_bytes)], None),
        )
        known = [(name, tuple(p for p in parts if p[1]), budget) for name, parts, budget in tiers]
        return tuple(MemoryTier(name, parts, budget) for name, parts, budget in known if parts)

    def table(self) -> list[tuple[str, int, str]]:
        """(what, bytes, remark) for people, parts of no size left out."""
        rows_at_full_length = self.n_chunks * self.kv.chunk_tokens // self.max_model_len
        kv_remark = (
            f"{self.n_chunks * self.kv.chunk_tokens} tokens: {rows_at_full_length} requests of "
            f"{self.max_model_len}, at most {self.max_rows} at once"
        )
        n_host_layers = self.kv.n_layers - self.n_disk_layers - self.n_device_layers
        rows = [
            ("layers", self.weights_bytes, f"{n_host_layers} layers, read once per step"),
            ("disk ring", self.ring_bytes, self._disk_remark()),
            (self._static_name(), self.static_bytes, "resident"),
            ("KV cache", self.kv_bytes, kv_remark),
            ("workspace", self.workspace_bytes, f"up to {self.max_step_tokens} tokens a step"),
            ("hidden states", self.hidden_bytes, self._hidden_remark()),
            ("device layers", self.device_layers_bytes, f"{self.n_device_layers} layers, resident"),
            (
                "device KV",
                self.device_kv_bytes,
                f"{self.n_device_chunks * self.kv.chunk_tokens} tokens, resident",
            ),
            ("layer slots", self.device_slots_bytes, f"look-ahead {self.look_ahead}"),
            ("expanded layer", self.expansion_bytes, "the one that is computed with"),
            ("expert cache", self.expert_cache_bytes, "experts that were needed lately"),
            ("KV windows", self.windows_bytes, "prefixes on their way to the device"),
            ("KV staging", self.staging_bytes, self._staging_remark()),
        ]
        return [row for row in rows if row[1]]

    def _disk_remark(self) -> str:
        layers = f"{self.n_disk_layers} layers ({gib(self.disk_bytes)}) read from disk every step"
        return layers + (", the head too" if self.head_on_disk else "")

    def _hidden_remark(self) -> str:
        on_device = gib(self.hidden_bytes - self.hidden_host_bytes)
        return f"swapped: between layers in host memory, {on_device} on the device"

    def _staging_remark(self) -> str:
        if self.host_attends:
            return "new tokens on their way to the processor's attention and back"
        return "new tokens on their way from the device"

    def _static_name(self) -> str:
        if self.head_on_disk:
            return "final norm"
        return "head" if self.embedding_on_disk else "embedding and head"
