"""Matrix products of every operation set against float64."""

from __future__ import annotations

import pytest
import torch

from sl_serve._native import targets
from sl_serve.ops import Ops, TorchOps
from sl_serve.ops.native_ops import NativeOps

OPS = ["torch", *targets()]
# One row; less and more than a tile of rows and a block of them; one panel of columns, a last one
# that is not full; less and more than a block of the depth.
SHAPES = [(1, 40, 64), (2, 8, 8), (5, 33, 40), (13, 700, 96), (64, 576, 100), (259, 321, 50)]


@pytest.fixture(params=OPS)
def ops(request: pytest.FixtureRequest) -> Ops:
    return TorchOps() if request.param == "torch" else NativeOps(2, request.param)


def random(*shape: int) -> torch.Tensor:
    generator = torch.Generator().manual_seed(sum(shape))
    return torch.randn(*shape, generator=generator)


def assert_close(actual: torch.Tensor, expected: torch.Tensor) -> None:
    worst = (actual.double() - expected).abs().max() / expected.abs().max()
    assert float(worst) < 2e-6


@pytest.mark.parametrize("shape", SHAPES, ids=str)
@pytest.mark.parametrize("biased", [False, True])
def test_linear(ops: Ops, shape: tuple[int, int, int], biased: bool) -> None:
    m, k, n = shape
    x, w, bias = random(m, k), random(k, n), random(n) if biased else None
    expected = x.double() @ w.double() + (0 if bias is None else bias.double())
    assert_close(ops.linear("a", x, w, bias), expected)


@pytest.mark.parametrize("shape", SHAPES, ids=str)
@pytest.mark.parametrize("biased", [False, True])
def test_add_linear(ops: Ops, shape: tuple[int, int, int], biased: bool) -> None:
    m, k, n = shape
    x, h, w, bias = random(m, n), random(m, k), random(k, n), random(n) if biased else None
    expected = x.double() + h.double() @ w.double() + (0 if bias is None else bias.double())
    ops.add_linear_(x, h, w, bias)
    assert_close(x, expected)


@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_logits_fill_a_part_of_a_larger_buffer(ops: Ops, shape: tuple[int, int, int]) -> None:
    m, k, n = shape
    x, head, buffer = random(m, k), random(n, k), torch.full((m + 2, n), 7.0)
    ops.logits(x, head, buffer[:m])
    assert_close(buffer[:m], x.double() @ head.double().t())
    assert (buffer[m:] == 7.0).all()


def test_rows_of_a_wider_tensor(ops: Ops) -> None:
    """Inputs and weights that are views with a line stride of their own."""
    wide_x, wide_w = random(9, 100), random(60, 90)
    expected = wide_x[:, :60].double() @ wide_w[:, 10:60].double()
    assert_close(ops.linear("a", wide_x[:, :60], wide_w[:, 10:60], None), expected)


def test_the_result_does_not_depend_on_the_number_of_threads() -> None:
    x, w = random(70, 350), random(350, 130)
    results = [NativeOps(n).linear("a", x, w, None) for n in (1, 2, 3)]
    assert all(torch.equal(results[0], r) for r in results)
