"""Which tokens go to which experts, and their weighted sums."""

from __future__ import annotations

import pytest
import torch

from sl_serve.expert_share import MOST_ROUTED_SHARE, is_routed, touched_share
from sl_serve.models import Routed
from sl_serve.routing import joined, run_experts, shares


def test_touched_share() -> None:
    assert touched_share(1, 128, 8) == pytest.approx(1 / 16)
    assert touched_share(0, 8, 2) == 0
    assert touched_share(10_000, 8, 2) == pytest.approx(1)
    # Exactly, over all draws of two tokens' one expert each among three.
    assert touched_share(2, 3, 1) == pytest.approx((3 * 1 + 6 * 2) / 9 / 3)


def test_few_tokens_are_routed_and_many_are_not() -> None:
    kinds = [is_routed(n, 8, 2) for n in range(1, 20)]
    assert kinds == sorted(kinds, reverse=True) and kinds[0] and not kinds[-1]
    at = kinds.index(False) + 1
    assert touched_share(at - 1, 8, 2) <= MOST_ROUTED_SHARE < touched_share(at, 8, 2)
    assert not is_routed(1, 0, 0)  # nothing to route


def routed_of(n_tokens: int, seed: int = 0) -> Routed:
    random = torch.Generator().manual_seed(seed)
    hidden = torch.randn(n_tokens, 4, generator=random)
    experts = torch.rand(n_tokens, 6, generator=random).topk(3).indices
    return Routed(hidden, experts, torch.rand(n_tokens, 3, generator=random))


def test_experts_give_each_token_its_weighted_sum() -> None:
    parts = [routed_of(5, 1), routed_of(1, 2), routed_of(3, 3)]
    together = joined(parts)
    runs: list[int] = []

    def run_one(expert: int, x: torch.Tensor) -> torch.Tensor:
        runs.append(expert)
        return x * (expert + 1)

    found = run_experts(together, shares(together), run_one)
    expected = torch.cat(
        [p.hidden * (p.weights * (p.experts + 1)).sum(-1, keepdim=True) for p in parts]
    )
    torch.testing.assert_close(found, expected)
    assert runs == sorted(set(together.experts.flatten().tolist()))
