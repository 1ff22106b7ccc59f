"""How many of a layer's experts a step needs, and what follows for how they are fetched."""

from __future__ import annotations

from typing import TypeVar

import numpy as np
import numpy.typing as npt

Number = TypeVar("Number", float, npt.NDArray[np.float64])

# Above this share of a layer's experts, what a whole layer costs more is hidden behind arithmetic,
# while experts that are fetched when they are known to be needed are waited for.
MOST_ROUTED_SHARE = 0.5


def touched_share(n_tokens: Number, n_experts: int, per_token: int) -> Number:
    """Of a layer's experts, how many are chosen by a token or more: expected, if all are alike."""
    missed: Number = (1.0 - per_token / n_experts) ** n_tokens
    return 1.0 - missed


def is_routed(n_tokens: int, n_experts: int, per_token: int) -> bool:
    """Whether a step of so many tokens is to fetch the experts it needs, and not whole layers."""
    return n_experts > 0 and touched_share(n_tokens, n_experts, per_token) <= MOST_ROUTED_SHARE
