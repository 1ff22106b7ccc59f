"""One matrix: against the paper's algorithm in float64, and against rounding alone."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from sl_serve.errors import UserError
from sl_serve.quantising.gptq import DAMPING, gptq
from sl_serve.quantising.scales import fit_groups
from sl_serve.weights.above_minimum import steps_above
from sl_serve.weights.groups import GROUP_FORMATS, Grouped

pytestmark = pytest.mark.usefixtures("one_thread")

GROUP, N_OUT = 32, 12


def example(n_in: int, n_tokens: int, seed: int = 0) -> tuple[torch.Tensor, torch.Tensor]:
    """A matrix (in, out), and the Hessian of inputs that differ in size and are correlated."""
    generator = torch.Generator().manual_seed(seed)
    mixed = torch.randn(n_in, n_in, generator=generator) / n_in**0.5 + torch.eye(n_in)
    sizes = torch.rand(n_in, generator=generator) * 3 + 0.1
    x = torch.randn(n_tokens, n_in, generator=generator) @ mixed * sizes
    return torch.randn(n_in, N_OUT, generator=generator), x.t() @ x / n_tokens


def dequantised(rows: Grouped) -> np.ndarray:
    """(in, out) float64."""
    blocks = GROUP_FORMATS["int4_g32_min"].pack(rows)
    return GROUP_FORMATS["int4_g32_min"].format.widen(blocks).t().double().numpy()


def output_error(w: torch.Tensor, found: np.ndarray, hessian: torch.Tensor) -> float:
    off = found - w.double().numpy()
    return float(np.einsum("io,ij,jo->", off, hessian.double().numpy(), off))


def rounded(w: torch.Tensor, input_weights: torch.Tensor) -> np.ndarray:
    scales, minima = fit_groups(w, input_weights, GROUP)
    scales, minima = (t.repeat_interleave(GROUP, dim=0) for t in (scales, minima))
    return (steps_above(w, scales, minima) * scales + minima).double().numpy()


def by_the_paper(w: torch.Tensor, hessian: torch.Tensor, rows: Grouped) -> np.ndarray:
    """Numbers (in, out), for the scales and minima of `rows`. One input at a time, each time with
    the inverse of what is left of the Hessian: arXiv 2210.17323, equations 2 and 3."""
    h = hessian.double().numpy().copy()
    h += DAMPING * np.diag(h).mean() * np.eye(len(h))
    left = w.double().numpy().copy()
    scales, minima = (t.double().numpy().T for t in (rows.scales, rows.minima))
    numbers = np.zeros(left.shape)
    remaining = list(np.argsort(-np.diag(h), kind="stable"))
    while remaining:
        inverse = np.linalg.inv(h[np.ix_(remaining, remaining)])
        i, group = remaining[0], remaining[0] // GROUP
        numbers[i] = np.clip(np.rint((left[i] - minima[group]) / scales[group]), 0, 15)
        error = left[i] - (numbers[i] * scales[group] + minima[group])
        left[remaining] -= np.outer(inverse[:, 0] / inverse[0, 0], error)
        remaining = remaining[1:]
    return numbers


@pytest.mark.parametrize("n_in", [64, 160])  # in one block of inputs, and in two
def test_numbers_are_those_of_the_papers_algorithm(n_in: int) -> None:
    w, hessian = example(n_in, 4 * n_in)
    rows = gptq(w.clone(), hessian.clone(), GROUP)
    expected = by_the_paper(w, hessian, rows)
    found = rows.numbers.t().double().numpy()
    # float32 decides some near-ties otherwise, and what follows in that output may differ then
    outputs_alike = (found == expected).all(axis=0)
    assert outputs_alike.mean() > 0.7
    scales, minima = (
        t.double().numpy().T.repeat(GROUP, axis=0) for t in (rows.scales, rows.minima)
    )
    reference = output_error(w, expected * scales + minima, hessian)
    assert output_error(w, dequantised(rows), hessian) == pytest.approx(reference, rel=0.03)


@pytest.mark.parametrize("seed", range(3))
@pytest.mark.parametrize("n_tokens", [40, 1000])  # fewer than inputs: a Hessian without inverse
def test_outputs_are_nearer_than_those_of_rounding(n_tokens: int, seed: int) -> None:
    w, hessian = example(160, n_tokens, seed)
    found = output_error(w, dequantised(gptq(w.clone(), hessian.clone(), GROUP)), hessian)
    assert found < 0.8 * output_error(w, rounded(w, torch.ones(160)), hessian)
    assert found < 0.8 * output_error(w, rounded(w, hessian.diagonal()), hessian)


def test_large_inputs_count_for_more_in_the_choice_of_scales() -> None:
    w, hessian = example(64, 500)
    diagonal = torch.diag(hessian.diagonal())
    weighted = output_error(w, rounded(w, hessian.diagonal()), diagonal)
    assert weighted < 0.97 * output_error(w, rounded(w, torch.ones(64)), diagonal)


def test_inputs_that_are_always_zero_are_rounded_by_themselves() -> None:
    w, hessian = example(64, 500)
    hessian[5], hessian[:, 5] = 0, 0
    rows = gptq(w.clone(), hessian.clone(), GROUP)
    step = rows.scales.t()[5 // GROUP]
    off = torch.from_numpy(dequantised(rows))[5] - w[5]
    inside = (rows.numbers.t()[5] > 0) & (rows.numbers.t()[5] < 15)
    assert inside.any() and bool((off[inside].abs() <= step[inside] / 2 * 1.01).all())


def test_a_group_of_equal_numbers_is_kept() -> None:
    _, hessian = example(64, 500)
    rows = gptq(torch.full((64, N_OUT), 0.25), hessian, GROUP)
    assert np.array_equal(dequantised(rows), np.full((64, N_OUT), 0.25))


def test_activations_that_are_not_finite_are_told() -> None:
    w, hessian = example(64, 500)
    hessian[3, 4] = torch.inf
    with pytest.raises(UserError, match="activations past the largest float"):
        gptq(w, hessian, GROUP)
