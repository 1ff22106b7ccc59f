from __future__ import annotations

from itertools import product

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from sl_serve.kv.formats import KV_FORMATS
from sl_serve.kv.layout import KVOrder, KVSpec

FEW = settings(derandomize=True, max_examples=60, deadline=None)
FLOAT32 = KV_FORMATS["float32"]
ORDERS: tuple[KVOrder, ...] = ("position", "row")


@st.composite
def reshaped(draw: st.DrawFn, orders: tuple[KVOrder, ...] = ORDERS) -> tuple[KVSpec, int]:
    """A small spec and the width of a slab that reads its chunks."""
    chunk_log, width_log = sorted(draw(st.tuples(st.integers(0, 4), st.integers(0, 4))))[::-1]
    spec = KVSpec(
        n_layers=draw(st.integers(1, 3)),
        n_kv_heads=draw(st.integers(1, 3)),
        head_dim=draw(st.integers(1, 4)),
        format=draw(st.sampled_from([*KV_FORMATS.values()])),
        chunk_tokens=1 << chunk_log,
        order=draw(st.sampled_from(orders)),
        n_kinds=draw(st.integers(1, 2)),
    )
    return spec, 1 << width_log


def byte_addresses(spec: KVSpec, width: int, positions: range) -> list[int]:
    """Every byte of K and V of all rows at `positions`, in one layer's region of a chunk."""
    strides = spec.strides(width)
    heads = product(positions, range(width), range(spec.n_kinds), range(spec.n_kv_heads))
    starts = [
        p * strides.position + row * strides.row + kv * strides.kv + head * strides.head
        for p, row, kv, head in heads
    ]
    return [start + byte for start in starts for byte in range(spec.line_bytes)]


@FEW
@given(reshaped())
def test_strides_give_each_byte_of_the_layer_region_to_one_element(
    case: tuple[KVSpec, int],
) -> None:
    spec, width = case
    found = byte_addresses(spec, width, range(spec.positions(width)))
    assert sorted(found) == list(range(spec.chunk_layer_bytes))


AXES = {
    "position": ("position", "kv", "row", "head", "byte"),
    "row": ("row", "kv", "head", "position", "byte"),
}


@FEW
@given(reshaped())
def test_axes_nest_in_the_order_of_the_name(case: tuple[KVSpec, int]) -> None:
    spec, width = case
    sizes = {"position": spec.positions(width), "kv": 2, "row": width, "head": spec.n_kv_heads}
    sizes["byte"] = spec.line_bytes
    strides = {**spec.strides(width)._asdict(), "byte": 1}
    axes = [axis for axis in AXES[spec.order] if axis != "kv" or spec.n_kinds == 2]
    assert spec.n_kinds == 2 or strides["kv"] == 0
    nested = np.empty([sizes[axis] for axis in axes], dtype=np.uint8)
    assert tuple(strides[axis] for axis in axes) == nested.strides


@FEW
@given(reshaped(orders=("position",)), st.integers(0, 16))
def test_live_bytes_of_position_order_are_exactly_the_first_positions(
    case: tuple[KVSpec, int], n_tokens: int
) -> None:
    spec, width = case
    n_tokens = min(n_tokens, spec.positions(width))
    found = byte_addresses(spec, width, range(n_tokens))
    assert sorted(found) == list(range(spec.live_bytes(width, n_tokens)))


@FEW
@given(reshaped(orders=("row",)), st.integers(0, 16))
def test_live_bytes_of_row_order_hold_the_first_positions(
    case: tuple[KVSpec, int], n_tokens: int
) -> None:
    spec, width = case
    n_tokens = min(n_tokens, spec.positions(width))
    found = byte_addresses(spec, width, range(n_tokens))
    assert max(found, default=-1) < spec.live_bytes(width, n_tokens) <= spec.chunk_layer_bytes
    assert (spec.live_bytes(width, n_tokens) == 0) == (n_tokens == 0)


@FEW
@given(reshaped(orders=("row",)))
def test_row_order_keeps_the_keys_of_a_head_in_one_run(case: tuple[KVSpec, int]) -> None:
    spec, width = case
    strides = spec.strides(width)
    assert strides.position == spec.line_bytes
    assert strides.head == spec.positions(width) * strides.position


@FEW
@given(reshaped())
def test_a_chunk_holds_as_many_bytes_as_its_tokens_need(case: tuple[KVSpec, int]) -> None:
    spec, width = case
    lines = spec.n_layers * spec.n_kinds * spec.n_kv_heads
    assert spec.token_bytes == lines * spec.format.line_bytes(spec.head_dim)
    assert spec.chunk_bytes == spec.positions(width) * width * spec.token_bytes


@FEW
@given(st.integers(0, 10), st.integers(1, 20_000), st.integers(0, 6))
def test_width_for_is_the_widest_slab_whose_rows_need_four_chunks_or_fewer(
    chunk_log: int, expected_tokens: int, max_width_log: int
) -> None:
    spec = KVSpec(1, 1, 1, FLOAT32, 1 << chunk_log, "position")
    widths = [1 << i for i in range(max_width_log + 1)]
    fitting = [w for w in widths if w * expected_tokens <= 4 * spec.chunk_tokens]
    assert spec.width_for(expected_tokens, widths[-1]) == max(fitting, default=1)


def test_chunks_that_are_no_power_of_two_are_refused() -> None:
    with pytest.raises(AssertionError, match="power of two"):
        KVSpec(1, 1, 1, FLOAT32, 48, "position")
