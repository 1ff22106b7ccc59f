"""Attention whose scores are more than scaled products, in torch's operations."""

from __future__ import annotations

import torch
from torch.nn import functional as F

from sl_serve.ops.protocol import Scoring


def scored_attention(
    q: torch.Tensor,
    k: torch.Tensor,
    v: torch.Tensor,
    own: torch.Tensor,
    positions: torch.Tensor,
    scoring: Scoring,
) -> torch.Tensor:
    """q (..., Hq, M, D), k and v (..., Hk, N, D) -> (..., Hq, M, D). A query sees the positions (N)
    up to its `own` (..., M), as far back as the window goes."""
    n_heads, n_kv_heads, scale = q.shape[-3], k.shape[-3], scoring.scale_for(q.shape[-1])
    distance = positions - own[..., None]  # (..., M, N)
    seen = distance <= 0
    if scoring.window is not None:
        seen &= distance > -scoring.window
    seen = seen.unsqueeze(-3)
    if scoring.softcap is not None or scoring.sinks is not None:
        return _by_hand(q, k, v, distance, seen, scoring)
    mask = seen
    if scoring.slopes is not None:
        bias = scoring.slopes[:, None, None] * distance.unsqueeze(-3)
        mask = bias.to(q.dtype).masked_fill(~seen, -torch.inf)
    return F.scaled_dot_product_attention(
        q, k, v, attn_mask=mask, scale=scale, enable_gqa=n_heads != n_kv_heads
    )


def _by_hand(
    q: torch.Tensor,
    k: torch.Tensor,
    v: torch.Tensor,
    distance: torch.Tensor,
    seen: torch.Tensor,
    scoring: Scoring,
) -> torch.Tensor:
    group = q.shape[-3] // k.shape[-3]
    k, v = (x.repeat_interleave(group, dim=-3) for x in (k, v))
    scores = (q @ k.transpose(-1, -2)).float() * scoring.scale_for(q.shape[-1])
    if scoring.softcap is not None:
        scores = scoring.softcap * torch.tanh(scores / scoring.softcap)
    if scoring.slopes is not None:
        scores += scoring.slopes[:, None, None] * distance.unsqueeze(-3)
    scores.masked_fill_(~seen, -torch.inf)
    if scoring.sinks is not None:
        sinks = scoring.sinks[:, None, None].expand(*scores.shape[:-1], 1)
        scores = torch.cat((scores, sinks), dim=-1)
    weights = scores.softmax(dim=-1)[..., : k.shape[-2]]
    return weights.to(v.dtype) @ v
