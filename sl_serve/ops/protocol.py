"""The operations of a decoder layer that are not matmuls. Each has a pure-torch twin."""

from __future__ import annotations

from typing import NamedTuple, Protocol

import torch

from sl_serve.kv.rows import RowTable
from sl_serve.ops.scratch import Scratch


class KVRegion(NamedTuple):
    """One layer's KV: bytes of `memory` from `offset_bytes` on, laid out as the table says."""

    memory: torch.Tensor  # uint8
    offset_bytes: int


class Ops(Protocol):
    """Shapes: T tokens of a sub-batch, Hq query heads, Hk KV heads, D head size."""

    name: str
    scratch: Scratch  # for results; those of the operations below use it too

    def append(self, region: KVRegion, table: RowTable, k: torch.Tensor, v: torch.Tensor) -> None:
        """Write k, v (T, Hk, D) of the new tokens into their rows."""

    def attend(
        self, region: KVRegion, table: RowTable, q: torch.Tensor, n_kv_heads: int
    ) -> torch.Tensor:
        """Causal attention of q (T, Hq, D) over each row's KV, new tokens included (they are
        appended first), scaled by 1/sqrt(D). Returns (T, Hq * D)."""

    def rope_(self, x: torch.Tensor, cos: torch.Tensor, sin: torch.Tensor) -> None:
        """Rotate the pairs (i, i + D/2) of x (T, heads, D) in place; cos, sin: (T, D/2)."""

    def rms_norm(self, x: torch.Tensor, weight: torch.Tensor, eps: float) -> torch.Tensor:
        """x (T, H) / sqrt(mean(x^2) + eps) * weight (H)."""

    def silu_mul(self, gate_up: torch.Tensor) -> torch.Tensor:
        """silu of the first half of each line times the second: (T, 2 I) -> (T, I)."""
