"""Activations in 8 bits, the left side of products with quantised weights: the twin of
csrc/rounded.inc.

Parts of 32 numbers share a scale, as in Q8_0 blocks, and are rounded anew for every product. With
weights of 6 bits at most the sums of a part are then integers. Rows lie in a buffer as parts: 32
signed bytes, their scale, and the sums that stand for the weights' minima.
"""

from __future__ import annotations

import torch

PART = 32  # numbers
LARGEST = 127.0
PART_FLOATS = 12  # a part's room in a buffer of float32


def rounded(x: torch.Tensor) -> torch.Tensor:
    """x (n, k) float32, k whole parts -> the numbers that the products see, in float32."""
    parts = x.reshape(len(x), -1, PART)
    largest = parts.abs().amax(-1, keepdim=True)
    inverse = torch.where(largest > 0, LARGEST / largest, 0.0)
    numbers = (parts * inverse).round()  # ties to even
    return (numbers * (largest / LARGEST)).view(x.shape)


def rounded_floats(k: int) -> int:
    """Of a row of k numbers in a buffer of float32."""
    return -(-k // PART) * PART_FLOATS
