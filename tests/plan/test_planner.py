from __future__ import annotations

import re
from dataclasses import replace

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from sl_serve.errors import MemoryBudgetError, UserError
from sl_serve.plan.budget import parse_size
from sl_serve.plan.hardware import AttentionRates, Hardware, MatmulRates
from sl_serve.plan.model_reader import read_sizes
from sl_serve.plan.placement import TIERS, Placement, Workload, memory_parts, tier_bytes
from sl_serve.plan.planner import (
    ENGINE,
    Abilities,
    Budgets,
    Plan,
    _placed,
    choose,
    engine_abilities,
    fill,
)
from sl_serve.plan.profiles import PROFILES
from sl_serve.plan.report import serve_flags
from sl_serve.plan.what_if import what_helps
from sl_serve.weights.dummy import open_dummy
from tests.plan.examples import GB, MB, WORKLOADS, hardware, machines, model, placement, processor

FEW = settings(max_examples=40, deadline=None, derandomize=True)
SOME = Abilities(kv_device_shares=(0.0, 1.0))
WORK = Workload(prompt_tokens=1000, output_tokens=100, n_requests=8)


def plan(machine: Hardware, work: Workload, budgets: Budgets | None = None) -> Plan | None:
    """None where nothing fits."""
    try:
        return choose(model(), machine, budgets or Budgets.of(machine), work, SOME)
    except MemoryBudgetError:
        return None


@FEW
@given(machines(), WORKLOADS)
def test_a_plan_never_exceeds_a_budget(machine: Hardware, work: Workload) -> None:
    found = plan(machine, work)
    if found is None:
        return
    budgets, placed = Budgets.of(machine), found.placement
    assert all(tier_bytes(found.parts)[tier] <= budgets.get(tier) for tier in TIERS)
    assert placed.n_device_layers + placed.n_host_layers + placed.n_disk_layers == 10
    assert found.parts == tuple(memory_parts(model(), placed, work, machine.has_device))


@FEW
@given(machines(), WORKLOADS, st.floats(1, 4), st.sampled_from(["device", "host", "disk"]))
def test_more_memory_is_never_slower(
    machine: Hardware, work: Workload, factor: float, tier: str
) -> None:
    budgets = Budgets.of(machine)
    before = plan(machine, work, budgets)
    if before is None:
        return
    larger = replace(budgets, **{tier: int(getattr(budgets, tier) * factor)})
    after = plan(machine, work, larger)
    assert after is not None
    assert after.prediction.wall_s <= before.prediction.wall_s * (1 + 1e-9)


@FEW
@given(
    st.builds(
        lambda machine, device, host, disk: (machine, Budgets(device * MB, host * MB, disk * MB)),
        machines(),
        *[st.sampled_from([0, 10, 100, 250, 1000])] * 3,
    ),
    WORKLOADS,
)
def test_following_the_advice_of_a_refusal_works(
    given_: tuple[Hardware, Budgets], work: Workload
) -> None:
    machine, budgets = given_
    try:
        choose(model(), machine, budgets, work, SOME)
    except MemoryBudgetError as refusal:
        advice = dict(re.findall(r"--(device|host)-memory to (\w+)", str(refusal)))
        assert advice
        raised = {tier: parse_size(size) for tier, size in advice.items()}
        assert all(size > getattr(budgets, tier) for tier, size in raised.items())
        assert choose(model(), machine, replace(budgets, **raised), work, SOME).placement


def test_a_refusal_names_the_numbers() -> None:
    with pytest.raises(MemoryBudgetError) as refused:
        choose(model(), hardware(), Budgets(0, 500 * MB, 0), WORK)
    message = str(refused.value)
    assert "ten does not fit: 1001 MiB of weights, 21 MiB of KV" in message
    assert "0 MiB of device memory, 477 MiB of host memory and 0 MiB of disk are there" in message
    assert re.search(r"raise --device-memory to \d+MiB and --host-memory to \d+MiB$", message)


def test_memory_by_hand() -> None:
    where = placement(n_device_layers=3, n_host_layers=5, n_disk_layers=2, kv_device_share=0.5)
    used = tier_bytes(memory_parts(model(), where, WORK, has_device=True))
    row = 1100 * 20_000
    staging = (4 + 100) * 2_000  # tokens of the sub-batch, K and V at one layer
    activations = (4 + 100) * 10_000 + 16 * 1000 * 2  # and 16 lines of logits
    window = 2 * 1100 * 2_000  # two rows at one layer
    device = [50 * MB, 3 * 100 * MB, 2 * 100 * MB, 2 * row, 2 * staging, activations, 2 * window]
    assert used["device"] == sum(device)
    assert used["host"] == 5 * 100 * MB + 3 * 100 * MB + 2 * row + 4 * staging
    assert used["disk"] == 2 * 100 * MB


def test_memory_of_the_processor_by_hand() -> None:
    where = placement(n_host_layers=8, n_disk_layers=2)
    used = tier_bytes(memory_parts(model(), where, WORK, has_device=False))
    activations = (4 + 100) * 10_000 + 16 * 1000 * 2
    ring = 2 * 100 * MB  # the layer in use and the one that is looked ahead to
    assert used["host"] == 50 * MB + 800 * MB + ring + 4 * 1100 * 20_000 + activations
    assert used["device"] == 0


def test_layers_fill_the_fastest_tier_first() -> None:
    cut = placement(rows=1)
    budgets = Budgets(device=600 * MB, host=10 * GB, disk=0)
    placed = fill(model(), cut, hardware(), budgets, WORK)
    # 50 MB embedding and head, 200 MB slots, 22 MB KV, about 1 MB activations: 3 layers fit
    assert placed is not None
    assert (placed.n_device_layers, placed.n_host_layers, placed.n_disk_layers) == (3, 7, 0)
    some = fill(model(), cut, hardware(), replace(budgets, host=700 * MB, disk=GB), WORK)
    assert some == placed  # exactly enough
    less = fill(model(), cut, hardware(), replace(budgets, host=699 * MB, disk=GB), WORK)
    # the ring takes room for three layers
    assert less is not None
    assert (less.n_device_layers, less.n_host_layers, less.n_disk_layers) == (3, 3, 4)


def test_a_small_model_stays_on_the_device() -> None:
    machine = hardware(
        device_bytes=4 * GB,
        matmul=MatmulRates(((8, 1e11),)),
        host_attention=AttentionRates(1e9, 1e10),
    )
    found = choose(model(), machine, Budgets(4 * GB, 4 * GB, 0), WORK)
    assert (found.placement.n_device_layers, found.placement.kv_device_share) == (10, 1.0)
    assert found.prediction.binds == "compute"
    assert found.placement.total_rows >= 8
    assert found.prediction.decode.resource_s["link down"] == 0.0


def test_the_engine_keeps_kv_on_the_device_only_beside_all_layers() -> None:
    machine = hardware(device_bytes=4 * GB)
    some = choose(model(), machine, Budgets(900 * MB, 4 * GB, 0), WORK, ENGINE)
    assert some.placement.n_streamed_layers > 0 and some.placement.kv_device_share == 0.0
    free = Abilities(attention=("device",), kv_device_shares=(1.0,))
    forced = choose(model(), machine, Budgets(900 * MB, 4 * GB, 0), WORK, free)
    assert forced.placement.n_streamed_layers > 0 and forced.placement.kv_device_share == 1.0


def test_without_a_device_nothing_is_placed_there() -> None:
    found = choose(model(), processor(), Budgets.of(processor()), WORK)
    assert found.placement == Placement(
        0, 10, 0, rows=8, n_sub_batches=1, prefill_tokens=found.placement.prefill_tokens
    )
    assert {part.tier for part in found.parts} == {"host"}


def test_abilities_bound_the_choice() -> None:
    slow_link = hardware(device_bytes=400 * MB)
    free = choose(model(), slow_link, Budgets.of(slow_link), WORK, Abilities())
    assert (free.placement.attention, free.placement.kv_device_share) != ("device", 0.0)
    told = engine_abilities("device")
    found = choose(model(), slow_link, Budgets.of(slow_link), WORK, told)
    assert (found.placement.attention, found.placement.kv_device_share) == ("device", 0.0)
    assert found.prediction.tokens_per_s < free.prediction.tokens_per_s
    assert found.other_attention is None


@pytest.mark.parametrize(("host_rate", "place"), [(20e9, "host"), (0.1e9, "device")])
def test_the_faster_place_attends_and_the_other_is_told(host_rate: float, place: str) -> None:
    """KV crosses the link at 1 GB/s, after the layers; the processor reads it meanwhile."""
    machine = hardware(device_bytes=400 * MB, host_attention=AttentionRates(host_rate, 1e12))
    budgets = Budgets.of(machine)
    found = choose(model(), machine, budgets, WORK, ENGINE)
    assert found.placement.attention == place
    (other,) = {"host", "device"} - {place}
    forced = choose(model(), machine, budgets, WORK, engine_abilities(other))
    assert forced.placement.attention == other
    assert found.other_attention == forced.prediction
    assert forced.prediction.tokens_per_s < found.prediction.tokens_per_s
    flags = serve_flags(found.placement, [])
    assert ("--attention host" in flags) == (place == "host")


def test_memory_of_attention_by_the_processor_by_hand() -> None:
    where = placement(kv_device_share=0.0, attention="host", rows=2, n_sub_batches=2)
    used = tier_bytes(memory_parts(model(), where, WORK, has_device=True))
    tokens, crossing = 4 + 100, (1000 + 500 + 500 + 1000) * 2  # q, k, v and results
    activations = 2 * 1000 * 2 + (2 + 100) * 10_000 + 16 * 1000 * 2
    assert used["device"] == 50 * MB + 3 * 100 * MB + tokens * crossing + activations
    widened = (1000 + 500 + 500 + 1000) * 4
    kv = 4 * 1100 * 20_000
    assert used["host"] == 10 * 100 * MB + kv + tokens * (crossing + widened)


def test_hidden_states_are_swapped_only_where_they_would_not_fit() -> None:
    """160 rows and 10 prompt tokens of 2,000 bytes; 50 of them in a sub-batch."""
    cut = placement(rows=40, n_sub_batches=4, prefill_tokens=10, kv_device_share=0.0)
    work = replace(WORK, n_requests=160)
    used = {
        swaps: tier_bytes(memory_parts(model(), replace(cut, swaps_hidden=swaps), work, True))
        for swaps in (False, True)
    }
    assert used[False]["device"] - used[True]["device"] == (120 - 2 * 50) * 2000
    assert used[True]["host"] - used[False]["host"] == 170 * 2000
    enough, host = used[False]["device"], 100 * GB

    def swaps(cut: Placement, device_bytes: int) -> bool | None:
        placed = _placed(model(), cut, hardware(), Budgets(device_bytes, host, 0), work)
        return None if placed is None else placed[1].swaps_hidden

    assert (swaps(cut, enough), swaps(cut, enough - 1)) == (False, True)
    assert swaps(cut, used[True]["device"] - 1) is None
    assert swaps(replace(cut, n_sub_batches=2, rows=80), 10 * MB) is None  # would save nothing
    assert swaps(replace(cut, attention="host"), 10 * MB) is None


def test_requests_longer_than_the_context_are_refused() -> None:
    with pytest.raises(UserError, match="pass the 1000 positions of ten"):
        choose(model(max_positions=1000), hardware(), Budgets.of(hardware()), WORK)


def test_what_binds_is_what_helps() -> None:
    machine = hardware(device_bytes=400 * MB, matmul=MatmulRates(((1, 1e15),)))
    budgets = Budgets.of(machine)
    found = choose(model(), machine, budgets, WORK)
    assert found.prediction.binds == "link down"
    helps = {h.what: h.times_faster for h in what_helps(model(), machine, budgets, WORK, found)}
    assert helps["twice the link"] == pytest.approx(2, rel=0.25)
    assert "twice the disk's rate" not in helps
    assert list(helps.values()) == sorted(helps.values(), reverse=True)


@pytest.mark.parametrize("shape", ["opt-6.7b", "opt-30b", "llama-3-70b"])
def test_real_shapes_are_planned_for_every_card(shape: str) -> None:
    sizes = read_sizes(shape, open_dummy(shape).config, torch.float16, torch.float16)
    work = Workload(512, 32, 64)
    for name in ("t4-flexgen", "a100-80g", "b200"):
        machine = PROFILES[name]
        found = choose(sizes, machine, Budgets.of(machine), work, SOME)
        rates = found.prediction
        assert 0 < rates.tokens_per_s <= rates.decode_tokens_per_s * 1.001
        # No faster than streaming what is not resident, once per step of all rows.
        placed = found.placement
        step_s = placed.n_streamed_layers * sizes.layer_bytes / machine.link_down_bytes_per_s
        assert rates.decode.step_s >= step_s
