"""How long steps take: every resource's time, the longest one binds.

    disk         (n_disk_layers * layer + the head, if it is there) / disk rate
    link down    (streamed layers + KV prefixes of the host's rows) / rate down
    link up      new K and V of the host's rows / rate up
                 hidden states that are swapped: each way once per layer
    compute      matrix products by rows, or reading the weights; attention; what is done element
                 by element; a fixed cost per cell; on a device, layers in blocks read once and
                 written expanded
    host memory  everything that crosses it: what goes over the link, comes from disk, is attended
                 to by the processor, or is read by it

    step = longest + (sum of the others) / cells      what is not overlapped is one cell
    step = sum                                        look-ahead 0

Where the processor attends, host memory takes as long as that needs too. A sub-batch waits for it
and it for the sub-batch: only other sub-batches keep both busy, so the longest is at least
(compute + attention there) / sub-batches.

The processor that computes in host memory has neither link nor device: weights and KV are read by
compute.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal, NamedTuple

import numpy as np

from sl_serve.plan.hardware import Floats, Hardware
from sl_serve.plan.model_sizes import ModelSizes
from sl_serve.plan.placement import Placement, Workload
from sl_serve.plan.schedule import Steps, decode_step, prefill_step, steps_of

Resource = Literal["disk", "link down", "link up", "compute", "host memory"]
RESOURCES: tuple[Resource, ...] = ("disk", "link down", "link up", "compute", "host memory")


@dataclass(frozen=True, slots=True)
class StepTime:
    """One step's seconds, and those of each resource."""

    step_s: float
    resource_s: dict[Resource, float]

    @property
    def binds(self) -> Resource:
        return max(self.resource_s, key=lambda r: self.resource_s[r])


@dataclass(frozen=True, slots=True)
class Prediction:
    wall_s: float  # of the whole workload
    tokens_per_s: float  # generated tokens over wall_s, prefill included
    decode: StepTime  # all rows decode, at the mean context
    decode_tokens_per_s: float
    prefill: StepTime  # one step of prompt tokens alone
    prefill_tokens_per_s: float
    binds: Resource  # over the whole workload


def predict(
    model: ModelSizes, placement: Placement, hardware: Hardware, workload: Workload
) -> Prediction:
    n_rows = min(placement.total_rows, workload.n_requests)
    steps = steps_of(workload, n_rows, placement.prefill_tokens)
    load = busy(model, placement, hardware, steps)
    wall_s = float((step_seconds(model, placement, steps, load) * steps.n_repeats).sum())
    totals = [float((load.seconds[r] * steps.n_repeats).sum()) for r in RESOURCES]
    prompt_tokens = min(placement.prefill_tokens, n_rows * workload.prompt_tokens)
    decode = _step_time(model, placement, hardware, decode_step(workload, n_rows))
    prefill = _step_time(model, placement, hardware, prefill_step(workload, prompt_tokens))
    return Prediction(
        wall_s=wall_s,
        tokens_per_s=workload.n_requests * workload.output_tokens / wall_s,
        decode=decode,
        decode_tokens_per_s=n_rows / decode.step_s,
        prefill=prefill,
        prefill_tokens_per_s=prompt_tokens / prefill.step_s,
        binds=RESOURCES[int(np.argmax(totals))],
    )


def total_seconds(
    model: ModelSizes, placement: Placement, hardware: Hardware, steps: Steps
) -> float:
    load = busy(model, placement, hardware, steps)
    return float((step_seconds(model, placement, steps, load) * steps.n_repeats).sum())


class Busy(NamedTuple):
    """Of each step: seconds of each resource, and those that all sub-batches together spend
    computing or waiting for the processor to attend."""

    seconds: dict[Resource, Floats]
    in_turn_s: Floats


def busy(model: ModelSizes, placement: Placement, hardware: Hardware, steps: Steps) -> Busy:
    times = _with_device if hardware.has_device else _in_place
    seconds, in_turn_s = times(model, placement, hardware, steps)
    disk_bytes = _disk_bytes(model, placement, hardware, steps)
    seconds["disk"] = disk_bytes * (1 / hardware.disk_read_bytes_per_s if disk_bytes.any() else 0)
    return Busy(seconds, in_turn_s)


def step_seconds(model: ModelSizes, placement: Placement, steps: Steps, load: Busy) -> Floats:
    stacked = np.stack([load.seconds[r] for r in RESOURCES])
    together = stacked.sum(axis=0)
    if placement.look_ahead == 0:
        return np.asarray(together)
    longest = stacked.max(axis=0)
    n_sub_batches = _sub_batches(placement, steps)
    rest = (together - longest) / (model.n_layers * n_sub_batches)
    in_parallel = np.maximum(longest, load.in_turn_s / n_sub_batches) + rest
    return np.asarray(np.minimum(in_parallel, together))


def _disk_bytes(
    model: ModelSizes, placement: Placement, hardware: Hardware, steps: Steps
) -> Floats:
    """For a device layers are read whole."""
    head = model.head_bytes if placement.head_on_disk else 0
    layer: Floats = np.full(len(steps.n_repeats), float(model.layer_bytes))
    if not hardware.has_device:
        layer = model.fetched_layer_bytes(steps.n_tokens)
    return np.asarray(placement.n_disk_layers * layer + head)


def _step_time(
    model: ModelSizes, placement: Placement, hardware: Hardware, steps: Steps
) -> StepTime:
    load = busy(model, placement, hardware, steps)
    step_s = float(step_seconds(model, placement, steps, load)[0])
    return StepTime(step_s, {r: float(load.seconds[r][0]) for r in RESOURCES})


def _sub_batches(placement: Placement, steps: Steps) -> Floats:
    """A sub-batch has at least one row."""
    return np.clip(steps.n_rows, 1, placement.n_sub_batches)


def _with_device(model: ModelSizes, placement: Placement, hardware: Hardware, steps: Steps) -> Busy:
    host_share = 1.0 - placement.kv_device_share
    on_host = placement.attention == "host"
    prefix = steps.prefix_tokens * model.kv_token_bytes * host_share
    down = prefix
    up = steps.n_tokens * model.kv_token_bytes * host_share
    attention_s: Floats = np.zeros(len(prefix))  # by the processor
    if on_host:  # queries and results cross instead of the prefix
        query_bytes = model.n_layers * model.q_size * model.itemsize
        down = steps.n_tokens * query_bytes * host_share
        up = up + down
        attention_s = host_share * _host_attention_seconds(model, hardware, steps)
    if placement.swaps_hidden:
        hidden = steps.n_tokens * model.n_layers * model.hidden_size * model.itemsize
        down, up = down + hidden, up + hidden
    down = down + placement.n_host_layers * model.fetched_layer_bytes(steps.n_tokens)
    down = down + placement.n_disk_layers * model.layer_bytes
    link_down, link_up = _link_seconds(hardware, down, up)
    from_disk = _disk_bytes(model, placement, hardware, steps)
    on_device = placement.kv_device_share if on_host else 1.0
    compute = _compute_seconds(model, placement, hardware, steps, on_device)
    read = hardware.host_read_bytes_per_s
    seconds: dict[Resource, Floats] = {
        "link down": link_down,
        "link up": link_up,
        "compute": compute,
        "host memory": (down + up + from_disk) / read + attention_s,
    }
    return Busy(seconds, compute + attention_s)


def _host_attention_seconds(model: ModelSizes, hardware: Hardware, steps: Steps) -> Floats:
    """Of all rows."""
    rates = hardware.host_attention
    read = min(rates.prefix_bytes_per_s, hardware.host_read_bytes_per_s)
    flops = steps.attended_tokens * model.n_layers * model.attention_layer_flops
    reading_s = steps.prefix_tokens * model.kv_token_bytes / read
    return np.asarray(reading_s + flops / rates.flops_per_s)


def _in_place(model: ModelSizes, placement: Placement, hardware: Hardware, steps: Steps) -> Busy:
    own = model.layer_bytes - model.experts_bytes  # experts are read once for all sub-batches
    experts = model.experts_bytes - model.idle_bytes(steps.n_tokens)
    weights = model.n_layers * (_sub_batches(placement, steps) * own + experts)
    kv = steps.prefix_tokens * model.kv_token_bytes
    from_disk = _disk_bytes(model, placement, hardware, steps)
    nothing: Floats = np.zeros(len(kv))
    compute = _compute_seconds(model, placement, hardware, steps, 1.0)
    seconds: dict[Resource, Floats] = {
        "link down": nothing,
        "link up": nothing,
        "compute": compute,
        "host memory": (weights + kv + from_disk) / hardware.host_read_bytes_per_s,
    }
    return Busy(seconds, nothing)


def _link_seconds(hardware: Hardware, down: Floats, up: Floats) -> tuple[Floats, Floats]:
    """Both directions start together; when one ends, the other goes on at its rate alone."""
    down_both, up_both = hardware.link_down_both_bytes_per_s, hardware.link_up_both_bytes_per_s
    both_s = np.minimum(down / down_both, up / up_both)
    down_s = both_s + (down - both_s * down_both) / hardware.link_down_bytes_per_s
    up_s = both_s + (up - both_s * up_both) / hardware.link_up_bytes_per_s
    return down_s, up_s


def _compute_seconds(
    model: ModelSizes, placement: Placement, hardware: Hardware, steps: Steps, kv_share: float
) -> Floats:
    """`kv_share`: of the rows, those attended to where the matrix products are made."""
    n_sub_batches = _sub_batches(placement, steps)
    read = hardware.compute_read_bytes_per_s
    products = hardware.matmul.seconds(steps.n_tokens / n_sub_batches, model.layer_flops_per_token)
    needed = model.needed_share(steps.n_tokens)
    layer_s = n_sub_batches * (
        np.maximum(products, needed * model.computed_layer_bytes / read) + hardware.cell_overhead_s
    )
    if model.expanded_layer_bytes:  # once, for all sub-batches
        layer_s += needed * (model.layer_bytes + model.expanded_layer_bytes) / read
    elementwise_bytes = model.activations.per_token + model.kv_token_layer_bytes
    layer_s += steps.n_tokens * elementwise_bytes / hardware.elementwise_bytes_per_s
    head_s = np.maximum(
        hardware.head.seconds(steps.n_samples, model.head_flops_per_token),
        np.where(steps.n_samples > 0, model.head_bytes / read, 0.0),
    )
    rates = hardware.attention
    attention_s = kv_share * (
        steps.prefix_tokens * _attended_bytes(model, hardware) / rates.prefix_bytes_per_s
        + steps.attended_tokens * model.attention_layer_flops / rates.flops_per_s
    )
    return np.asarray(model.n_layers * (layer_s + attention_s) + head_s)


def _attended_bytes(model: ModelSizes, hardware: Hardware) -> int:
    """Of a token's K and V at one layer, where the matrix products are made; on a device what is
    stored otherwise is read, written as it is computed with, and read again."""
    if not hardware.has_device:
        return model.kv_token_layer_bytes
    once = model.device_kv_token_layer_bytes
    return model.kv_token_layer_bytes + 2 * once if model.kv_is_expanded else once
