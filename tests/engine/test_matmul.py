"""Matrix products of every operation set against float64."""

from __future__ import annotations

import pytest
import torch

from sl_serve.ops import Ops, TorchOps
from sl_serve.ops.native_ops import NativeOps

pytestmark = pytest.mark.usefixtures("one_thread")

try:
    from sl_serve._native import targets
except ImportError:  # no compiler: the pure-torch twins are all there is
    targets = list

NATIVE = targets()
DTYPES = [torch.float32, torch.bfloat16, torch.float16]  # of weights
# One row; few rows, a last one or two columns and a last part of a register; just fewer and more
# than the few; more than a block of rows; less and more than a block of the depth; columns of less
# than a panel, of a last one that is not full, and of more than a converted part.
SHAPES = [
    (1, 40, 64),
    (2, 8, 8),
    (3, 1, 5),
    (5, 33, 50),
    (24, 321, 49),
    (25, 7, 1),
    (64, 576, 100),
    (259, 650, 51),
    (2, 3, 2050),
]

each_shape = pytest.mark.parametrize("shape", SHAPES, ids=str)
each_dtype = pytest.mark.parametrize("dtype", DTYPES, ids=str)
each_target = pytest.mark.parametrize("target", NATIVE)
either_bias = pytest.mark.parametrize("biased", [False, True])


@pytest.fixture(params=["torch", *NATIVE])
def ops(request: pytest.FixtureRequest) -> Ops:
    return TorchOps() if request.param == "torch" else NativeOps(1, request.param)


def random(*shape: int, dtype: torch.dtype = torch.float32) -> torch.Tensor:
    generator = torch.Generator().manual_seed(sum(shape))
    return torch.randn(*shape, generator=generator).to(dtype)


def stored(weight: torch.Tensor) -> torch.Tensor:
    """`weight` (out, in) as it lies in a layer's image, seen as (in, out): in the middle of bytes
    that read as NaN."""
    image = torch.full((weight.nbytes + 1024,), 0xFF, dtype=torch.uint8)
    place = image[256 : 256 + weight.nbytes].view(weight.dtype).view(weight.shape)
    return place.copy_(weight).t()


def assert_close(actual: torch.Tensor, expected: torch.Tensor) -> None:
    worst = (actual.double() - expected).abs().max() / expected.abs().max()
    assert float(worst) < 2e-6


@each_shape
@each_dtype
@either_bias
def test_linear(ops: Ops, shape: tuple[int, int, int], dtype: torch.dtype, biased: bool) -> None:
    m, k, n = shape
    x, w = random(m, k), random(n, k, dtype=dtype)
    bias = random(n, dtype=dtype) if biased else None
    expected = x.double() @ w.double().t() + (0 if bias is None else bias.double())
    assert_close(ops.linear("a", x, stored(w), bias), expected)


@each_shape
@each_dtype
@either_bias
def test_add_linear(
    ops: Ops, shape: tuple[int, int, int], dtype: torch.dtype, biased: bool
) -> None:
    m, k, n = shape
    x, h, w = random(m, n), random(m, k), random(n, k, dtype=dtype)
    bias = random(n, dtype=dtype) if biased else None
    expected = x.double() + h.double() @ w.double().t() + (0 if bias is None else bias.double())
    ops.add_linear_(x, h, stored(w), bias)
    assert_close(x, expected)


@each_shape
@each_dtype
def test_logits_fill_a_part_of_a_larger_buffer(
    ops: Ops, shape: tuple[int, int, int], dtype: torch.dtype
) -> None:
    m, k, n = shape
    x, head, buffer = random(m, k), random(n, k, dtype=dtype), torch.full((m + 2, n + 3), 7.0)
    ops.logits(x, stored(head).t(), buffer[:m, :n])
    assert_close(buffer[:m, :n], x.double() @ head.double().t())
    assert (buffer[m:] == 7.0).all() and (buffer[:, n:] == 7.0).all()


@each_dtype
def test_every_number_of_rows_up_to_a_few_tiles(ops: Ops, dtype: torch.dtype) -> None:
    w = random(19, 45, dtype=dtype)
    for m in range(1, 40):
        x = random(m, 45)
        assert_close(ops.linear("a", x, stored(w), None), x.double() @ w.double().t())


@pytest.mark.parametrize("m", [3, 30])
@each_dtype
def test_weights_with_inputs_first(ops: Ops, m: int, dtype: torch.dtype) -> None:
    x, w, h = random(m, 33), random(33, 50, dtype=dtype), random(m, 50)
    expected = x.double() @ w.double()
    assert_close(ops.linear("a", x, w, None), expected)
    expected += h.double()
    ops.add_linear_(h, x, w, None)
    assert_close(h, expected)


@pytest.mark.parametrize("m", [9, 30])
def test_rows_of_a_wider_tensor(ops: Ops, m: int) -> None:
    """Inputs and weights that are views with a line stride of their own."""
    wide_x, wide_w = random(m, 100), random(90, 77)
    expected = wide_x[:, :60].double() @ wide_w[10:60, :60].double().t()
    assert_close(ops.linear("a", wide_x[:, :60], wide_w[10:60, :60].t(), None), expected)


@pytest.mark.parametrize("m", [1, 30])
@pytest.mark.parametrize("dtype", DTYPES[1:], ids=str)
def test_every_number_of_two_bytes_is_read_exactly(ops: Ops, m: int, dtype: torch.dtype) -> None:
    numbers = torch.arange(2**16, dtype=torch.int32).to(torch.int16).view(dtype)
    out = torch.empty(m, 2**16)
    ops.logits(torch.ones(m, 1), numbers[:, None], out)
    expected = numbers.float().expand(m, -1)
    torch.testing.assert_close(out, expected, rtol=0, atol=0, equal_nan=True)


# The native core alone.


@each_target
@each_shape
@pytest.mark.parametrize("dtype", DTYPES[1:], ids=str)
def test_a_stored_weight_gives_what_its_float32_copy_gives(
    target: str, shape: tuple[int, int, int], dtype: torch.dtype
) -> None:
    m, k, n = shape
    ops, x, w = NativeOps(1, target), random(m, k), random(n, k, dtype=dtype)
    expected = ops.linear("float32", x, stored(w.float()), None)
    assert torch.equal(ops.linear("stored", x, stored(w), None), expected)


@each_target
@pytest.mark.parametrize("m", [3, 70])
@each_dtype
def test_the_result_does_not_depend_on_the_number_of_threads(
    target: str, m: int, dtype: torch.dtype
) -> None:
    x, w = random(m, 350), stored(random(130, 350, dtype=dtype))
    results = [NativeOps(n, target).linear("a", x, w, None) for n in (1, 2, 3)]
    assert all(torch.equal(results[0], r) for r in results)


@pytest.mark.parametrize("target", NATIVE[:1])
def test_the_native_core_refuses_weights_of_another_shape_or_kind(target: str) -> None:
    ops, x = NativeOps(1, target), random(3, 8)
    with pytest.raises(AssertionError):
        ops.linear("a", x, random(5, 9).t(), None)
    with pytest.raises(KeyError):
        ops.linear("a", x, random(5, 8).double().t(), None)
