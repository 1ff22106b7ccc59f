"""Products with activations in 8 bits: the native core against the twin's numbers in float64."""

from __future__ import annotations

import pytest
import torch

from sl_serve.config import EngineConfig
from sl_serve.device import SimDevice
from sl_serve.errors import UserError
from sl_serve.ops import Ops, TorchOps, choose_ops
from sl_serve.ops.native_ops import NativeOps
from sl_serve.ops.rounded import PART, rounded
from sl_serve.weights.formats import BLOCK_FORMATS
from sl_serve.weights.groups import GROUP_FORMATS
from sl_serve.weights.quantised import QuantisedRows
from tests.engine.test_block_matmul import rows_of as rows_of_blocks
from tests.engine.test_group_matmul import rows_of as rows_of_groups
from tests.engine.test_matmul import NATIVE, assert_close, each_target, random
from tests.weights.blocks import Kind

pytestmark = pytest.mark.usefixtures("one_thread")

FORMATS = {**BLOCK_FORMATS, **{name: g.format for name, g in GROUP_FORMATS.items()}}
NARROW = [name for name, f in FORMATS.items() if f.is_narrow]
WIDE = [name for name, f in FORMATS.items() if not f.is_narrow]

# Rows of a tile and more; columns of less than a panel, of several, the last one not full; depths
# of a block and more than a panel's.
SHAPES = [(1, 256, 8), (2, 512, 16), (3, 1536, 50), (4, 768, 48), (70, 512, 130)]


def rows_of(name: str, n_out: int, n_in: int) -> QuantisedRows:
    if name in BLOCK_FORMATS:
        return rows_of_blocks(Kind[name.upper()], n_out, n_in)
    return rows_of_groups(name, n_out, n_in)


@pytest.fixture(params=["torch", *NATIVE])
def ops(request: pytest.FixtureRequest) -> Ops:
    if request.param == "torch":
        return TorchOps(rounds=True)
    return NativeOps(1, request.param, rounds=True)


def of_8_bits(x: torch.Tensor) -> torch.Tensor:
    """x in parts of 32, each number the nearest multiple of a 127th of the part's largest."""
    parts = x.view(len(x), -1, PART)
    step = parts.abs().amax(-1, keepdim=True).double() / 127
    return (torch.round(parts.double() / step) * step).view(x.shape)


def test_rounding_is_to_the_nearest_multiple_of_a_parts_step() -> None:
    x = random(5, 96)
    torch.testing.assert_close(rounded(x).double(), of_8_bits(x), rtol=1e-6, atol=0)
    assert (rounded(torch.zeros(2, 32)) == 0).all()


@pytest.mark.parametrize("name", NARROW)
@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_linear_and_add_linear(ops: Ops, name: str, shape: tuple[int, int, int]) -> None:
    m, k, n = shape
    x, rows, bias, y = random(m, k), rows_of(name, n, k), random(n), random(m, n)
    product = rounded(x).double() @ rows.widened().double().t()
    assert_close(ops.linear("a", x, rows.t(), bias), product + bias.double())
    expected = y.double() + product
    ops.add_linear_(y, x, rows.t(), None)
    assert_close(y, expected)


@pytest.mark.parametrize("name", NARROW)
def test_numbers_of_any_size(ops: Ops, name: str) -> None:
    """The largest codes and the largest rounded numbers: sums stay within their bits."""
    rows = rows_of(name, 40, 256)
    x = torch.full((4, 256), -3.0)
    x[1:] *= torch.tensor([-1.0, 1e-30, 1e30])[:, None]
    for signs in (torch.ones(256), (-1.0) ** torch.arange(256)):
        signed = x * signs
        expected = rounded(signed).double() @ rows.widened().double().t()
        found = ops.linear("a", signed, rows.t(), None).double()
        scale = expected.abs().amax(1, keepdim=True)
        torch.testing.assert_close(found / scale, expected / scale, rtol=0, atol=1e-5)


@pytest.mark.parametrize("name", WIDE)
def test_weights_of_8_bits_are_multiplied_as_ever(ops: Ops, name: str) -> None:
    x, rows = random(3, 256), rows_of(name, 40, 256)
    assert_close(ops.linear("a", x, rows.t(), None), x.double() @ rows.widened().double().t())


@pytest.mark.parametrize("name", NARROW)
def test_writes_its_own_columns_alone(ops: Ops, name: str) -> None:
    buffer = torch.full((5, 45), 7.0)
    ops.logits(random(3, 256), rows_of(name, 40, 256), buffer[:3, :40])
    assert (buffer[3:] == 7.0).all() and (buffer[:, 40:] == 7.0).all()
    assert (buffer[:3, :40] != 7.0).all()


@each_target
@pytest.mark.parametrize("name", ["q4_1", "q6_k", "int4_g64_min"])
def test_a_row_has_the_bits_it_has_in_any_company(target: str, name: str) -> None:
    x, w = random(60, 512), rows_of(name, 130, 512).t()
    among_many = NativeOps(1, target, rounds=True).linear("x", x, w, None)
    for n_threads in (1, 2, 3):
        ops = NativeOps(n_threads, target, rounds=True)
        assert torch.equal(ops.linear("x", x[:3], w, None), among_many[:3])
        ops.same_order = True  # else one or two rows are summed in another
        for m in (1, 2, 3, 4, 25):
            assert torch.equal(ops.linear("x", x[:m], w, None), among_many[:m])


def test_only_the_processor_rounds() -> None:
    rounding = choose_ops("float32", 1, activations="int8")
    assert isinstance(rounding, TorchOps) and rounding.rounds
    for refused in (
        lambda: choose_ops("bfloat16", 1, activations="int8"),
        lambda: choose_ops("float32", 1, device=SimDevice(), activations="int8"),
    ):
        with pytest.raises(UserError, match="--activations int8 is for the processor"):
            refused()
    assert EngineConfig().activations == "float32"
