"""Experts of a layer: which of a step's tokens go to which, and what they give back.

Tokens of all sub-batches are asked for together, so an expert is read and computed once however
they are packed.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import NamedTuple

import torch

from sl_serve.models import Routed

RunExpert = Callable[[int, torch.Tensor], torch.Tensor]  # expert, (n, hidden) -> (n, hidden)


class Share(NamedTuple):
    """What one expert has to do."""

    expert: int
    tokens: torch.Tensor  # (n,) int64, their lines
    weights: torch.Tensor  # (n, 1)


def joined(asked: Sequence[Routed]) -> Routed:
    """Of several sub-batches, one after another, in memory of its own."""
    return Routed(*(torch.cat(parts) for parts in zip(*asked, strict=True)))


def shares(routed: Routed) -> list[Share]:
    """Of each chosen expert, in order. Waits for the device."""
    experts, per_token = routed.experts.flatten(), routed.experts.shape[1]
    places = experts.argsort(stable=True)
    counts = experts.bincount().tolist()
    weights = routed.weights.flatten()[places, None].to(routed.hidden.dtype)
    parts = zip(*(torch.split_with_sizes(x, counts) for x in (places, weights)), strict=True)
    return [
        Share(expert, part // per_token, of_part)
        for expert, (part, of_part) in enumerate(parts)
        if len(part)
    ]


def run_experts(routed: Routed, chosen: Sequence[Share], run: RunExpert) -> torch.Tensor:
    """(T, hidden). A token's experts are summed in the order of their numbers, whatever other
    tokens there are."""
    out = torch.zeros_like(routed.hidden)
    for share in chosen:
        given = run(share.expert, routed.hidden[share.tokens])
        out.index_add_(0, share.tokens, given * share.weights)
    return out
