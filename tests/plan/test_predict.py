from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from sl_serve.config import EngineConfig, SchedulerConfig
from sl_serve.plan.hardware import AttentionRates, Hardware, MatmulRates
from sl_serve.plan.placement import Placement, Workload, placement_of
from sl_serve.plan.predict import predict
from sl_serve.stored_model import plan_checkpoint
from sl_serve.weights.dummy import open_dummy
from tests.plan.examples import MB, WORKLOADS, hardware, machines, model, placement, processor

FOUR = Workload(prompt_tokens=1000, output_tokens=100, n_requests=4)
# Halfway through their output, 4 new tokens attend to 1,051 each: 4 * 1,000 FLOPs in ten layers.
ATTENTION_S = 4 * 1051 * 4 * 1000 * 10 / 1e11
COMPUTE_S = 0.4 + ATTENTION_S  # 4 rows * 1 GFLOP * 10 layers / 100 GFLOP/s


def test_a_gigabyte_of_layers_takes_a_second_over_a_link_of_one() -> None:
    decode = predict(model(), placement(), hardware(), FOUR).decode
    assert decode.resource_s["link down"] == pytest.approx(1.0)
    assert decode.resource_s["compute"] == pytest.approx(COMPUTE_S)
    assert decode.binds == "link down"
    # host memory (1 GB at 1 TB/s) and compute of one of ten cells are not overlapped
    assert decode.step_s == pytest.approx(1.0 + (COMPUTE_S + 0.001) / 10)


def test_without_look_ahead_times_add_up() -> None:
    serial = placement(look_ahead=0)
    decode = predict(model(), serial, hardware(), FOUR).decode
    assert decode.step_s == pytest.approx(1.0 + COMPUTE_S + 0.001)


def test_kv_of_the_host_crosses_the_link() -> None:
    on_host = placement(kv_device_share=0.0)
    decode = predict(model(), on_host, hardware(), FOUR).decode
    # 4 rows of 1,050 tokens on average; the new ones go up while both directions are busy
    prefix, new = 4 * 1050 * 20_000, 4 * 20_000
    up_s = new / 0.5e9
    assert decode.resource_s["link up"] == pytest.approx(up_s)
    assert decode.resource_s["link down"] == pytest.approx(up_s + (1e9 + prefix - new) / 1e9)


def test_hidden_states_that_are_swapped_cross_once_per_layer_each_way() -> None:
    swapped = placement(n_sub_batches=2, rows=2, swaps_hidden=True)
    decode = predict(model(), swapped, hardware(), FOUR).decode
    crossing = 4 * 10 * 1000 * 2  # tokens, layers, elements, bytes
    up_s = crossing / 0.5e9
    assert decode.resource_s["link up"] == pytest.approx(up_s)
    assert decode.resource_s["link down"] == pytest.approx(up_s + 1.0)


def test_attention_by_the_processor_sends_queries_instead() -> None:
    on_host = placement(kv_device_share=0.0, attention="host", n_sub_batches=2, rows=2)
    slow = hardware(host_read_bytes_per_s=10e9)
    decode = predict(model(), on_host, slow, FOUR).decode
    queries = 4 * 10 * 1000 * 2  # tokens, layers, elements, bytes
    up = queries + 4 * 20_000
    assert decode.resource_s["link up"] == pytest.approx(up / 0.5e9)
    assert decode.resource_s["link down"] == pytest.approx(up / 0.5e9 + (1e9 + queries - up) / 1e9)
    crossing, attended = 1e9 + queries + up, 4 * 1050 * 20_000
    assert decode.resource_s["host memory"] == pytest.approx((crossing + attended) / 10e9)
    rates = AttentionRates(prefix_bytes_per_s=1e9, flops_per_s=4 * 1051 * 40_000 / 0.25)
    decode = predict(model(), on_host, replace(slow, host_attention=rates), FOUR).decode
    busy_s = crossing / 10e9 + attended / 1e9 + 0.25
    assert decode.resource_s["host memory"] == pytest.approx(busy_s)


def test_one_sub_batch_waits_for_the_processor() -> None:
    resident = placement(n_device_layers=10, n_host_layers=0, kv_device_share=0.0, attention="host")
    slow = hardware(host_read_bytes_per_s=0.21e9)  # 84 MB of prefixes: 0.4 s, as compute
    alone = predict(model(), resident, slow, FOUR).decode.step_s
    halves = replace(resident, rows=2, n_sub_batches=2)
    together = predict(model(), halves, slow, FOUR).decode.step_s
    assert alone == pytest.approx(0.8, rel=0.06)
    assert together == pytest.approx(0.4, rel=0.06)


def test_resident_layers_do_not_cross() -> None:
    half = placement(n_device_layers=5, n_host_layers=5)
    decode = predict(model(), half, hardware(), FOUR).decode
    assert decode.resource_s["link down"] == pytest.approx(0.5)


def test_layers_on_disk_are_read_every_step() -> None:
    on_disk = placement(n_host_layers=7, n_disk_layers=3)
    decode = predict(model(), on_disk, hardware(), FOUR).decode
    assert decode.resource_s["disk"] == pytest.approx(0.3e9 / 0.25e9)
    assert decode.binds == "disk"


def test_the_processor_reads_weights_and_kv_in_place() -> None:
    slow = processor(matmul=MatmulRates(((1, 1e15),)))
    decode = predict(model(), placement(), slow, FOUR).decode
    # 1 GB of weights, then 84 MB of KV, at 10 GB/s
    assert decode.resource_s["compute"] == pytest.approx(0.1 + 0.0084, rel=1e-5)
    assert decode.resource_s["link down"] == 0


def test_the_head_and_fixed_costs_count() -> None:
    with_head = model(head_flops_per_token=5e9, head_bytes=100 * MB)
    costly = hardware(cell_overhead_s=0.001)
    found = predict(with_head, placement(n_sub_batches=2, rows=2), costly, FOUR)
    # two sub-batches of two rows take as long as one of four; 20 cells; 4 rows of 5 GFLOP
    assert found.decode.resource_s["compute"] == pytest.approx(COMPUTE_S + 0.02 + 0.2)


def test_attention_reads_prefixes_and_meets_contexts() -> None:
    slow = processor(attention=AttentionRates(1e9, 1e12), matmul=MatmulRates(((1, 1e15),)))
    found = predict(model(), placement(), slow, FOUR).decode
    # 4 rows of 1,050 tokens cached: 20 kB each, and 40 kFLOP with one token more
    reading, meeting = 4 * 1050 * 20_000 / 1e9, 4 * 1051 * 40_000 / 1e12
    assert found.resource_s["compute"] == pytest.approx(0.1 + reading + meeting)


def test_what_is_done_element_by_element_grows_with_tokens() -> None:
    slow = processor(elementwise_bytes_per_s=1e9)
    found = predict(model(), placement(), slow, FOUR)
    # 10 layers, 10,000 bytes of activations and 2,000 of new K and V; a prefill step has 100 tokens
    fast = predict(model(), placement(), replace(slow, elementwise_bytes_per_s=1e18), FOUR)
    for step, fast_step, n in ((found.decode, fast.decode, 4), (found.prefill, fast.prefill, 100)):
        more = step.resource_s["compute"] - fast_step.resource_s["compute"]
        assert more == pytest.approx(n * 10 * 12_000 / 1e9)


def test_a_head_on_disk_is_read_every_step() -> None:
    on_disk = placement(n_host_layers=7, n_disk_layers=3, head_on_disk=True)
    decode = predict(model(head_bytes=200 * MB), on_disk, hardware(), FOUR).decode
    assert decode.resource_s["disk"] == pytest.approx(0.5e9 / 0.25e9)


@pytest.mark.parametrize(("host_memory", "n_requests"), [(None, 3), (10_000_000_000, 200)])
def test_the_engines_own_plan_is_predicted(host_memory: int | None, n_requests: int) -> None:
    config = EngineConfig(
        host_memory_bytes=host_memory,
        kv_memory_bytes=64 * MB,
        max_model_len=100,
        scheduler=SchedulerConfig(max_rows=32, n_sub_batches=3, prefill_chunk_tokens=70),
    )
    plan = plan_checkpoint(open_dummy("opt-125m"), config)
    placed = placement_of(plan, Workload(60, 40, n_requests))
    assert placed.n_host_layers + placed.n_disk_layers == 12
    assert (placed.prefill_tokens, placed.look_ahead) == (70, plan.look_ahead)
    # 64 MB hold 868 tokens of 73,728 bytes: eight requests of 100
    assert (placed.rows, placed.n_sub_batches) == (3, 3)


def test_the_whole_workload_by_hand() -> None:
    # One row, prompts of 10 in steps of 10, 2 outputs, 3 requests: six steps, prefill and decode
    # in turns, all bound by the link; nothing else takes time.
    free = hardware(matmul=MatmulRates(((1, 1e30),)), host_read_bytes_per_s=1e30)
    work = Workload(prompt_tokens=10, output_tokens=2, n_requests=3)
    found = predict(model(), placement(rows=1, prefill_tokens=10), free, work)
    assert found.wall_s == pytest.approx(6.0)
    assert found.tokens_per_s == pytest.approx(1.0)
    assert found.binds == "link down"
    assert found.prefill_tokens_per_s == pytest.approx(10.0)
    assert found.decode_tokens_per_s == pytest.approx(1.0)


PLACEMENTS = st.builds(
    lambda cuts, **others: Placement(
        min(cuts), max(cuts) - min(cuts), 10 - max(cuts), prefill_tokens=64, **others
    ),
    st.tuples(st.integers(0, 10), st.integers(0, 10)),
    rows=st.integers(1, 8),
    n_sub_batches=st.integers(1, 4),
    look_ahead=st.integers(0, 2),
    kv_device_share=st.sampled_from([0.0, 0.3, 1.0]),
    attention=st.sampled_from(["device", "host"]),
)


def on(machine: Hardware, where: Placement) -> Placement:
    """Without a device, what is meant for it lies in host memory."""
    if machine.has_device:
        return where
    return replace(
        where, n_device_layers=0, n_host_layers=where.n_device_layers + where.n_host_layers
    )


@settings(max_examples=150, deadline=None, derandomize=True)
@given(machines(), PLACEMENTS, WORKLOADS, st.floats(1, 8), st.integers(0, 8))
def test_faster_parts_never_make_it_slower(
    machine: Hardware, where: Placement, work: Workload, factor: float, which: int
) -> None:
    down, up = machine.link_down_bytes_per_s * factor, machine.link_up_bytes_per_s * factor
    changes = [
        {"link_down_bytes_per_s": down, "link_up_bytes_per_s": up},
        {
            "link_down_both_bytes_per_s": min(
                machine.link_down_bytes_per_s, machine.link_down_both_bytes_per_s * factor
            )
        },
        {"host_read_bytes_per_s": machine.host_read_bytes_per_s * factor},
        {"disk_read_bytes_per_s": machine.disk_read_bytes_per_s * factor},
        {"device_read_bytes_per_s": machine.device_read_bytes_per_s * factor},
        {"matmul": machine.matmul.faster(factor)},
        {"head": machine.head.faster(factor)},
        {"attention": AttentionRates(*(rate * factor for rate in machine.attention))},
        {"elementwise_bytes_per_s": machine.elementwise_bytes_per_s * factor},
    ]
    where = on(machine, where)
    before = predict(model(), where, machine, work).wall_s
    after = predict(model(), where, replace(machine, **changes[which]), work).wall_s
    assert after <= before * (1 + 1e-9)


@settings(max_examples=100, deadline=None, derandomize=True)
@given(machines(), PLACEMENTS, WORKLOADS)
def test_a_step_is_between_its_longest_part_and_their_sum(
    machine: Hardware, where: Placement, work: Workload
) -> None:
    where = on(machine, where)
    found = predict(model(), where, machine, work)
    for step in (found.decode, found.prefill):
        parts = list(step.resource_s.values())
        assert max(parts) <= step.step_s * (1 + 1e-9)
        assert step.step_s <= sum(parts) * (1 + 1e-9)
        assert np.isfinite(step.step_s)
