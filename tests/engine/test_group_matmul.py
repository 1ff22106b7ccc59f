"""Matrix products with weights in groups, of every operation set, against their float32 copies."""

from __future__ import annotations

import pytest
import torch

from sl_serve.ops import Ops, TorchOps
from sl_serve.ops.native_ops import NativeOps
from sl_serve.weights.groups import GROUP_FORMATS
from sl_serve.weights.quantised import QuantisedRows, QuantisedWeight
from tests.engine.test_matmul import NATIVE, assert_close, each_target, random
from tests.weights.groups import NAMES, rows_of

pytestmark = pytest.mark.usefixtures("one_thread")

# Of few rows in registers, of few that are widened first, and of many; of one group, and of more
# than is widened at a time or fits a panel's depth; columns of less than a panel and of several.
SHAPES = [(1, 128, 8), (3, 1536, 50), (24, 384, 19), (25, 1536, 19), (70, 640, 130)]

each_name = pytest.mark.parametrize("name", NAMES)
# One size of each kind, where the size makes no difference.
each_kind = pytest.mark.parametrize("name", [n for n in NAMES if "_g64" in n])
each_shape = pytest.mark.parametrize("shape", SHAPES, ids=str)


@pytest.fixture(params=["torch", *NATIVE])
def ops(request: pytest.FixtureRequest) -> Ops:
    return TorchOps() if request.param == "torch" else NativeOps(1, request.param)


@each_name
@each_shape
def test_linear_and_add_linear(ops: Ops, name: str, shape: tuple[int, int, int]) -> None:
    m, k, n = shape
    h, x, rows, bias = random(m, k), random(m, n), rows_of(name, n, k), random(n)
    product = h.double() @ rows.widened().double().t()
    assert_close(ops.linear("a", h, rows.t(), bias), product + bias.double())
    expected = x.double() + product
    ops.add_linear_(x, h, rows.t(), None)
    assert_close(x, expected)


@pytest.mark.parametrize("m", [2, 40])
def test_joined_sources_in_several_formats(ops: Ops, m: int) -> None:
    names = ["int4_g64", "fp8_g32", "int8_g128_sym"]
    parts = tuple(rows_of(name, 20 + i, 256) for i, name in enumerate(names))
    x, whole = random(m, 256), torch.cat([p.widened() for p in parts]).double()
    assert_close(ops.linear("a", x, QuantisedWeight(parts), None), x.double() @ whole.t())


# The native core alone.


@each_target
@each_name
@pytest.mark.parametrize("n_at_once", [4, 16, 256])
def test_every_number_is_that_of_the_format(target: str, name: str, n_at_once: int) -> None:
    """A unit vector picks one number of each row, exactly."""
    rows, ops = rows_of(name, 50, 256), NativeOps(1, target)
    unit_vectors = torch.eye(256)
    for start in range(0, 256, n_at_once):
        out = torch.empty(n_at_once, 50)
        ops.logits(unit_vectors[start : start + n_at_once], rows, out)
        assert torch.equal(out, rows.widened()[:, start : start + n_at_once].t())


@each_target
@pytest.mark.parametrize("m", [1, 16, 40])
def test_every_eight_bit_float(target: str, m: int) -> None:
    """No number in a row of its own, or it would be in every sum."""
    numbers = torch.zeros(256, 32, dtype=torch.uint8)
    numbers[:, 7] = torch.arange(256, dtype=torch.uint8)
    heads = torch.full((256, 1), 1 / 3).view(torch.uint8)
    rows = QuantisedRows(torch.cat([heads, numbers], 1), GROUP_FORMATS["fp8_g32"].format)
    out = torch.empty(m, 256)
    NativeOps(1, target).logits(torch.eye(32)[7].expand(m, 32).contiguous(), rows, out)
    expected = numbers[:, 7].view(torch.float8_e4m3fn).float() * torch.tensor(1 / 3)
    torch.testing.assert_close(out[m - 1], expected, rtol=0, atol=0, equal_nan=True)


@each_target
@each_kind
@pytest.mark.parametrize("special", [float("inf"), 1e30, 2.0**-140, -0.5, 0.0])
@pytest.mark.parametrize("m", [3, 40])
def test_special_scales_give_what_the_float32_copy_gives(
    target: str, name: str, special: float, m: int
) -> None:
    rows, ops, x = rows_of(name, 9, 256), NativeOps(1, target), random(m, 256)
    blocks = rows.data.view(-1, rows.format.block_bytes)
    scale = torch.tensor([special]).view(torch.uint8)
    start = 1 if GROUP_FORMATS[name].has_zeros else 0  # the zero stays
    blocks[::3, start:4] = scale[start:]
    expected = ops.linear("float32", x, rows.widened().t(), None)
    found = ops.linear("groups", x, rows.t(), None)
    torch.testing.assert_close(found, expected, rtol=0, atol=0, equal_nan=True)


@each_target
@each_kind
@pytest.mark.parametrize("m", [5, 70])
def test_the_result_does_not_depend_on_the_number_of_threads(
    target: str, name: str, m: int
) -> None:
    x, w = random(m, 256), rows_of(name, 130, 256).t()
    results = [NativeOps(n, target).linear("a", x, w, None) for n in (1, 2, 3)]
    assert all(torch.equal(results[0], r) for r in results)
