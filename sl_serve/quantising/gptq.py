"""GPTQ: Frantar et al., "Accurate Post-Training Quantization for Generative Pre-trained
Transformers", arXiv 2210.17323.

Inputs of a matrix are rounded one after another; the error of each is made good, as far as that
goes, by those not yet rounded. What that costs in the matrix's outputs is measured by the Hessian
X^T X of the inputs X that a calibration text brings. Scales and minima are chosen beforehand, for
groups of neighbouring inputs; the order is that of falling diagonal, largest inputs first.
"""

from __future__ import annotations

import torch

from sl_serve.errors import UserError
from sl_serve.quantising.scales import fit_groups
from sl_serve.weights.above_minimum import steps_above
from sl_serve.weights.groups import Grouped

BLOCK_INPUTS = 128  # updated one by one; all later inputs once per block
DAMPING = 0.01  # of the diagonal's mean, added to it: from the paper, section 3.3


def gptq(w: torch.Tensor, hessian: torch.Tensor, group: int) -> Grouped:
    """w (in, out) and hessian (in, in), float32, both used up -> numbers of 4 bits above a minimum,
    in groups along the inputs. Takes memory for three more matrices as large as the Hessian.

    Raises UserError for a Hessian that is not finite."""
    dead = hessian.diagonal() == 0  # inputs that are always 0: nothing is known, nothing is spread
    hessian.diagonal()[dead] = 1
    if not bool(hessian.isfinite().all()):
        raise UserError("the calibration text drives activations past the largest float")
    order = torch.argsort(hessian.diagonal(), descending=True, stable=True)
    input_weights, factor = _damped_factor(hessian, order)
    scales, minima = fit_groups(w, input_weights, group)
    numbers = _round_in_turn(w[order], order.tolist(), factor, scales, minima, group)
    return Grouped(numbers.t().contiguous(), scales.t().contiguous(), None, minima.t().contiguous())


def _damped_factor(hessian: torch.Tensor, order: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """The damped diagonal, and the factor in that order. With few tokens for many inputs even the
    damped matrix may not be positive in float32: it is damped more then."""
    diagonal, mean = hessian.diagonal(), float(hessian.diagonal().mean())
    damping = DAMPING
    while True:
        diagonal += damping * mean
        factor = _inverse_factor(hessian[order][:, order])
        if factor is not None:
            return diagonal.clone(), factor
        damping *= 10


def _inverse_factor(hessian: torch.Tensor) -> torch.Tensor | None:
    """The upper U with U^T U = hessian^-1; None where rounding leaves the matrix not positive.

    With both orders turned round, hessian = L L^T gives hessian = R R^T with R upper: U = R^-1."""
    lower, failed = torch.linalg.cholesky_ex(hessian.flip(0, 1))
    if int(failed):
        return None
    upper = lower.flip(0, 1)
    del lower
    factor: torch.Tensor = torch.linalg.solve_triangular(upper, torch.eye(len(upper)), upper=True)
    return factor


def _round_in_turn(
    w: torch.Tensor,
    order: list[int],
    factor: torch.Tensor,
    scales: torch.Tensor,
    minima: torch.Tensor,
    group: int,
) -> torch.Tensor:
    """w (in, out) in `order`, used up -> numbers uint8 (in, out) in the order of the model."""
    numbers = torch.empty(w.shape, dtype=torch.uint8)
    for start in range(0, len(w), BLOCK_INPUTS):
        stop = min(start + BLOCK_INPUTS, len(w))
        errors = torch.empty(stop - start, w.shape[1])
        for i in range(start, stop):
            scale, minimum = scales[order[i] // group], minima[order[i] // group]
            steps = steps_above(w[i], scale, minimum)
            numbers[order[i]] = steps
            error = (w[i] - (steps * scale + minimum)).div_(factor[i, i])
            w[i + 1 : stop].addr_(factor[i, i + 1 : stop], error, alpha=-1)
            errors[i - start] = error
        w[stop:].addmm_(factor[start:stop, stop:].t(), errors, alpha=-1)
    return numbers
