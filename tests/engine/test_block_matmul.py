"""Matrix products with weights in blocks, of every operation set, against their float32 copies."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from sl_serve.ops import Ops, TorchOps
from sl_serve.ops.native_ops import NativeOps
from sl_serve.weights.formats import BLOCK_FORMATS, plain
from sl_serve.weights.quantised import QuantisedRows, QuantisedWeight
from tests.engine.test_matmul import NATIVE, assert_close, each_target, random
from tests.weights.blocks import HALVES, KINDS, Kind, put_halves, random_rows

pytestmark = pytest.mark.usefixtures("one_thread")

# Of a few rows, and just more than a few; of a block, more than is widened at a time, and more than
# a panel's depth; columns of less than a panel and of several, the last one not full.
SHAPES = [(1, 256, 8), (3, 1536, 50), (24, 512, 19), (25, 1536, 19), (70, 512, 130)]

each_kind = pytest.mark.parametrize("kind", KINDS, ids=lambda kind: kind.name)
each_shape = pytest.mark.parametrize("shape", SHAPES, ids=str)


@pytest.fixture(params=["torch", *NATIVE])
def ops(request: pytest.FixtureRequest) -> Ops:
    return TorchOps() if request.param == "torch" else NativeOps(1, request.param)


def rows_of(kind: Kind, n_out: int, n_in: int) -> QuantisedRows:
    """As they lie in a layer's image: in the middle of other bytes."""
    rows = torch.from_numpy(random_rows(kind, n_out, n_in))
    image = torch.full((rows.numel() + 512,), 0xFF, dtype=torch.uint8)
    place = image[256 : 256 + rows.numel()].view(rows.shape)
    return QuantisedRows(place.copy_(rows), BLOCK_FORMATS[kind.name.lower()])


@each_kind
@each_shape
def test_linear(ops: Ops, kind: Kind, shape: tuple[int, int, int]) -> None:
    m, k, n = shape
    x, rows, bias = random(m, k), rows_of(kind, n, k), random(n)
    expected = x.double() @ rows.widened().double().t()
    assert_close(ops.linear("a", x, rows.t(), None), expected)
    assert_close(ops.linear("a", x, rows.t(), bias), expected + bias.double())


@each_kind
@each_shape
def test_add_linear_and_logits(ops: Ops, kind: Kind, shape: tuple[int, int, int]) -> None:
    m, k, n = shape
    x, h, rows = random(m, n), random(m, k), rows_of(kind, n, k)
    product = h.double() @ rows.widened().double().t()
    expected = x.double() + product
    ops.add_linear_(x, h, rows.t(), None)
    assert_close(x, expected)
    buffer = torch.full((m + 2, n + 3), 7.0)
    ops.logits(h, rows, buffer[:m, :n])
    assert_close(buffer[:m, :n], product)
    assert (buffer[m:] == 7.0).all() and (buffer[:, n:] == 7.0).all()


@pytest.mark.parametrize("m", [2, 40])
def test_joined_sources_in_several_formats(ops: Ops, m: int) -> None:
    halves = random(7, 512).half()
    parts = (
        rows_of(Kind.Q4_K, 50, 512),
        QuantisedRows(halves.view(torch.uint8), plain(torch.float16)),
        rows_of(Kind.Q6_K, 33, 512),
    )
    x, bias = random(m, 512), random(90)
    whole = torch.cat([p.widened() for p in parts]).double()
    expected = x.double() @ whole.t() + bias.double()
    assert_close(ops.linear("a", x, QuantisedWeight(parts), bias), expected)


def test_more_outputs_than_are_widened_at_a_time(ops: Ops) -> None:
    x, rows = random(2, 64), rows_of(Kind.Q8_0, 2050, 64)
    expected = x.double() @ rows.widened().double().t()
    assert_close(ops.linear("a", x, rows.t(), None), expected)


# The native core alone.


@each_target
@each_kind
@pytest.mark.parametrize("n_at_once", [16, 256])
def test_every_number_is_that_of_the_gguf_package(target: str, kind: Kind, n_at_once: int) -> None:
    """A unit vector picks one number of each row, exactly: few vectors at once, and many."""
    rows, ops = rows_of(kind, 300, 512), NativeOps(1, target)
    unit_vectors = torch.eye(512)
    for start in range(0, 512, n_at_once):
        out = torch.empty(n_at_once, 300)
        ops.logits(unit_vectors[start : start + n_at_once], rows, out)
        assert torch.equal(out, rows.widened()[:, start : start + n_at_once].t())


@each_target
@each_kind
@pytest.mark.parametrize("special", [np.inf, 65504.0, 2.0**-24])
@pytest.mark.parametrize("m", [3, 40])
def test_special_scales_give_what_the_float32_copy_gives(
    target: str, kind: Kind, special: float, m: int
) -> None:
    rows, ops, x = rows_of(kind, 9, 512), NativeOps(1, target), random(m, 512)
    blocks = rows.data.numpy().reshape(-1, rows.format.block_bytes)
    if kind == Kind.MXFP4:  # as extreme powers of two
        blocks[::3, 0] = {np.inf: 255, 65504.0: 252, 2.0**-24: 0}[special]
    for start in HALVES[kind]:
        put_halves(blocks[::3], start, np.full(len(blocks[::3]), special))
    expected = ops.linear("float32", x, rows.widened().t(), None)
    found = ops.linear("blocks", x, rows.t(), None)
    torch.testing.assert_close(found, expected, rtol=0, atol=0, equal_nan=True)


@each_target
@each_kind
@pytest.mark.parametrize("m", [5, 70])
def test_the_result_does_not_depend_on_the_number_of_threads(
    target: str, kind: Kind, m: int
) -> None:
    x, w = random(m, 512), rows_of(kind, 130, 512).t()
    results = [NativeOps(n, target).linear("a", x, w, None) for n in (1, 2, 3)]
    assert all(torch.equal(results[0], r) for r in results)
