"""Where everything lies and how a step is cut: what the planner chooses, and its memory."""

from __future__ import annotations

import math
from collections.abc import Iterable
from dataclasses import dataclass
from typing import Literal, NamedTuple

from sl_serve.hidden import n_hidden_buffers
from sl_serve.kv.layout import HOST_STAGING_BUFFERS, n_windows
from sl_serve.plan.memory import MemoryPlan
from sl_serve.plan.model_sizes import ModelSizes
from sl_serve.plan.step_memory import (
    expansion_bytes,
    host_attention_token_bytes,
    logits_lines,
    n_layer_slots,
    n_layers_in_use,
    n_ring_slots,
)

Tier = Literal["device", "host", "disk"]
TIERS: tuple[Tier, ...] = ("device", "host", "disk")


@dataclass(frozen=True, slots=True)
class Workload:
    """n_requests of equal length, all there from the start."""

    prompt_tokens: int
    output_tokens: int
    n_requests: int

    def __post_init__(self) -> None:
        assert min(self.prompt_tokens, self.output_tokens, self.n_requests) > 0

    @property
    def total_tokens(self) -> int:
        """Of a request at its end."""
        return self.prompt_tokens + self.output_tokens


@dataclass(frozen=True, slots=True)
class Placement:
    """`kv_device_share`: of all rows, those whose KV stays on the device. `attention`: where the
    other rows' is read. Both mean nothing where the processor computes in host memory."""

    n_device_layers: int
    n_host_layers: int
    n_disk_layers: int
    rows: int  # per sub-batch
    n_sub_batches: int
    prefill_tokens: int  # prompt tokens of a step
    look_ahead: int = 1
    kv_device_share: float = 0.0
    attention: Literal["device", "host"] = "device"
    head_on_disk: bool = False
    swaps_hidden: bool = False  # hidden states pass through the device instead of staying there

    @property
    def total_rows(self) -> int:
        return self.rows * self.n_sub_batches

    @property
    def step_tokens(self) -> int:
        """The most."""
        return self.total_rows + self.prefill_tokens

    @property
    def sub_batch_tokens(self) -> int:
        """The most: a step's whole prefill may fall into one sub-batch."""
        return self.rows + self.prefill_tokens

    @property
    def hidden_buffer_tokens(self) -> int:
        """Whose hidden states are on the device at a time where they are swapped."""
        return n_hidden_buffers(self.look_ahead) * self.sub_batch_tokens

    @property
    def may_swap_hidden(self) -> bool:
        """As the engine has it: not where the processor attends, nor where that saves nothing."""
        saves = self.hidden_buffer_tokens < self.step_tokens
        return saves and self.attention == "device"

    @property
    def n_streamed_layers(self) -> int:
        return self.n_host_layers + self.n_disk_layers


def placement_of(plan: MemoryPlan, workload: Workload) -> Placement:
    """As the engine will run the workload: the plan's cut, with the rows whose KV it holds."""
    total_tokens = workload.total_tokens
    host_rows = plan.kv_bytes // (plan.kv.token_bytes * total_tokens)
    device_rows = plan.device_kv_bytes // (plan.device_kv.token_bytes * total_tokens)
    rows = max(1, min(plan.max_rows, device_rows + host_rows))
    return Placement(
        n_device_layers=plan.n_device_layers,
        n_host_layers=plan.kv.n_layers - plan.n_device_layers - plan.n_disk_layers,
        n_disk_layers=plan.n_disk_layers,
        rows=-(-rows // plan.n_sub_batches),
        n_sub_batches=plan.n_sub_batches,
        prefill_tokens=plan.prefill_tokens,
        look_ahead=plan.look_ahead,
        kv_device_share=min(1.0, device_rows / rows),
        attention="host" if plan.host_attends else "device",
        head_on_disk=plan.head_on_disk,
        swaps_hidden=plan.swaps_hidden,
    )


class Part(NamedTuple):
    """A line of the memory table."""

    tier: Tier
    what: str
    n_bytes: int


def memory_parts(
    model: ModelSizes, placement: Placement, workload: Workload, has_device: bool
) -> list[Part]:
    """Everything that is allocated before the first step, parts of no size left out."""
    place = _on_device if has_device else _in_place
    layers = [
        Part("disk", "layers", placement.n_disk_layers * model.layer_bytes),
        Part("host", "layers", placement.n_host_layers * model.layer_bytes),
    ]
    if placement.n_disk_layers:
        slots = n_ring_slots(not has_device, placement.look_ahead)
        layers.append(Part("host", "disk ring", slots * model.layer_bytes))
    parts = [*layers, *place(model, placement, workload)]
    return [part for part in parts if part.n_bytes]


def tier_bytes(parts: Iterable[Part]) -> dict[Tier, int]:
    sums = dict.fromkeys(TIERS, 0)
    for part in parts:
        sums[part.tier] += part.n_bytes
    return sums


def _in_place(model: ModelSizes, placement: Placement, workload: Workload) -> list[Part]:
    kv = placement.total_rows * workload.total_tokens * model.kv_token_bytes
    return [
        Part("host", "embedding and head", model.static_bytes),
        Part("host", "KV cache", kv),
        Part("host", "activations", _activation_bytes(model, placement)),
    ]


def _on_device(model: ModelSizes, placement: Placement, workload: Workload) -> list[Part]:
    n_device_rows = math.ceil(placement.kv_device_share * placement.total_rows)
    n_host_rows = placement.total_rows - n_device_rows
    row_bytes = workload.total_tokens * model.kv_token_bytes
    device_row_bytes = workload.total_tokens * model.n_layers * model.device_kv_token_layer_bytes
    host_attends = placement.attention == "host"
    windows = n_windows(placement.look_ahead)
    device_staging, host_staging = _staging_bytes(model, placement) if n_host_rows else (0, 0)
    slots = n_layer_slots(placement.look_ahead, host_attends)
    n_in_use = n_layers_in_use(placement.look_ahead, host_attends)
    line_bytes = model.hidden_size * model.itemsize * placement.swaps_hidden
    parts = [
        Part("device", "embedding and head", model.static_bytes),
        Part("device", "layers", placement.n_device_layers * model.layer_bytes),
        Part(
            "device", "layer slots", slots * model.layer_bytes * bool(placement.n_streamed_layers)
        ),
        Part("device", "expanded layer", expansion_bytes(model.expanded_layer_bytes, n_in_use)),
        Part("device", "KV cache", n_device_rows * device_row_bytes),
        Part("device", "KV staging", device_staging),
        Part("device", "activations", _activation_bytes(model, placement)),
        Part("device", "hidden states", placement.hidden_buffer_tokens * line_bytes),
        Part("host", "KV cache", n_host_rows * row_bytes),
        Part("host", "KV staging", host_staging),
        Part("host", "hidden states", placement.step_tokens * line_bytes),
    ]
    if not host_attends:
        # One layer of the rows of a sub-batch whose KV comes from the host.
        rows = min(n_host_rows, placement.rows)
        token_bytes = windows * model.kv_token_layer_bytes
        if model.kv_is_expanded:
            token_bytes += model.device_kv_token_layer_bytes
        parts.append(Part("device", "KV windows", rows * workload.total_tokens * token_bytes))
    return parts


def _staging_bytes(model: ModelSizes, placement: Placement) -> tuple[int, int]:
    """On the device and on the host: for every token of a step where the processor attends, else
    for those of the largest sub-batch."""
    if placement.attention == "host":
        tokens = placement.step_tokens
        per_token = host_attention_token_bytes(model.q_size, model.kv_size, model.itemsize)
        return tokens * per_token[0], tokens * per_token[1]
    tokens = placement.sub_batch_tokens
    n_bytes = tokens * model.kv_token_layer_bytes
    return n_windows(placement.look_ahead) * n_bytes, HOST_STAGING_BUFFERS * n_bytes


def _activation_bytes(model: ModelSizes, placement: Placement) -> int:
    """Hidden states of every row and prompt token of a step, unless they are swapped, what one
    layer needs for the largest sub-batch, and one block of logits."""
    waiting = 0 if placement.swaps_hidden else placement.step_tokens - placement.sub_batch_tokens
    hidden = waiting * model.hidden_size * model.itemsize
    layer = model.activations.at(placement.sub_batch_tokens)
    logits = logits_lines(placement.total_rows) * model.vocab_size * model.itemsize
    return hidden + layer + logits
