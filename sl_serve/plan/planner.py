"""One-shot tuning: of a grid of placements, the fastest that fits every tier.

The grid does not depend on the budgets, and what is left of a tier is filled with layers, so more
memory can only add placements or make them better: a larger budget is never slower.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import dataclass, replace
from functools import cache
from typing import Literal, NamedTuple

from sl_serve.config import AttentionPlacement
from sl_serve.errors import MemoryBudgetError, UserError
from sl_serve.plan.budget import MIB, exact_size, gib
from sl_serve.plan.hardware import Hardware
from sl_serve.plan.kv_size import MARGIN_SHARE
from sl_serve.plan.model_sizes import ModelSizes
from sl_serve.plan.placement import (
    Part,
    Placement,
    Tier,
    Workload,
    memory_parts,
    tier_bytes,
)
from sl_serve.plan.predict import Prediction, predict, total_seconds
from sl_serve.plan.schedule import steps_of

ROWS = (1, 2, 3, 4, 6, 8, 12, 16, 24, 32, 48, 64, 96, 128, 192, 256, 384, 512)
SUB_BATCHES = (1, 2, 3, 4, 6, 8, 12, 16)
PREFILL_TOKENS = (256, 1024, 4096)
KV_DEVICE_SHARES = (0.0, 0.25, 0.5, 0.75, 1.0)
AttentionPlace = Literal["device", "host"]


@dataclass(frozen=True, slots=True)
class Budgets:
    """Bytes that a plan may use on each tier: ceilings."""

    device: int
    host: int
    disk: int

    @classmethod
    def of(cls, hardware: Hardware) -> Budgets:
        """All of a machine but the margin that is left to others."""
        device, host = (
            int(n * (1 - MARGIN_SHARE)) for n in (hardware.device_bytes, hardware.host_bytes)
        )
        return cls(device, host, hardware.disk_bytes)

    def get(self, tier: Tier) -> int:
        return {"device": self.device, "host": self.host, "disk": self.disk}[tier]


@dataclass(frozen=True, slots=True)
class Abilities:
    """What the engine can do; the planner chooses nothing else."""

    attention: tuple[AttentionPlace, ...] = ("device", "host")
    kv_device_shares: tuple[float, ...] = KV_DEVICE_SHARES
    layers_first: bool = False  # KV on the device only beside all layers


# Of the engine as it is: KV stays on the device where that has all layers.
ENGINE = Abilities(layers_first=True)


def engine_abilities(attention: AttentionPlacement) -> Abilities:
    """Of the engine, told where to attend."""
    return ENGINE if attention == "auto" else replace(ENGINE, attention=(attention,))


@dataclass(frozen=True, slots=True)
class Plan:
    placement: Placement
    parts: tuple[Part, ...]
    prediction: Prediction
    model: ModelSizes  # as placed: with layers as stored, or expanded for good
    # Of the best placement whose attention is in the other place, if one fits.
    other_attention: Prediction | None = None


class _Candidate(NamedTuple):
    wall_s: float
    sizes: ModelSizes
    placement: Placement


def choose(
    model: ModelSizes,
    hardware: Hardware,
    budgets: Budgets,
    workload: Workload,
    abilities: Abilities = ENGINE,
) -> Plan:
    """The placement with the most tokens/s.

    Raises MemoryBudgetError, naming budgets that would do, when none fits; UserError when a
    request is longer than the model's context.
    """
    if workload.total_tokens > model.max_positions:
        raise UserError(
            f"a prompt of {workload.prompt_tokens} tokens and an output of "
            f"{workload.output_tokens} pass the {model.max_positions} positions of {model.name}; "
            "ask for fewer"
        )
    known_steps = cache(lambda rows, prefill: steps_of(workload, rows, prefill))
    best: dict[AttentionPlace, _Candidate] = {}
    for cut in _grid(workload, hardware.has_device, abilities):
        found = _placed(model, cut, hardware, budgets, workload)
        if found is None:
            continue
        sizes, placement = found
        if abilities.layers_first and placement.kv_device_share and placement.n_streamed_layers:
            continue
        steps = known_steps(min(cut.total_rows, workload.n_requests), cut.prefill_tokens)
        wall_s = total_seconds(sizes, placement, hardware, steps)
        place = placement.attention
        if place not in best or wall_s < best[place].wall_s:
            best[place] = _Candidate(wall_s, sizes, placement)
    if not best:
        raise _refusal(model, hardware, budgets, workload)
    first, *others = sorted(best.values(), key=lambda found: found.wall_s)
    parts = memory_parts(first.sizes, first.placement, workload, hardware.has_device)
    predictions = [
        predict(found.sizes, found.placement, hardware, workload) for found in (first, *others)
    ]
    return Plan(first.placement, tuple(parts), predictions[0], first.sizes, *predictions[1:])


def _placed(
    model: ModelSizes, cut: Placement, hardware: Hardware, budgets: Budgets, workload: Workload
) -> tuple[ModelSizes, Placement] | None:
    """The cut filled, layers as stored; or, where the device has room for all of them expanded,
    so for good. Hidden states are swapped where it does not fit otherwise. These are the engine's
    rules too."""
    if model.expanded_layer_bytes:
        expanded = model.expanded()
        placement = fill(expanded, cut, hardware, budgets, workload)
        if placement is not None and not placement.n_streamed_layers:
            return expanded, placement
    placement = fill(model, cut, hardware, budgets, workload)
    if placement is None and hardware.has_device and cut.may_swap_hidden:
        swapped = replace(cut, swaps_hidden=True)
        placement = fill(model, swapped, hardware, budgets, workload)
    return None if placement is None else (model, placement)


def fill(
    model: ModelSizes, cut: Placement, hardware: Hardware, budgets: Budgets, workload: Workload
) -> Placement | None:
    """The cut with as many layers as fit on the device, then in host memory, then on disk; None
    when that is not all of them. How many layers the cut itself has does not matter."""

    def fits(n_device: int, n_host: int) -> Placement | None:
        placed = replace(
            cut,
            n_device_layers=n_device,
            n_host_layers=n_host,
            n_disk_layers=model.n_layers - n_device - n_host,
        )
        return placed if _fits(model, placed, hardware, budgets, workload) else None

    # Where no layer is streamed there are no slots, and where none is on disk no ring: try that
    # first. Otherwise every layer more on the device is one less on the tiers below.
    n_device = _most_on_device(model, cut, hardware, budgets, workload)
    if n_device is None:
        return None
    rest = model.n_layers - n_device
    if (whole := fits(n_device, rest)) is not None:
        return whole
    if hardware.disk_read_bytes_per_s <= 0:
        return None
    n_host = _most_on_host(model, cut, hardware, budgets, workload, n_device)
    return None if n_host is None else fits(n_device, n_host)


def _most_on_device(
    model: ModelSizes, cut: Placement, hardware: Hardware, budgets: Budgets, workload: Workload
) -> int | None:
    """None when not even a device that streams all layers has room."""
    if not hardware.has_device:
        return 0

    def free(n_layers: int) -> int:
        placed = replace(
            cut, n_device_layers=n_layers, n_host_layers=model.n_layers - n_layers, n_disk_layers=0
        )
        return budgets.device - tier_bytes(memory_parts(model, placed, workload, True))["device"]

    if free(model.n_layers) >= 0:
        return model.n_layers
    left = free(0)
    return None if left < 0 else min(left // model.layer_bytes, model.n_layers - 1)


def _most_on_host(
    model: ModelSizes,
    cut: Placement,
    hardware: Hardware,
    budgets: Budgets,
    workload: Workload,
    n_device: int,
) -> int | None:
    """With at least one layer on disk; None when host memory lacks room for the rest."""
    n_streamed = model.n_layers - n_device
    if not n_streamed:
        return None
    placed = replace(cut, n_device_layers=n_device, n_host_layers=0, n_disk_layers=n_streamed)
    parts = memory_parts(model, placed, workload, hardware.has_device)
    left = budgets.host - tier_bytes(parts)["host"]
    return None if left < 0 else min(left // model.layer_bytes, n_streamed - 1)


def _fits(
    model: ModelSizes,
    placement: Placement,
    hardware: Hardware,
    budgets: Budgets,
    workload: Workload,
) -> bool:
    used = tier_bytes(memory_parts(model, placement, workload, hardware.has_device))
    return all(used[tier] <= budgets.get(tier) for tier in used)


def _grid(workload: Workload, has_device: bool, abilities: Abilities) -> Iterator[Placement]:
    """Ways to cut a step, layers not yet placed; no more rows than there are requests."""
    shares = abilities.kv_device_shares if has_device else (0.0,)
    places = abilities.attention if has_device else ("device",)
    for n_sub_batches in SUB_BATCHES if has_device else (1,):
        enough = math.ceil(workload.n_requests / n_sub_batches)
        for rows in (*(r for r in ROWS if r < enough), *([enough] if enough <= ROWS[-1] else [])):
            for prefill_tokens in PREFILL_TOKENS:
                for share in shares:
                    for place in places if share < 1 else places[:1]:
                        yield Placement(
                            0, 0, 0, rows, n_sub_batches, prefill_tokens, 1, share, place
                        )


def least_budgets(
    model: ModelSizes, hardware: Hardware, budgets: Budgets, workload: Workload
) -> Budgets:
    """The given budgets, device and host raised as far as anything runs at all: one row, the
    smallest prefill chunk. Whole MiB."""
    cut = Placement(0, 0, model.n_layers, 1, 1, min(PREFILL_TOKENS))
    used = tier_bytes(memory_parts(model, cut, workload, hardware.has_device))
    device = max(budgets.device, _whole(used["device"])) if hardware.has_device else 0
    raised = replace(budgets, device=device)
    n_device = _most_on_device(model, cut, hardware, raised, workload) or 0
    n_streamed = model.n_layers - n_device
    # Without a layer on disk there is no ring: the first layer there must pay for it.
    n_disk = min(n_streamed, budgets.disk // model.layer_bytes)
    hosts = []
    for n in {0, n_disk if hardware.disk_read_bytes_per_s > 0 else 0}:
        placed = replace(
            cut, n_device_layers=n_device, n_host_layers=n_streamed - n, n_disk_layers=n
        )
        parts = memory_parts(model, placed, workload, hardware.has_device)
        hosts.append(_whole(tier_bytes(parts)["host"]))
    return replace(raised, host=max(budgets.host, min(hosts)))


def _refusal(
    model: ModelSizes, hardware: Hardware, budgets: Budgets, workload: Workload
) -> MemoryBudgetError:
    enough = least_budgets(model, hardware, budgets, workload)
    raises = [
        f"--{tier}-memory to {exact_size(enough.get(tier))}"
        for tier in ("device", "host")
        if enough.get(tier) > budgets.get(tier)
    ]
    kv = workload.total_tokens * model.kv_token_bytes
    there = f"{gib(budgets.host)} of host memory and {gib(budgets.disk)} of disk are"
    if hardware.has_device:
        there = f"{gib(budgets.device)} of device memory, {there}"
    return MemoryBudgetError(
        f"{model.name} does not fit: {gib(model.weights_bytes)} of weights, {gib(kv)} of KV for a "
        f"request of {workload.total_tokens} tokens; {there} there; raise {' and '.join(raises)}"
    )


def _whole(n_bytes: int) -> int:
    """Rounded up to MiB: easier to type."""
    return -(-n_bytes // MIB) * MIB
